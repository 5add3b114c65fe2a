"""One child of a scope: a future, a token, and the thread it borrows.

States::

    queued --(a thread takes it)--> running --(its token is cancelled)--> cancelling
       |                               |                                       |
       +--(its token is cancelled)-----+------------> done <-------------------+

``done`` is one of: succeeded, failed, cancelled. ``concurrent.futures``' own state stays PENDING until then (so that
the public methods of `Future` may be used to end it), and `Future.cancelled` is True only for a task that has ended
cancelled.

Invariants
    1. ``_call`` is taken once: by the thread that runs the task. A task cancelled before that never runs.
    2. The outcome is published before anybody is cancelled because of it, and before the scope counts the task as
       ended.
    3. `result` and `exception` never raise `Cancelled` for the task's sake, only for their caller's.
"""

from __future__ import annotations

import concurrent.futures
import inspect
import itertools
import threading
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from tokenscope._core import _primitives, ambient, clock, events, workers
from tokenscope._core._typing import override
from tokenscope._core.cleanup import CleanupStack, stack_of
from tokenscope._core.current import current_token
from tokenscope._core.errors import Cancelled, ScopeClosed, TaskCancelled
from tokenscope._core.reasons import CancelKind
from tokenscope._core.token import attach, detach, expire_if_due, is_cut_of, mark_cut_short
from tokenscope._core.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.crew import Crew
    from tokenscope._core.token import Registration
    from tokenscope._core.tree import Cut, Wakeup

__all__ = ["Task", "refuse_as_work"]

T = TypeVar("T")
_numbers = itertools.count(1)

SUCCEEDED, FAILED, CANCELLED, NEVER_STARTED = "succeeded", "failed", "cancelled", "never_started"

# The words of `Future._state`. That attribute, `_result`, `_exception`, `_condition`, `_waiters` and `_done_callbacks`
# are what `concurrent.futures.wait` and asyncio themselves use of foreign futures; they have not changed since Python
# 3.2.
_PENDING, _CANCELLED, _CANCELLED_AND_TOLD, _FINISHED = "PENDING", "CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED"
_ENDED = frozenset((_CANCELLED, _CANCELLED_AND_TOLD, _FINISHED))


_ASYNC = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def refuse_as_work(who: str, fn: object) -> None:
    """Raise for what a thread cannot run.

    Raises:
        TypeError: ``fn`` is not callable, or an ``async`` function, which would return a coroutine that nobody runs.
    """
    if not callable(fn):
        raise TypeError(f"{who} takes a callable, not {fn!r}")
    code = getattr(fn, "__code__", None)
    if code is not None and code.co_flags & _ASYNC:
        raise TypeError(f"{who} runs plain functions in threads, and {fn!r} is async: give it a function that runs it")


class Task(concurrent.futures.Future[T], Generic[T]):
    """A piece of work that a scope owns.

    Works with ``concurrent.futures.wait``, ``as_completed`` and ``asyncio.wrap_future``.

    Made by `ThreadScope.spawn`. Thread-safe.

    Attributes:
        name: For logs, errors and the thread's name while it runs.
        kind: A word of the application's (``llm``, ``tool`` ...), or None.
        token: Cancelled when the task should stop.
    """

    # Instead of `Future.__init__`, which makes a Condition: that costs as much as all the rest of a trivial task, and
    # most are never waited for one by one. It is made when somebody asks for it (`_condition`).
    _state: str = _PENDING
    _result: Any = None
    _exception: BaseException | None = None
    _made: threading.Condition | None = None  # the condition; set once, under the crew's lock

    _cleanups: CleanupStack | None = None
    _ident: int | None = None  # the thread that runs it; None before and after
    _started: float | None = None  # monotonic; written once, by that thread
    _stopped: float | None = None  # the end of its own code, before cleanups; likewise
    _end: tuple[str, Any] | None = None  # how it ended; written once, before it is published
    _told: BaseException | None = None  # the failure, if it is nothing but cleanups', each of which was told
    _queued: Registration | None = None  # ends it at the moment of a cancel while it waits under `max_threads`
    _label: str | None = None  # what it is called among stragglers, if it ever was one; see `Crew.label`
    _window: Window | None = None  # by which it may be interrupted, if its scope says so; made by its thread
    _counted = False  # by the crew, under its lock
    _released = False  # by the crew, under its lock: ended, and there is nobody to be told

    def __init__(
        self,
        crew: Crew,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None,
        kind: str | None,
    ) -> None:
        if name is None:
            name = f"{getattr(fn, '__qualname__', 'task')}-{next(_numbers)}"
            self.token = crew.token.child()
            self.token._name = name  # this one needs no checking
        else:
            self.token = crew.token.child(name=name)
        if kind is not None and not isinstance(kind, str):
            raise TypeError(f"kind must be a str or None, not {kind!r}")
        self.name = name
        self.kind = kind
        self._crew = crew
        self._call: list[tuple[Callable[..., T], tuple[Any, ...], dict[str, Any]]] = [(fn, args, kwargs)]
        self._context: Context | None = copy_context()
        self._watchers: list[Wakeup] = []

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]  # a plain attribute in Future
        if self._made is None and not self._crew.run(self._make_condition_locked):
            self._make_condition_locked()  # put off: this very thread is inside the lock, so nobody else is
        return cast("threading.Condition", self._made)

    def _make_condition_locked(self) -> None:
        if self._made is None:
            self._waiters: list[Any] = []
            self._done_callbacks: list[Any] = []
            self._made = threading.Condition()

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
    def done(self) -> bool:
        return self._state in _ENDED

    @override
    def cancelled(self) -> bool:
        return self._state in _ENDED and self._state != _FINISHED

    @override
    def running(self) -> bool:
        return self._started is not None and not self.done()

    @override
    def cancel(
        self,
        message: str = "",
        *,
        kind: str = CancelKind.MANUAL,
        tag: str | None = None,
        cause: BaseException | None = None,
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
        if self._exception is not None:
            try:
                raise self._exception
            finally:
                del self  # the error's frames would keep the task, and the task the error
        value: T = self._result
        return value

    @override
    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the task and return what it raised, or None. A checkpoint of the caller; raises like `result`."""
        self._await_end(timeout)
        return self._exception

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
        if self._ident == _primitives.get_ident():
            raise RuntimeError(f"task {self.name!r} would wait for itself")
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
            ScopeClosed: The task has not begun or has ended: nobody would run it.
        """
        if self._started is None or self._end is not None:
            raise ScopeClosed(f"defer() into task {self.name!r}, which is {self.state}")
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
        try:
            call = self._call.pop()
        except IndexError:
            return  # it ended while it was queued
        self._ident = _primitives.get_ident()
        threading.current_thread().name = self.name
        context = cast("Context", self._context)
        self._end = context.run(self._run, *call)
        del call, context
        self._context = None  # in it this task is the current owner: a cycle that only the garbage collector would end
        if workers._hooks:
            workers.release_thread()
        self._ident = None
        self._crew.ended(self)

    def _run(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        ambient.token_var.set(self.token)
        ambient.owner_var.set(self)
        cut = self.token._cut
        if cut is not None:
            mark_cut_short(self.token, cut)
            return NEVER_STARTED, None
        self._started = clock.now()
        try:
            end: tuple[str, Any] = SUCCEEDED, self._call_it(fn, args, kwargs)
        except BaseException as error:  # it belongs to the scope, which raises it
            end = self._judge(error)
        self._stopped = clock.now()
        if self._window is not None and self._window.landed:
            self._tell_interrupted(end[0])
        if self._cleanups is not None:
            end = self._clean_up(end)
        return end

    def _call_it(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        if not self._crew.interruptible:
            return fn(*args, **kwargs)
        window = self._window = Window()
        return window.call(fn, args, kwargs)

    def _tell_interrupted(self, how: str) -> None:
        cut = self.token._cut
        window = cast("Window", self._window)
        if cut is not None:
            mark_cut_short(self.token, cut)
        events.emit(events.TaskInterrupted(self._crew.name, self.name, window.landed - (how == CANCELLED)))

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
        errors = [*([] if outcome is None else [outcome]), *errors]
        name = f"task {self.name!r} and its cleanups failed"
        failure = errors[0] if len(errors) == 1 else BaseExceptionGroup(name, errors)
        self._told = failure if outcome is None else None
        return FAILED, failure

    def tell_failure(self, scope: str, error: BaseException) -> None:
        """Emit its failure, where nobody is told by an exception. What a cleanup raised was told when it did."""
        if error is not self._told:
            events.emit(events.TaskFailed(scope, self.name, error))

    # --- ending: on whichever thread comes first; may be done twice ---------------------------------------------

    def end_unstarted(self) -> None:
        """End a task that no thread has taken; nothing if one has."""
        # On one line: an interrupt between taking the call and saying so would leave the task in neither state.
        try:
            self._end = self._end or (self._call.pop(), (NEVER_STARTED, None))[1]
        except IndexError:
            pass  # one has
        cut = self.token._cut
        if cut is not None:
            mark_cut_short(self.token, cut)
        if self._end is not None:
            self._crew.ended(self)

    def publish_locked(self) -> bool:
        """Publish the outcome under the crew's lock; False if somebody waits for it and must be told outside of it."""
        if self._made is not None or self._end is None:
            return False
        word, value = self._end
        if word == SUCCEEDED:
            self._result = value
            self._state = _FINISHED
        elif word == FAILED:
            self._exception = value
            self._state = _FINISHED
        else:
            self._state = _CANCELLED_AND_TOLD
        return True

    def publish(self) -> None:
        """Publish the outcome to whoever waits. No lock is held; a user's done-callbacks run here."""
        try:
            if not self.done() and self._end is not None:
                self._publish_once(*self._end)
        finally:  # also if a done-callback calls sys.exit()
            with self._condition: self._tell_locked()

    def _tell_locked(self) -> None:
        """Tell `concurrent.futures.wait` of a cancelled task, once: two threads may be ending it."""
        if self._state == _CANCELLED:
            super().set_running_or_notify_cancel()

    def _publish_once(self, word: str, value: Any) -> None:
        if word == SUCCEEDED:
            super().set_result(value)
        elif word == FAILED:
            super().set_exception(value)
        else:
            super().cancel()

    def wake_watchers(self) -> None:
        """Wake those who block in `result`; the outcome is published."""
        for waiter in tuple(self._watchers):
            waiter.wake()


def _without_own_cancels(error: BaseException, cut: Cut | None) -> BaseException:
    """A group that mixes failures with cancels of the task's own: the failures."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    _cancels, rest = error.split(lambda inner: is_cut_of(inner, cut))
    return error if rest is None else rest
