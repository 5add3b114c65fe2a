"""One child of a scope: a future, a token, and the thread it borrows.

States::

    queued --(a thread takes it)--> running --(its token is cancelled)--> cancelling
       |                               |                                       |
       +--(its token is cancelled)-----+------------> done <-------------------+

``done`` is one of: succeeded, failed, cancelled. ``concurrent.futures``' own state stays PENDING until then (so that the public
methods of `Future` may be used to end it), and `Future.cancelled` is True only for a task that has ended cancelled.

Invariants
    1. ``_call`` is taken once: by the thread that runs the task. A task cancelled before that never runs.
    2. The outcome is published before anybody is cancelled because of it, and before the scope counts the task as ended.
    3. `result` and `exception` never raise `Cancelled` for the task's sake, only for their caller's.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from typing_extensions import override

from tokenscope._core import _primitives, ambient, clock, workers
from tokenscope._core.cleanup import CleanupStack, stack_of
from tokenscope._core.current import current_token
from tokenscope._core.errors import Cancelled, TaskCancelled
from tokenscope._core.reasons import CancelKind
from tokenscope._core.token import attach, detach, expire_if_due, is_cut_of, mark_cut_short

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.crew import Crew
    from tokenscope._core.tree import Cut

__all__ = ["Task"]

T = TypeVar("T")
_numbers = itertools.count(1)

SUCCEEDED, FAILED, CANCELLED, NEVER_STARTED = "succeeded", "failed", "cancelled", "never_started"


class Task(concurrent.futures.Future[T], Generic[T]):
    """A piece of work that a scope owns. Works with ``concurrent.futures.wait``, ``as_completed`` and ``asyncio.wrap_future``.

    Made by `ThreadScope.spawn`. Thread-safe.

    Attributes:
        name: For logs, errors and the thread's name while it runs.
        kind: A word of the application's (``llm``, ``tool`` ...), or None.
        token: Cancelled when the task should stop.
    """

    def __init__(
        self,
        crew: Crew,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None,
        kind: str | None,
    ) -> None:
        super().__init__()
        self.name = name if name is not None else f"{getattr(fn, '__qualname__', 'task')}-{next(_numbers)}"
        self.kind = kind
        self.token = crew.token.child(name=self.name)
        self._crew = crew
        self._call: dict[None, tuple[Callable[..., T], tuple[Any, ...], dict[str, Any]]] = {None: (fn, args, kwargs)}
        self._context = copy_context()
        self._cleanups: CleanupStack | None = None
        self._watchers: list[_primitives.Waiter] = []
        self._ident: int | None = None  # the thread that runs it; None before and after
        self._started: float | None = None  # monotonic; written once, by that thread
        self._stopped: float | None = None  # the end of its own code, before cleanups; likewise
        self._end: tuple[str, Any] | None = None  # how it ended; written once, before it is published
        self._told = False  # everybody who waited has been told

    @property
    def scope(self) -> Any:
        """The scope that owns it."""
        return self._crew.scope

    # --- asking -------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """``queued``, ``running``, ``cancelling`` or ``done``."""
        if self.done():
            return "done"
        if self._started is None:
            return "queued"
        return "cancelling" if self.token.cancelled else "running"

    @override
    def running(self) -> bool:
        return self._started is not None and not self.done()

    @override
    def cancel(
        self, message: str = "", *, kind: str = CancelKind.MANUAL, tag: str | None = None, cause: BaseException | None = None
    ) -> bool:
        """Cancel this task alone; its siblings go on. A queued task ends at once, a running one at its next checkpoint.

        Returns:
            True only for the call that won; False also for a task that is done.
        """
        if self.done():
            return False
        return self.token.cancel(message, kind=kind, tag=tag, cause=cause)

    @override
    def result(self, timeout: float | None = None) -> T:
        """Wait for the task and return what it returned. A checkpoint of the caller.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            Cancelled: The *caller* is cancelled (not if the task already succeeded or failed).
            TaskCancelled: The task ended cancelled.
            TimeoutError: It is not done in time; it goes on.
            BaseException: What the task raised.
        """
        self._await_end(timeout)
        return super().result(0)

    @override
    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the task and return what it raised, or None. A checkpoint of the caller; raises like `result`."""
        self._await_end(timeout)
        return super().exception(0)

    def _await_end(self, timeout: float | None) -> None:
        seconds = clock.validate_timeout(timeout)
        if not self.done():
            self._block(seconds)
        if self.done() and not self.cancelled():
            return
        current_token().check()
        if self.cancelled():
            raise TaskCancelled(f"task {self.name!r} was cancelled", self.token.reason)
        raise TimeoutError(f"task {self.name!r} is not done after {seconds} s")

    def _block(self, seconds: float | None) -> None:
        """Wait for the end of the task, the caller's cancel, or the time; register first, then look."""
        caller = current_token()
        waiter = _primitives.Waiter()
        self._watchers.append(waiter)
        try:
            if attach(caller, waiter) and not self.done():
                limits = [limit for limit in (seconds, caller.remaining()) if limit is not None]
                waiter.wait(min(limits, default=None))
        finally:
            detach(caller, waiter)
            _primitives.discard(self._watchers, waiter)
        expire_if_due(caller)

    def defer(self, fn: Callable[..., object], /, *args: Any, **kwargs: Any) -> None:
        """Have ``fn(*args, **kwargs)`` called on the task's own thread when it ends, newest first.

        Raises:
            TypeError: ``fn`` is not callable.
        """
        if self._cleanups is None:
            self._cleanups = CleanupStack(self.name)
        self._cleanups.push(fn, args, kwargs)

    def stack(self) -> str:
        """Where the task's thread stands now, as text; empty if it is not running."""
        return stack_of(self._ident)

    @override
    def __repr__(self) -> str:
        return f"<Task {self.name}, {self._end[0] if self._end and self.done() else self.state}>"

    # --- running: on a worker's thread --------------------------------------------------------------------------

    def work(self) -> None:
        """Run it, publish its outcome, tell the crew."""
        call = self._call.pop(None, None)
        if call is None:
            return  # it ended while it was queued
        self._ident = _primitives.get_ident()
        threading.current_thread().name = self.name
        self._end = self._context.run(self._run, *call)
        del call
        workers.release_thread()
        self._ident = None
        self.finish()

    def _run(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        ambient.token_var.set(self.token)
        ambient.owner_var.set(self)
        cut = self.token._cut
        if cut is not None:
            mark_cut_short(self.token, cut)
            return NEVER_STARTED, None
        self._started = clock.now()
        try:
            end: tuple[str, Any] = SUCCEEDED, fn(*args, **kwargs)
        except BaseException as error:  # it belongs to the scope, which raises it
            end = self._judge(error)
        self._stopped = clock.now()
        if self._cleanups is not None:
            end = self._clean_up(end)
        return end

    def _judge(self, error: BaseException) -> tuple[str, Any]:
        """Tell a cancel of its own from a failure. A foreign `Cancelled` must not reach whoever asks for the result."""
        cut = self.token._cut
        if is_cut_of(error, cut):
            return CANCELLED, None
        if isinstance(error, Cancelled):
            foreign = TaskCancelled(f"task {self.name!r} met a cancel that was not its own", error.reason)
            foreign.__cause__ = error
            return FAILED, foreign
        return FAILED, _without_own_cancels(error, cut)

    def _clean_up(self, end: tuple[str, Any]) -> tuple[str, Any]:
        outcome = end[1] if end[0] == FAILED else None
        errors = cast("CleanupStack", self._cleanups).run(outcome, self._crew.cleanup_timeout)
        if not errors:
            return end
        if outcome is not None:
            errors.insert(0, outcome)
        if len(errors) == 1:
            return FAILED, errors[0]
        return FAILED, BaseExceptionGroup(f"task {self.name!r} and its cleanups failed", errors)

    # --- ending: on whichever thread comes first; may be done twice ---------------------------------------------

    def end_unstarted(self) -> None:
        """End a task that no thread has taken; nothing if one has."""
        # On one line: an interrupt between taking the call and saying so would leave the task in neither state.
        self._end = self._end or (self._call.pop(None, None) and (NEVER_STARTED, None))
        cut = self.token._cut
        if cut is not None:
            mark_cut_short(self.token, cut)
        self.finish()

    def finish(self) -> None:
        """Publish the outcome, then tell the crew."""
        if self._end is not None:
            self._publish(*self._end)
            self._crew.ended(self)

    def _publish(self, word: str, value: Any) -> None:
        if not self.done():
            self._publish_once(word, value)
        if self.cancelled() and not self._told:
            self._told = True
            super().set_running_or_notify_cancel()
        for waiter in tuple(self._watchers):
            waiter.wake()

    def _publish_once(self, word: str, value: Any) -> None:
        if word == SUCCEEDED:
            super().set_result(value)
        elif word == FAILED:
            super().set_exception(value)
        else:
            super().cancel()


def _without_own_cancels(error: BaseException, cut: Cut | None) -> BaseException:
    """A group that mixes failures with cancels of the task's own: the failures."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    _cancels, rest = error.split(lambda inner: is_cut_of(inner, cut))
    return error if rest is None else rest
