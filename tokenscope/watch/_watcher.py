"""One epoll thread per process: "this client has gone", told once, within a millisecond.

What is watched is an ``os.dup`` of the server's descriptor, for ``EPOLLRDHUP|EPOLLONESHOT``. Never
``EPOLLIN``, never ``MSG_PEEK``: pipelined or unread bytes hide the end of a connection from both, and TLS has
bytes of its own. Why a dup: a server that closes its descriptor under us would silently drop the
registration.

Which event means "gone"::

    half_close    TCP                     AF_UNIX
    "cancel"      RDHUP, HUP or ERR       HUP or ERR (exact: a half close has RDHUP only)
    "ignore"      HUP or ERR              HUP or ERR

HUP and ERR need no subscription, so where RDHUP does not count the mask is 0 from the beginning: an RDHUP
that does not count could otherwise only be silenced by arming again, and level triggering would spin.

States of a watch: *watching* -> *fired* (the callback is due or done) or *closed*. Nothing leads back.

Invariants
    1. A watch is in ``_table`` exactly while it is watching; taking it out decides who won, a hang-up or
       ``close()``.
    2. While it is in the table its dup is open and registered with this process's epoll. It is taken out and
       unregistered under the lock, and its dup is closed after that, by whoever took it out. So an event for
       a number that was reused meanwhile finds no watch, or another one, whose socket says at the re-check
       (``poll(0)``, under the lock) that it is fine. Without the re-check healthy requests are cancelled.
    3. ``on_gone`` is called at most once, outside the lock, and only by the thread that took the watch out.
    4. The dup is closed when it fires, or by ``close()``, which the owner calls before the server ends the
       connection: while a dup lives, a server's ``close()`` sends no FIN.

Lock: one (`Room`), a leaf. Under it there are only system calls that do not wait (epoll_ctl, poll(0)) and
dictionary operations; no callback, no event, no other lock, and no start of a thread (which waits for locks
of ``threading`` that a thread in a finalizer may hold). Hence no deadlock. It is re-entrant because a
finalizer of an abandoned response may close its watch in the middle of a section of the same thread; that
takes the watch out in one step (``pop``), so both see one winner.

Fork: ``Room`` compares the process id at every entry. A new process gets a new lock, table, epoll and thread.
The inherited epoll descriptor is closed (it is shared: each process would get events of the other), and so
are the inherited dups. No fork hook is needed.

Thread: a daemon, started by the first watch, parked in ``epoll_wait`` for ever and never joined. What another
thread registers takes effect at once, so nothing needs to wake it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import TYPE_CHECKING, Any, Literal

from tokenscope._core import _primitives, events
from tokenscope._core.errors import TokenScopeError
from tokenscope.watch._sources import Connection

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CannotWatch", "HalfClose", "Watch", "Watcher", "supported", "watch"]

HalfClose = Literal["cancel", "ignore"]
HALF_CLOSE: tuple[HalfClose, ...] = ("cancel", "ignore")

THREAD_NAME = "tokenscope-watch"


class CannotWatch(TokenScopeError):
    """This connection, or any connection on this platform, cannot be watched; the message says why."""


class Watch:
    """One watched connection. Made by `watch`; ``close()`` it before the response ends.

    Attributes:
        fired: Whether the peer was seen to be gone; the callback may be running just now. Read-only.
    """

    __slots__ = ("__weakref__", "dup", "fired", "mask", "on_gone", "watcher")

    def __init__(self, watcher: Watcher, dup: int, mask: int, on_gone: Callable[[], object]) -> None:
        self.watcher = watcher
        self.dup = dup
        self.mask = mask
        self.on_gone = on_gone
        self.fired = False  # becomes True under the watcher's lock

    def look(self) -> bool:
        """Look now instead of waiting to be told; if the peer has gone, ``on_gone`` is called on this thread.

        Returns:
            Whether it has fired, now or before.
        """
        self.watcher.look(self.dup, self)
        return self.fired

    def close(self) -> bool:
        """End the watch and give its descriptor back; idempotent, thread-safe, never blocks.

        Returns:
            Whether it had fired: then ``on_gone`` was called, or is just being called on another thread.
        """
        self.watcher.close(self)
        return self.fired


class Watcher(_primitives.Room):
    """The table, its epoll and its thread. There is one for the process: `watcher`."""

    __slots__ = ("_epoll", "_table", "_waited_on")

    def __init__(self) -> None:
        super().__init__()
        self._table: dict[int, Watch] = {}  # dup -> watch; changes under the lock
        self._epoll: select.epoll | None = None  # made, and lost, under the lock
        self._waited_on = False  # whether the thread runs or is being started; changes under the lock

    def add(self, dup: int, mask: int, on_gone: Callable[[], object]) -> Watch:
        """Watch ``dup``, which is ours from now on.

        Raises:
            OSError: No epoll, or no more descriptors or watches.
            RuntimeError: The thread could not be started.
        """
        found = Watch(self, dup, mask, on_gone)
        try:
            with self.enter(): idle = self._add_locked(found)  # fmt: skip
            if idle is not None:
                self._start(idle)
        except BaseException:
            self.close(found)
            raise
        return found

    def _add_locked(self, new: Watch) -> select.epoll | None:
        """Gives the epoll if nobody waits on it; then the caller, and nobody else, starts the thread."""
        self._table[new.dup] = new
        if self._epoll is None:
            self._epoll = select.epoll()
        self._epoll.register(new.dup, new.mask | select.EPOLLONESHOT)
        if self._waited_on:
            return None
        self._waited_on = True
        return self._epoll

    def _start(self, epoll: select.epoll) -> None:
        try:
            _primitives.start_thread(lambda: self._run(epoll), THREAD_NAME)
        except BaseException:
            with self.enter(): self._unwatched_locked(epoll)  # fmt: skip
            raise

    def _unwatched_locked(self, epoll: select.epoll) -> None:
        # Whoever was added meanwhile stays: the next one tries to start the thread again, and no event is
        # lost.
        if self._epoll is epoll:
            self._waited_on = False

    def close(self, ended: Watch) -> None:
        """Take ``ended`` out, if it still is in."""
        with self.enter(): won = self._take_locked(ended)  # fmt: skip
        if won:
            os.close(ended.dup)

    def _take_locked(self, ended: Watch) -> bool:
        if self._table.get(ended.dup) is not ended or self._table.pop(ended.dup, None) is not ended:
            return False
        try:
            if self._epoll is not None:
                self._epoll.unregister(ended.dup)
        except (OSError, ValueError):  # never registered (a failed `add`), or the epoll itself was closed
            pass
        return True

    def _run(self, epoll: select.epoll) -> None:
        try:
            while True:
                for fd, _ in epoll.poll():
                    self.look(fd)
        except (OSError, ValueError) as error:
            # Somebody closed all descriptors of the process. The next watch starts afresh.
            with self.enter(): self._lost_locked(epoll)  # fmt: skip
            events.emit(events.ThreadFailed(THREAD_NAME, error))

    def _lost_locked(self, epoll: select.epoll) -> None:
        if self._epoll is epoll:
            self._epoll = None
            self._waited_on = False
            self._table.clear()

    def look(self, fd: int, expected: Watch | None = None) -> None:
        """Fire the watch of ``fd`` (only ``expected``, if given) if its peer has gone."""
        with self.enter(): gone = self._gone_locked(fd, expected)  # fmt: skip
        if gone is None:
            return
        os.close(fd)
        try:
            gone.on_gone()
        except BaseException as error:  # the one thread that sees hang-ups must outlive any callback
            events.emit(events.CallbackFailed("watch", error))

    def _gone_locked(self, fd: int, expected: Watch | None) -> Watch | None:
        seen = self._table.get(fd)
        if seen is None or (expected is not None and seen is not expected):
            return None
        if not _has_gone(fd, seen.mask):
            if expected is None:
                self._arm_again_locked(seen)
            return None
        if not self._take_locked(seen):
            return None
        seen.fired = True
        return seen

    def _arm_again_locked(self, seen: Watch) -> None:
        """The event was for an earlier user of this number; make sure that ours is still to come."""
        if self._epoll is not None and self._table.get(seen.dup) is seen:
            self._epoll.modify(seen.dup, seen.mask | select.EPOLLONESHOT)

    def _after_fork_locked(self) -> None:
        # Order matters: unregistering here would take the parent's registrations out of the shared epoll.
        inherited, self._table = self._table, {}
        epoll, self._epoll = self._epoll, None
        self._waited_on = False
        if epoll is not None:
            epoll.close()
        for fd in inherited:
            with contextlib.suppress(OSError):  # a child that closed everything
                os.close(fd)


def _has_gone(fd: int, mask: int) -> bool:
    poll = select.poll()
    poll.register(fd, mask)
    # Not NVAL: a descriptor that somebody closed under us proves nothing about the peer.
    return any(seen & (mask | select.POLLHUP | select.POLLERR) for _, seen in poll.poll(0))


watcher = Watcher()


def supported() -> bool:
    """Whether hang-ups can be seen here without reading: epoll is there, and nobody has patched it away."""
    return hasattr(select, "epoll")


def watch(connection: Connection, on_gone: Callable[[], object], *, half_close: HalfClose = "cancel") -> Watch:
    """Call ``on_gone()`` once, on another thread, when the peer of ``connection`` has gone.

    It must be quick and must not block: it holds up the news of all other hang-ups. An error in it is emitted
    as an event. A peer that is gone already is told like any other. Thread-safe.

    Args:
        connection: What `find_connection` found.
        on_gone: Called without arguments, at most once, not after ``close()`` said False.
        half_close: On TCP a client that only stopped sending (``shutdown(SHUT_WR)``) looks like one that
            left. ``"cancel"`` takes it for gone, as nginx does. ``"ignore"`` waits for a reset, and so does
            not see a plain close before something is written to it. On AF_UNIX the two can be told apart, and
            always are.

    Raises:
        CannotWatch: Not on this platform, not this connection any more, or no descriptor or thread to spare.
        TypeError: ``connection`` is none, or ``on_gone`` is not callable.
        ValueError: ``half_close`` is neither word.
    """
    if not isinstance(connection, Connection):
        raise TypeError(f"connection must be what find_connection() found, not {connection!r}")
    if not callable(on_gone):
        raise TypeError(f"on_gone must be callable, not {on_gone!r}")
    mask = _mask(connection.family, half_close)
    if not supported():
        raise CannotWatch("this platform has no epoll (or it was patched away): hang-ups cannot be seen")
    try:
        return watcher.add(connection.duplicate(), mask, on_gone)
    except (OSError, RuntimeError) as error:
        raise CannotWatch(f"this connection cannot be watched: {error}") from error


def _mask(family: int, half_close: Any) -> int:
    if half_close not in HALF_CLOSE:
        raise ValueError(f"half_close must be 'cancel' or 'ignore', not {half_close!r}")
    unix: int = getattr(socket, "AF_UNIX", -1)
    if half_close == "ignore" or family == unix:
        return 0  # HUP and ERR come unasked
    return int(getattr(select, "EPOLLRDHUP", 0))
