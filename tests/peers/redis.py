"""A small Redis that hangs on cue: just enough of RESP 2 and 3 for redis-py.

What it knows: strings, locks (SET NX and their script), MULTI and EXEC, WATCH, SCAN, subscriptions, and keys by which
it hangs: `hang` before an answer, `half` in the middle of it, `deaf` in the middle of a value that the client still
sends. BLPOP hangs too. `slow` is answered when the test says so; `rude` makes it hang up instead of answering.
"""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

from peers.server import Exchange, Gone, Peer

if TYPE_CHECKING:
    from peers.certs import Authority


class RedisServer(Peer):
    """The server. A context manager that serves until it is left.

    Args:
        tls: Whose certificates to use; None is plain.
        path: Of a Unix socket, in place of a port.

    Attributes:
        log: Every command, in order, the client's introductions left out.
        store: The values.
        slow: Set it to have `slow` answered.
        hangs_at: A command at which it hangs, whatever the key.
    """

    def __init__(self, tls: Authority | None = None, path: str = "") -> None:
        super().__init__(self.play, tls=tls)
        self.path = path
        self.log: list[list[str]] = []
        self.store: dict[str, str] = {"key": "value"}
        self.slow = threading.Event()
        self.hangs_at = "BLPOP"

    def listen(self) -> socket.socket:
        if not self.path:
            return super().listen()
        self.port = 0
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()
        return listener

    def play(self, exchange: Exchange) -> None:
        """Talk to one client to its end."""
        Session(self, exchange).serve()

    def count(self, command: str) -> int:
        """How often this was asked for."""
        return sum(entry[0] == command for entry in self.log)


class Session:
    """One client."""

    def __init__(self, server: RedisServer, exchange: Exchange) -> None:
        self.server = server
        self.exchange = exchange
        self.resp3 = False
        self.queued: list[list[str]] | None = None  # since MULTI

    def serve(self) -> None:
        while True:
            try:
                command = self.receive()
            except (Gone, OSError):
                self.server.closed.set()
                raise
            if command[0] not in {"HELLO", "CLIENT", "SELECT", "AUTH"}:
                self.server.log.append(command)
            self.exchange.send(self.answer(command))

    def receive(self) -> list[str]:
        """Read the next command, unless it is one of those that are not read to their end."""
        words: list[str] = []
        for _ in range(int(self.exchange._until(b"\r\n")[1:])):
            size = int(self.exchange._until(b"\r\n")[1:])
            if words[-1:] == ["deaf"]:
                self.server.log.append(words)
                self.exchange.hang()
            words.append(self.exchange._exactly(size + 2)[:-2].decode())
        return [words[0].upper(), *words[1:]]

    def answer(self, command: list[str]) -> bytes:
        name, *arguments = command
        if self.queued is not None and name != "EXEC":
            self.queued.append(command)
            return b"+QUEUED\r\n"
        if arguments[:1] == ["rude"]:
            raise Gone
        if arguments[:1] == ["slow"]:
            self.server.reached.set()
            self.server.slow.wait(10)
        if arguments[:1] == ["half"]:
            self.exchange.send(b"$100\r\nhalf of")
        if arguments[-1:] == ["hang"] or arguments[:1] == ["half"] or name == self.server.hangs_at:
            self.exchange.hang()
        known = getattr(self, f"do_{name.lower()}", None)
        return b"-ERR unknown command\r\n" if known is None else known(*arguments)

    def do_hello(self, version: str, *_: str) -> bytes:
        self.resp3 = version == "3"
        return b"%1\r\n" + bulk("proto") + b":3\r\n"

    def do_ok(self, *_: str) -> bytes:
        return b"+OK\r\n"

    do_client = do_select = do_auth = do_watch = do_unwatch = do_monitor = do_ok

    def do_ping(self, *_: str) -> bytes:
        return b"+PONG\r\n"

    def do_get(self, key: str) -> bytes:
        return bulk(self.server.store.get(key), resp3=self.resp3)

    def do_set(self, key: str, value: str, *options: str) -> bytes:
        if "NX" in options and key in self.server.store:
            return bulk(None, resp3=self.resp3)
        self.server.store[key] = value
        return b"+OK\r\n"

    def do_multi(self) -> bytes:
        self.queued = []
        return b"+OK\r\n"

    def do_exec(self) -> bytes:
        queued, self.queued = self.queued or [], None
        return b"*%d\r\n" % len(queued) + b"".join(map(self.answer, queued))

    def do_scan(self, cursor: str, *_: str) -> bytes:
        """Two pages; the second one never comes."""
        if cursor != "0":
            self.exchange.hang()
        return b"*2\r\n" + bulk("7") + b"*1\r\n" + bulk("first")

    def do_subscribe(self, channel: str) -> bytes:
        head = b">" if self.resp3 else b"*"
        return head + b"3\r\n" + bulk("subscribe") + bulk(channel) + b":1\r\n"

    def do_script(self, *_: str) -> bytes:
        return bulk("sha")

    def do_evalsha(self, _sha: str, _count: str, key: str, owner: str) -> bytes:
        """Release a lock: that is all the scripts that are run here."""
        if self.server.store.get(key) != owner:
            return b":0\r\n"
        del self.server.store[key]
        return b":1\r\n"


def bulk(text: str | None, *, resp3: bool = False) -> bytes:
    if text is None:
        return b"_\r\n" if resp3 else b"$-1\r\n"
    return b"$%d\r\n%s\r\n" % (len(text), text.encode())
