"""Name resolution that can be left alone.

``getaddrinfo`` cannot be cancelled on any system and knows no timeout: with a dead resolver,
``requests.get(timeout=1)`` takes as long as the resolver likes. So a name is looked up on a thread of its
own, and a caller who is cancelled abandons it.

The thread is a bare daemon: the worker of an executor would hold up the end of the process for as long as the
resolver does. Abandoned threads are counted, and at `MAX_ABANDONED` of them further names fail at once
instead of piling up more.
"""

from __future__ import annotations

import socket
from typing import Any

from tokenscope._core import _primitives
from tokenscope._core import token as tokens

__all__ = ["MAX_ABANDONED", "Address", "abandoned", "resolve"]

#: How many abandoned look-ups may be stuck at one time; pulled out of the air: a thread each, of about 10 kB.
MAX_ABANDONED = 64
#: The name of the threads, for leak checks and stack dumps.
THREAD_NAME = "tokenscope-resolve"

#: One line of what ``socket.getaddrinfo`` answers.
Address = tuple[Any, ...]

_stuck: set[_Lookup] = set()  # changed by atomic operations only


class _Lookup:
    """One look-up, on a thread of its own."""

    def __init__(self, host: str, port: int, family: int) -> None:
        self.question = (host, port, family)
        self.answer: list[Address] = []
        self.error: BaseException | None = None
        self.done = False
        self.pid = _primitives.getpid()
        self.waiter = _primitives.Waiter()

    def run(self) -> None:
        try:
            self.answer = _ask(*self.question)
        except BaseException as error:  # raised in the thread that asked
            self.error = error
        self.done = True
        _stuck.discard(self)
        self.waiter.wake()

    def abandon(self) -> None:
        """Count it as stuck. Whoever comes later of this and `run` takes it out again: no lock is needed."""
        _stuck.add(self)
        if self.done:
            _stuck.discard(self)

    def take(self) -> list[Address]:
        error, self.error = self.error, None
        if error is None:
            return self.answer
        try:
            raise error
        finally:
            del error  # break the cycle of exception and frame


def abandoned() -> int:
    """How many look-ups of this process nobody waits for any more and still run."""
    here = _primitives.getpid()
    return sum(lookup.pid == here for lookup in tuple(_stuck))


def resolve(host: str, port: int, *, token: tokens.CancellationToken, family: int = socket.AF_UNSPEC) -> list[Address]:
    """Look up the stream addresses of a name; addresses in digits are answered without a thread.

    Args:
        host: A name, or an address in digits.
        port: The port.
        token: Ends the wait. Its remaining time is all the time there is.
        family: As for ``socket.getaddrinfo``.

    Raises:
        Cancelled: The token was cancelled, or its deadline passed. The look-up is abandoned.
        socket.gaierror: There is no such name, or too many abandoned look-ups are stuck already.
    """
    token.check()
    if token is tokens.NEVER or _is_literal(host):
        return _ask(host, port, family)
    if abandoned() >= MAX_ABANDONED:
        raise socket.gaierror(
            socket.EAI_AGAIN,
            f"{MAX_ABANDONED} abandoned name look-ups are still stuck; the resolver does not answer",
        )
    return _wait(_start(_Lookup(host, port, family)), token)


def _ask(host: str, port: int, family: int) -> list[Address]:
    return list(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM))


def _start(lookup: _Lookup) -> _Lookup:
    try:
        _primitives.start_thread(lookup.run, THREAD_NAME)
    except RuntimeError:  # no thread to be had: late is better than never
        lookup.run()
    return lookup


def _wait(lookup: _Lookup, token: tokens.CancellationToken) -> list[Address]:
    try:
        while not lookup.done and tokens.attach(token, lookup.waiter):
            if not lookup.waiter.wait(token.remaining()):
                tokens.expire_if_due(token)
    finally:
        tokens.detach(token, lookup.waiter)
        if not lookup.done:
            lookup.abandon()
    token.check()
    return lookup.take()


def _is_literal(host: str) -> bool:
    """Whether it is an address in digits, which the resolver answers from its own head."""
    address = host.partition("%")[0]
    return _parses(socket.AF_INET, address) or _parses(socket.AF_INET6, address)


def _parses(family: int, address: str) -> bool:
    try:
        socket.inet_pton(family, address)
    except (OSError, ValueError):  # not digits; or a NUL, a surrogate
        return False
    return True
