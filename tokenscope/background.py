"""Work that outlives the request on purpose: audit lines, billing, cache warming."""

from __future__ import annotations

import contextlib
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tokenscope._core import _primitives, ambient, clock, events
from tokenscope._core.crew import Crew
from tokenscope._core.errors import ScopeClosed, TokenScopeError
from tokenscope._core.reasons import CancelKind
from tokenscope._core.task import Task, refuse_as_work
from tokenscope._core.token import CancellationToken

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BackgroundFull", "BackgroundScope"]

T = TypeVar("T")


class BackgroundFull(TokenScopeError):
    """The background scope has as much work waiting as it may hold; nothing was taken."""


class BackgroundScope:
    """Owns work that is not the request's. Make one per process and close it at shutdown.

    Context variables are copied into each task, the request's token and scope are not: a hang-up does not reach it. A
    failing task is logged and told as an event; it stops nobody else. Thread-safe. Also a context manager, which
    closes it.

    Args:
        capacity: Tasks that may wait for a thread; one more is refused.
        max_threads: Tasks that run at a time.
        drain_timeout: Seconds that `close` waits for all of them before it cancels with ``shutdown``.

    Raises:
        ValueError, TypeError: A bad argument.
    """

    def __init__(
        self, *, capacity: int = 1000, max_threads: int = 4, drain_timeout: float = 10.0, name: str = "background"
    ) -> None:
        for what, number in (("capacity", capacity), ("max_threads", max_threads)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{what} must be an int, not {number!r}")
            if number < 1:
                raise ValueError(f"{what} must be 1 or more, not {number!r}")
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        self.name = name
        self.capacity = capacity
        self._drain_timeout = clock.validate_timeout(drain_timeout, "drain_timeout")
        self._grace = 5.0
        self.token = CancellationToken(name=name)
        self._crew = Crew(self, name, self.token, max_threads, 30.0, self._tell_failure)
        self._gate = _primitives.Room()  # one spawn at a time: counting and taking in are one step
        self._closing = False

    @property
    def scope(self) -> Self:
        """Itself."""
        return self

    def spawn(
        self, fn: Callable[..., T], /, *args: Any, name: str | None = None, kind: str | None = None, **kwargs: Any
    ) -> Task[T]:
        """Run ``fn(*args, **kwargs)`` on a thread of this scope.

        Never blocks, and is no checkpoint of the caller's token.

        Raises:
            BackgroundFull: ``capacity`` tasks are waiting.
            ScopeClosed: It was closed, or its token was cancelled.
            TypeError: ``fn`` is not callable, or ``async``.
        """
        refuse_as_work("spawn()", fn)
        with self._gate.enter():
            if self._closing or self.token.cancelled:
                how = "closed" if self._closing else "cancelled"
                raise ScopeClosed(f"scope {self.name!r} was {how} and takes no more work", self.token.reason)
            if len(self._crew.ready) >= self.capacity:
                raise BackgroundFull(f"{self.capacity} tasks are waiting in scope {self.name!r}; nothing was taken")
            task: Task[T] = copy_context().run(self._make, fn, args, kwargs, name, kind)
            self._crew.admit(task)
        return task

    def _make(self, fn: Callable[..., T], args: Any, kwargs: Any, name: str | None, kind: str | None) -> Task[T]:
        ambient.token_var.set(None)
        ambient.owner_var.set(None)
        return Task(self._crew, fn, args, kwargs, name, kind)

    def _tell_failure(self, task: Task[Any], error: BaseException) -> None:
        task.tell_failure(self.name, error)
        self._crew.failures.clear()  # told; a scope that never ends must not collect

    def close(self) -> bool:
        """Take no more work and wait for what there is; after ``drain_timeout`` seconds cancel it with ``shutdown``.

        What is cut is told by name, as the event `BackgroundCut` and in the log.

        Returns:
            True if everything ended by itself. Idempotent; not a checkpoint.

        Raises:
            RuntimeError: The caller is one of its tasks, and would wait for itself.
        """
        self._crew.refuse_own_child("close()")
        with self._gate.enter():  # whoever spawns at this moment is in before, or refused
            self._closing = True
        drained = self._wait(self._drain_timeout)
        if not drained:
            self._cut()
            if not self._wait(self._grace):
                self._give_up()
        self._crew.close_if_idle()
        return drained

    def _cut(self) -> None:
        """Cancel what is left, and tell what that is: it was promised to outlive its request."""
        left = [(task.name, task.state) for task in self._crew.lingering()]  # one look: a task may start meanwhile
        running = tuple(name for name, state in left if state != "queued")
        waiting = tuple(name for name, state in left if state == "queued")
        if self.token.cancel("the background scope was closed", kind=CancelKind.SHUTDOWN) and left:
            events.emit(events.BackgroundCut(self.name, running, waiting))

    def _wait(self, seconds: float | None) -> bool:
        end = clock.deadline_after(seconds)
        while not self._crew.idle():
            left = None if end is None else end - clock.now()
            if left is not None and left <= 0:
                return False
            waiter = _primitives.Waiter()
            self._crew.add_joiner(waiter)
            with contextlib.ExitStack() as stack:
                stack.callback(self._crew.remove_joiner, waiter)
                if not self._crew.idle():
                    waiter.wait(left)
        return True

    def _give_up(self) -> None:
        stacks = self._crew.abandon()
        if stacks:
            events.emit(events.Orphaned(self.name, stacks))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BackgroundScope {self.name}, {len(self._crew.live)} tasks{', closed' if self._closing else ''}>"
