"""Queues: one line for those who want an item, one for those who want a place, one for those who want it all done."""

from __future__ import annotations

import math
import queue
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tokenscope._core._typing import override
from tokenscope.sync._line import NOTHING, Desk, Line, end_of, waiting_token, whole_number

if TYPE_CHECKING:
    from tokenscope._core.token import CancellationToken

__all__ = ["LifoQueue", "PriorityQueue", "Queue", "ShutDown", "SimpleQueue"]

T = TypeVar("T")

if TYPE_CHECKING:

    class ShutDown(Exception):
        """The queue was shut down: it takes nothing more, and has nothing more."""

else:
    try:
        from queue import ShutDown  # since Python 3.13
    except ImportError:

        class ShutDown(Exception):
            """The queue was shut down: it takes nothing more, and has nothing more."""


class Queue(queue.Queue[T]):
    """`queue.Queue`, in which a cancel ends the wait. Fair: first come, first served, for getting and for putting.

    Thread-safe. It is a `queue.Queue`, may be subclassed in the same way (``_init``, ``_qsize``, ``_put``, ``_get``),
    and has ``shutdown`` on every version of Python; only the three conditions inside of the original are not there.
    `put` into an unbounded queue never blocks: it is no checkpoint, and signal handlers may call it.

    Args:
        maxsize: How many items it holds; 0 or less is no limit.

    Raises:
        TypeError: ``maxsize`` is no int.
    """

    def __init__(self, maxsize: int = 0) -> None:
        # Not `super().__init__`: its lock and conditions are what is replaced here.
        self.maxsize = whole_number("maxsize", maxsize)
        self.unfinished_tasks = 0
        self.is_shutdown = False
        self._getters, self._putters, self._joiners = Line(), Line(), Line()
        self._watchers = self._getters.watchers  # for `tokenscope.wait_any`
        self._desk = Desk(self._getters, self._putters, self._joiners)
        self._init(maxsize)

    @property
    def mutex(self) -> Any:  # type: ignore[override]  # a plain attribute there
        """The lock around the items, for those who reach for ``queue`` themselves."""
        return self._desk.enter()

    # --- putting --------------------------------------------------------------------------------------------

    @override
    def put(
        self, item: T, block: bool = True, timeout: float | None = None, *, token: CancellationToken | None = None
    ) -> None:
        """Put an item in.

        Args:
            item: Anything.
            block: Whether to wait for a free place. If not, or if the queue is unbounded, this is no checkpoint.
            timeout: Seconds to wait at most.
            token: Ends the wait too, beside the current token.

        Raises:
            queue.Full: There is no place, or was none in time.
            ShutDown: The queue was shut down.
            Cancelled: This thread is, or was meanwhile, cancelled. The item is not in the queue.
            ValueError, TypeError: A bad ``timeout`` or ``token``.
        """
        listened, end = _wait_of(block, timeout, token)
        if self.maxsize <= 0:
            self._desk.run(self._insert_locked, item)
            return

        def insert() -> None:
            self._insert_locked(item)

        if block:
            done = self._desk.obtain(self._putters, self._places, insert, _keep, listened, end)
        else:
            done = self._desk.attempt(self._putters, self._places, insert, _keep)
        if done is NOTHING:
            raise queue.Full

    def _places(self) -> float:
        """How many items find a place; who is told of a shutdown needs none."""
        return math.inf if self.maxsize <= 0 or self.is_shutdown else self.maxsize - self._qsize()

    def _insert_locked(self, item: T) -> None:
        if self.is_shutdown:
            raise ShutDown
        self._put(item)
        self.unfinished_tasks += 1
        self._getters.serve_locked(self._items())

    # --- getting --------------------------------------------------------------------------------------------

    @override
    def get(self, block: bool = True, timeout: float | None = None, *, token: CancellationToken | None = None) -> T:
        """Take an item out.

        Args:
            block: Whether to wait for one. If not, this is no checkpoint.
            timeout: Seconds to wait at most.
            token: Ends the wait too, beside the current token.

        Raises:
            queue.Empty: There is none (or it is promised to a thread that waits), or there was none in time.
            ShutDown: The queue was shut down, and is empty.
            Cancelled: This thread is, or was meanwhile, cancelled. No item is taken.
            ValueError, TypeError: A bad ``timeout`` or ``token``.
        """
        listened, end = _wait_of(block, timeout, token)
        if block:
            item = self._desk.obtain(self._getters, self._items, self._remove_locked, _keep, listened, end)
        else:
            item = self._desk.attempt(self._getters, self._items, self._remove_locked, _keep)
        if item is NOTHING:
            raise queue.Empty
        return item  # type: ignore[no-any-return]

    def _items(self) -> float:
        """How many can take something away: an item, or the news of a shutdown."""
        return math.inf if self.is_shutdown else self._qsize()

    def _remove_locked(self) -> T:
        if not self._qsize():
            raise ShutDown
        item = self._get()
        self._putters.serve_locked(self._places())
        return item

    # --- telling --------------------------------------------------------------------------------------------

    @override
    def task_done(self) -> None:
        """Tell that an item that was taken has been dealt with. Never blocks.

        Raises:
            ValueError: More often than items were put in.
        """
        self._desk.run(self._done_locked)

    def _done_locked(self) -> None:
        if self.unfinished_tasks <= 0:
            raise ValueError("task_done() called too many times")
        self.unfinished_tasks -= 1
        self._joiners.serve_locked(self._all_done())

    @override
    def join(self, *, token: CancellationToken | None = None) -> None:
        """Wait until every item that was put in has been dealt with. A checkpoint.

        Raises:
            Cancelled: This thread is, or was meanwhile, cancelled.
        """
        self._desk.obtain(self._joiners, self._all_done, bool, _keep, waiting_token(token), None)

    def _all_done(self) -> float:
        return 0 if self.unfinished_tasks else math.inf

    def shutdown(self, immediate: bool = False) -> None:
        """Take nothing more: `put` raises `ShutDown`, and so does `get` once the queue is empty. Never blocks.

        Args:
            immediate: Drop what is in it, too; dropped items count as dealt with.
        """
        self._desk.run(self._shut_down_locked, immediate)

    def _shut_down_locked(self, immediate: bool) -> None:
        self.is_shutdown = True
        while immediate and self._qsize():
            self._get()
            self.unfinished_tasks = max(0, self.unfinished_tasks - 1)
        self._getters.serve_locked(math.inf)
        self._putters.serve_locked(math.inf)
        self._joiners.serve_locked(self._all_done())

    @override
    def qsize(self) -> int:
        """How many items there are now, promised ones included."""
        return self._desk.ask(self._qsize)

    @override
    def empty(self) -> bool:
        """Whether there are none now."""
        return not self.qsize()

    @override
    def full(self) -> bool:
        """Whether there is no place now."""
        return 0 < self.maxsize <= self.qsize()

    def _is_ready(self) -> bool:
        return self._items() > len(self._getters.granted)


class LifoQueue(Queue[T], queue.LifoQueue[T]):
    """`queue.LifoQueue`, as `Queue`: the newest item first. Those who wait are still served in their order."""


class PriorityQueue(Queue[T], queue.PriorityQueue[T]):  # type: ignore[type-var]  # any item, as Queue itself
    """`queue.PriorityQueue`, as `Queue`: the smallest item first. Those who wait are still served in their order."""


class SimpleQueue(Generic[T]):
    """`queue.SimpleQueue`, in which a cancel ends the wait. Unbounded; first come, first served.

    Thread-safe. `put` takes no lock: it may be called anywhere, in signal handlers, ``__del__`` and ``weakref``
    callbacks too, also if they interrupt a call to this very queue.
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()  # added to without the lock, taken from under it
        self._line = Line()
        self._watchers = self._line.watchers  # for `tokenscope.wait_any`
        self._desk = Desk(self._line)

    def put(self, item: T, block: bool = True, timeout: float | None = None) -> None:  # noqa: ARG002 - as the original
        """Put an item in. Never blocks, is no checkpoint; ``block`` and ``timeout`` mean nothing."""
        # First this, then look. Who begins to wait does it the other way round (`Desk._queue_up_locked`), so that one
        # of the two sees the other.
        self._items.append(item)
        if self._line.turns or self._line.watchers:
            self._desk.post(self._serve_locked)

    def put_nowait(self, item: T) -> None:
        """As `put`."""
        self.put(item)

    def _serve_locked(self) -> None:
        self._line.serve_locked(len(self._items))

    def get(self, block: bool = True, timeout: float | None = None, *, token: CancellationToken | None = None) -> T:
        """Take the oldest item. Arguments and errors as those of `Queue.get`."""
        listened, end = _wait_of(block, timeout, token)
        if block:
            item = self._desk.obtain(self._line, self.qsize, self._items.popleft, _keep, listened, end)
        else:
            item = self._desk.attempt(self._line, self.qsize, self._items.popleft, _keep)
        if item is NOTHING:
            raise queue.Empty
        return item  # type: ignore[no-any-return]

    def get_nowait(self) -> T:
        """As `get` without waiting; no checkpoint."""
        return self.get(block=False)

    def qsize(self) -> int:
        """How many items there are now, promised ones included."""
        return len(self._items)

    def empty(self) -> bool:
        """Whether there are none now."""
        return not self._items

    def _is_ready(self) -> bool:
        return len(self._items) > len(self._line.granted)


def _keep() -> None:
    """Give nothing back: an interrupt in the instant after an item was moved leaves it where it is."""


def _wait_of(
    block: bool, timeout: float | None, token: CancellationToken | None
) -> tuple[CancellationToken, float | None]:
    """What a call listens to, and when it ends, if it waits."""
    if block and isinstance(timeout, int | float) and timeout < 0:
        raise ValueError("'timeout' must be a non-negative number")
    return waiting_token(token), end_of(timeout) if block else None
