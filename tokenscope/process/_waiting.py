"""Blocking on descriptors, woken by a token: `wait_ready`. No polling, and nothing stays open.

A `Descriptor` is closed when nobody refers to it any more. So one thread may let go of it while another still waits on
it: the number cannot become somebody else's file meanwhile.

Lock order: none is held. Fork: a descriptor is closed once in each process that has it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from typing import TYPE_CHECKING

from tokenscope._core import clock, events, workers
from tokenscope._core.token import attach, detach

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenscope._core.token import CancellationToken

__all__ = ["Descriptor", "open_pidfd", "wait_ready", "watch_exit"]

_LONGEST = 24 * 3600.0  # seconds; `poll` takes an int of milliseconds. Whoever waits longer looks once a day
_told = threading.Event()  # that there is no pidfd


class Descriptor:
    """Owns a file descriptor."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        # No call of a Python function here: an interrupt that falls into a finalizer is lost.
        try:  # noqa: SIM105
            os.close(self.fd)
        except (OSError, AttributeError):  # AttributeError: an interrupt cut its making
            pass

    def is_ready(self) -> bool:
        """Whether it can be read now; for a process: whether that has ended."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        return bool(poller.poll(0))


class _Bell(Descriptor):
    """What a token rings. The canceller holds it while it does, so it cannot be closed under it."""

    __slots__ = ("_clapper",)

    def __init__(self) -> None:
        reader, writer = os.pipe()
        super().__init__(reader)
        self._clapper = Descriptor(writer)

    def wake(self) -> None:
        """Let the owner go on. A pipe takes far more bytes than a bell has tokens: never blocks."""
        with contextlib.suppress(OSError):
            os.write(self._clapper.fd, b"!")


def wait_ready(wanted: Mapping[int, int], until: float | None, *tokens: CancellationToken) -> set[int]:
    """Block until one of some descriptors is ready, a token is cancelled, or the monotonic time ``until``.

    Args:
        wanted: Events (``select.POLLIN`` ...) by descriptor.
        until: When to come back at the latest.
        tokens: Only those that are live at the beginning count.

    Returns:
        The descriptors that are ready; none if it was something else.
    """
    poller = select.poll()
    for fd, mask in wanted.items():
        poller.register(fd, mask)
    ready = poller.poll(0)
    if not ready:
        ready = _block(poller, until, [token for token in dict.fromkeys(tokens) if not token.cancelled])
    return {fd for fd, _mask in ready if fd in wanted}


def _block(poller: select.poll, until: float | None, tokens: list[CancellationToken]) -> list[tuple[int, int]]:
    bell = _Bell()
    poller.register(bell.fd, select.POLLIN)
    try:
        if all(attach(token, bell) for token in tokens):
            return poller.poll(_milliseconds(until))
        return []
    finally:
        for token in tokens:
            detach(token, bell)


def _milliseconds(until: float | None) -> float:
    left = _LONGEST if until is None else until - clock.now()
    return min(max(left, 0.0), _LONGEST) * 1000


def open_pidfd(pid: int) -> Descriptor | None:
    """A descriptor that can be read when process ``pid`` has ended; None if there is no such process, or no pidfd."""
    try:
        return Descriptor(os.pidfd_open(pid))
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) != errno.ESRCH:
            _tell_once(error)
        return None


def watch_exit(pid: int) -> Descriptor | None:
    """A descriptor that can be read when our child ``pid`` has ended; without reaping it.

    By pidfd; where there is none (Linux before 5.3, a sandbox that forbids it) a thread waits instead.
    """
    found = open_pidfd(pid)
    if found is not None or not _told.is_set():
        return found
    reader, writer = os.pipe()
    workers.submit(_Waiter(pid, Descriptor(writer)).run)
    return Descriptor(reader)


class _Waiter:
    """Blocks for a child on a thread of its own, and hangs up its end of a pipe then."""

    def __init__(self, pid: int, end: Descriptor) -> None:
        self.pid = pid
        self.end: Descriptor | None = end

    def run(self) -> None:
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            pass  # somebody else has reaped it: it has ended
        finally:
            self.end = None


def _tell_once(error: BaseException) -> None:
    if not _told.is_set():
        _told.set()
        events.emit(events.FallbackUsed("process", f"no pidfd ({error}): a thread waits for each process instead"))
