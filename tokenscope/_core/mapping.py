"""`ThreadScope.map`: one function over many items, lazily, a bounded number at a time."""

from __future__ import annotations

import functools
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from tokenscope._core import _primitives, workers
from tokenscope._core.current import current_token
from tokenscope._core.errors import TaskCancelled
from tokenscope._core.reasons import CancelKind
from tokenscope._core.token import attach, detach

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenscope._core.task import Task

__all__ = ["ScopeMap"]

T = TypeVar("T")


class ScopeMap(Generic[T]):
    """An iterator over results, and a context manager. Made by `ThreadScope.map`; to be used by one thread.

    It pulls an item from its source only when fewer than ``limit`` results are outstanding. Left unfinished it is
    cancelled with ``scope_ended``, joined, and its source closed: on `close`, on leaving its ``with``, at the latest
    at the end of the scope. Being garbage collected only cancels.
    """

    def __init__(
        self, spawn: Callable[[Any], Task[T]], source: Iterator[Any], *, limit: int, ordered: bool
    ) -> None:
        self._spawn = spawn
        self._source = source
        self._limit = limit
        self._ordered = ordered
        self._tasks: deque[Task[T]] = deque()
        self._exhausted = False
        self._source_error: BaseException | None = None  # told in its turn: see `__next__`
        self._closed = False
        self._source_closed = False
        self._cut_off = False  # one-way: the scope was left before the end of the map

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        """The next result. After an item that failed it goes on with the others.

        A result that is there is handed out; what is not yet there is waited for, a checkpoint.

        Raises:
            Cancelled: The caller is cancelled, and the next result was not there.
            TaskCancelled: This item was cancelled alone; or the scope was left before the map was finished.
            BaseException: What the function raised for this item; or what the source raised when it was pulled: in its
                turn, after the results of the items before it; unordered, as soon as no result is there.
        """
        if self._cut_off:
            raise TaskCancelled("the scope was left before its map was finished")
        caller = current_token()
        task = self._at_hand()
        if task is None:
            caller.check()
        if not caller.cancelled:
            self._fill()
        errors_turn = not self._tasks if self._ordered else task is None
        if self._source_error is not None and errors_turn:
            error, self._source_error = self._source_error, None
            raise error
        if not self._tasks:
            self.close()
            raise StopIteration
        task = task or (self._tasks[0] if self._ordered else self._first_done())
        try:
            return task.result()
        finally:
            if task.done():  # also one that failed: the others can still be had
                _primitives.discard(self._tasks, task)

    def _at_hand(self) -> Task[T] | None:
        """The task to hand out next, if it has a result already."""
        candidates = tuple(self._tasks)[: 1 if self._ordered else None]
        return next((task for task in candidates if task.done() and not task.cancelled()), None)

    def _fill(self) -> None:
        while not self._exhausted and not self._closed and len(self._tasks) < self._limit:
            try:
                item = next(self._source)
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:
                self._exhausted, self._source_error = True, error
                return
            self._tasks.append(self._spawn(item))

    def _first_done(self) -> Task[T]:
        """Wait until one is done (or the caller is cancelled: then any will do, its result() tells)."""
        waiter = _primitives.Waiter()
        for task in self._tasks:
            task._watchers.append(waiter)
        caller = current_token()
        try:
            if attach(caller, waiter) and not any(task.done() for task in self._tasks):
                waiter.wait(caller.remaining())
        finally:
            detach(caller, waiter)
            for task in self._tasks:
                _primitives.discard(task._watchers, waiter)
        return next((task for task in self._tasks if task.done()), self._tasks[0])

    def cancel(self) -> None:
        """Cancel what is in flight; pull no more."""
        self._closed = True
        for task in self._tasks.copy():  # another thread may be taking from it
            task.cancel("the map was left before its end", kind=CancelKind.SCOPE_ENDED)

    def cut_off(self) -> None:
        """Its scope is being left: cancel it, and have a consumer that still asks told so, not a false end."""
        at_its_end = self._exhausted and not self._tasks
        self._cut_off = self._cut_off or not (self._closed or at_its_end)
        self.cancel()

    def close(self) -> None:
        """Cancel what is in flight, wait until it has ended, close the source. Idempotent."""
        self.cancel()
        while self._tasks:
            self._wait_quietly(self._tasks[0])
            self._tasks.popleft()
        self.close_source()

    def close_source(self) -> None:
        """Close the source if it can be, and if no abandoned child is stuck in it."""
        if self._source_closed or getattr(self._source, "gi_running", False):
            return
        self._source_closed = self._exhausted = True
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def _wait_quietly(self, task: Task[T]) -> None:
        """Wait for the end itself, not for the caller's cancel: what is left must not run on."""
        waiter = _primitives.Waiter()
        task._watchers.append(waiter)
        if not task.done():
            waiter.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A finalizer may run in the middle of anything, so it takes no lock of a tree: a worker does it.
        unfinished = [task for task in getattr(self, "_tasks", ()) if not task.done()]
        if unfinished:
            workers.submit_from_finalizer(functools.partial(_cancel_all, unfinished))


def _cancel_all(tasks: list[Task[Any]]) -> None:
    for task in tasks:
        task.cancel("the map was dropped before its end", kind=CancelKind.SCOPE_ENDED)
