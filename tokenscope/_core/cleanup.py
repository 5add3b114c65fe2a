"""Cleanups: run once each, newest first, all even if some fail, out of reach of every cancel, within one time limit."""

from __future__ import annotations

import functools
import sys
import traceback
from typing import TYPE_CHECKING, Any

from tokenscope._core import events
from tokenscope._core._primitives import discard, get_ident
from tokenscope._core.current import uninterruptible
from tokenscope._core.errors import Cancelled, DeadlineExceeded, TaskCancelled

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from tokenscope._core.token import CancellationToken

__all__ = ["CleanupStack", "stack_of"]


class Cleanup:
    """One thing to do at the end.

    Like a registration, it is taken and called in one step, with no line of ours in between.
    """

    __slots__ = ("name", "once", "wants_outcome")

    def __init__(self, name: str, call: Callable[..., object], *, wants_outcome: bool) -> None:
        self.name = name
        self.wants_outcome = wants_outcome
        self.once: dict[None, Callable[..., object]] = {None: call}

    def run(self, outcome: BaseException | None) -> None:
        details: tuple[object, ...] = ()
        if self.wants_outcome:
            details = (None,) * 3 if outcome is None else (type(outcome), outcome, outcome.__traceback__)
        self.once.pop(None, _nothing)(*details)


def _nothing(*_: object) -> None:
    """In place of a cleanup that ran already."""


class CleanupStack:
    """What an owner (a scope or a task) has to clean up. Pushed by the owner's threads, run by the last of them."""

    __slots__ = ("errors", "items", "overran", "owner", "running", "shield")

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.items: list[Cleanup] = []
        self.running: Cleanup | None = None
        self.overran: Cleanup | None = None  # the one that ran when the time was up, once it has ended
        self.errors: list[BaseException] = []  # what they raised; here, so that an interrupt loses none
        self.shield: uninterruptible | None = None  # what they run under

    def push(self, fn: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a plain function.

        Raises:
            TypeError: It is not callable.
        """
        if not callable(fn):
            raise TypeError(f"defer() takes a callable, not {fn!r}")
        call = functools.partial(fn, *args, **kwargs)
        self.items.append(Cleanup(_name_of(fn), call, wants_outcome=False))

    def enter(self, manager: AbstractContextManager[Any]) -> Any:
        """Enter a context manager now, leave it with the others; it receives the owner's outcome as its exception.

        What its ``__exit__`` returns is not listened to: a scope's failures are not swallowed by one resource.

        Raises:
            TypeError: It is no context manager.
        """
        kind = type(manager)
        if not (hasattr(kind, "__enter__") and hasattr(kind, "__exit__")):
            raise TypeError(f"enter_context() takes a context manager, not {manager!r}")
        leave = manager.__exit__
        value = manager.__enter__()
        self.items.append(Cleanup(_name_of(kind), leave, wants_outcome=True))
        return value

    def run(self, outcome: BaseException | None, timeout: float | None) -> list[BaseException]:
        """Run what is left, newest first, with ``timeout`` seconds for all; returns what they raised.

        After that time the rest still run, with a cancelled token, and the one that overran is told with its stack.
        Cut off by an interrupt it may be called again; each cleanup is called once.
        """
        self._leave_shield()
        if self.items:
            self.shield = uninterruptible(timeout)
            try:
                with self.shield as token, token.on_cancel(self._tell_overrun, get_ident()):
                    while self.items:
                        self._run_last(outcome, token)
            except DeadlineExceeded as late:
                self._note_overrun(late)
        return self.errors

    def _leave_shield(self) -> None:
        """Put back what was ambient, where an interrupt kept the last run from doing so."""
        if self.shield is None or self.shield._token is None:
            return
        try:
            self.shield.__exit__(None, None, None)
        except DeadlineExceeded as late:
            self._note_overrun(late)
        self.shield = None

    def _run_last(self, outcome: BaseException | None, token: CancellationToken) -> None:
        cleanup = self.running = self.items[-1]
        try:
            cleanup.run(outcome)
        except BaseException as error:  # the others must still run; the owner raises it
            if cleanup.once:
                raise  # an interrupt, before it began
            self.errors.append(_as_failure(error, token, cleanup.name))
            events.emit(events.CleanupFailed(self.owner, cleanup.name, error))
        if self.overran is None and token.cancelled:
            self.overran = cleanup
        discard(self.items, cleanup)  # it may have deferred something itself, so it need not be the last any more

    def _note_overrun(self, late: DeadlineExceeded) -> None:
        """The time was up and some cleanup was cut short by that: told once, also if it swallowed the `Cancelled`."""
        if not any(isinstance(error, DeadlineExceeded) and error.reason is late.reason for error in self.errors):
            self.errors.append(late)

    def _tell_overrun(self, ident: int) -> None:
        # On a worker, a moment after the time was up: the guilty one may have ended, and another one run.
        guilty = self.overran or self.running or self.items[-1]
        stack = stack_of(ident) if guilty is self.running else ""
        events.emit(events.CleanupOverran(self.owner, guilty.name, stack))


def _as_failure(error: BaseException, token: CancellationToken, name: str) -> BaseException:
    """A cleanup that was cut short has failed.

    A `Cancelled` of whatever token must not look like one of the owner's.
    """
    if not isinstance(error, Cancelled):
        return error
    failure: Exception = TaskCancelled(f"cleanup {name} met a cancel", error.reason)
    if token.reason is error.reason:
        failure = DeadlineExceeded(f"cleanup {name} was cut short: the time for cleanups was up", error.reason)
    failure.__cause__ = error
    return failure


def _name_of(fn: object) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def stack_of(ident: int | None) -> str:
    """The stack of a running thread, as text; empty if it is gone."""
    frame = sys._current_frames().get(ident) if ident is not None else None
    return "" if frame is None else "".join(traceback.format_stack(frame))
