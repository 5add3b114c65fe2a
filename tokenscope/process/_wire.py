"""What an owner, its fork server and its workers say to each other: frames of bytes, over sockets."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

__all__ = ["HEADER", "Answer", "Ended", "header", "receive", "send"]

HEADER = struct.Struct("!Q")


class Answer(NamedTuple):
    """What became of a call; said by the worker."""

    value: bytes = b""  # pickled result
    error: bytes = b""  # pickled exception
    trouble: str = ""  # in words, where there is neither; and what `error` says, should it not be loadable there
    trace: str = ""  # traceback of the exception, as text
    spent: bool = False  # the function left a thread or a process behind


class Ended(NamedTuple):
    """What became of a worker; said by the fork server when nothing of it is left."""

    pid: int | None = None
    returncode: int | None = None  # as in ``subprocess``
    trouble: str = ""  # why it was never started


def header(body: bytes) -> bytes:
    """What goes before ``body``."""
    return HEADER.pack(len(body))


def send(sock: socket.socket, body: bytes) -> None:
    """Send one frame. Blocks."""
    sock.sendall(header(body), socket.MSG_NOSIGNAL)
    sock.sendall(body, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> bytes | None:
    """The next frame; None if the other side has gone. Blocks."""
    head = _exactly(sock, HEADER.size)
    return None if head is None else _exactly(sock, *HEADER.unpack(head))


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        try:
            got = sock.recv_into(view)
        except ConnectionResetError:
            return None  # it has gone, and had not read all that we sent
        if not got:
            return None
        view = view[got:]
    return bytes(data)
