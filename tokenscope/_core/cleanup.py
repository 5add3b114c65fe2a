"""Cleanups: run once each, newest first, all even if some fail, out of reach of every cancel, within one time limit."""

from __future__ import annotations

import functools
import sys
import traceback
from typing import TYPE_CHECKING, Any

from tokenscope._core import events
from tokenscope._core._primitives import get_ident
from tokenscope._core.current import uninterruptible
from tokenscope._core.errors import Cancelled, DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from tokenscope._core.token import CancellationToken

__all__ = ["CleanupStack", "stack_of"]


class Cleanup:
    """One thing to do at the end. Like a registration, it is taken and called in one step."""

    __slots__ = ("name", "once")

    def __init__(self, name: str, call: Callable[[BaseException | None], object]) -> None:
        self.name = name
        self.once: dict[None, Callable[[BaseException | None], object]] = {None: call}

    def run(self, outcome: BaseException | None) -> None:
        self.once.pop(None, _nothing)(outcome)


def _nothing(_outcome: BaseException | None) -> None:
    """In place of a cleanup that ran already."""


class CleanupStack:
    """What an owner (a scope or a task) has to clean up. Pushed by the owner's threads, run once by the last of them."""

    __slots__ = ("errors", "items", "owner")

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.errors: list[BaseException] = []  # here, so that an interrupt in the middle of `run` loses none
        self.items: list[Cleanup] = []

    def push(self, fn: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a plain function.

        Raises:
            TypeError: It is not callable.
        """
        if not callable(fn):
            raise TypeError(f"defer() takes a callable, not {fn!r}")
        call = functools.partial(fn, *args, **kwargs)
        self.items.append(Cleanup(_name_of(fn), lambda _outcome: call()))

    def enter(self, manager: AbstractContextManager[Any]) -> Any:
        """Enter a context manager now, leave it with the others; it receives the owner's outcome as its exception.

        What its ``__exit__`` returns is not listened to: a scope's failures are not swallowed by one resource.

        Raises:
            TypeError: It is no context manager.
        """
        kind = type(manager)
        if not (hasattr(kind, "__enter__") and hasattr(kind, "__exit__")):
            raise TypeError(f"enter_context() takes a context manager, not {manager!r}")
        value = manager.__enter__()
        self.items.append(Cleanup(_name_of(kind), functools.partial(_leave, manager)))
        return value

    def run(self, outcome: BaseException | None, timeout: float | None) -> list[BaseException]:
        """Run what is left, newest first, with ``timeout`` seconds for all; returns what they raised.

        After that time the rest still run, with a cancelled token, and the one that overran is told with its stack.
        """
        if not self.items:
            return self.errors
        shielded = uninterruptible(timeout, move_on=True)
        with shielded as token, token.on_cancel(self._tell_overrun, get_ident()):
            while self.items:
                self._run_last(outcome, token)
        return self.errors

    def _run_last(self, outcome: BaseException | None, token: CancellationToken) -> None:
        cleanup = self.items[-1]
        try:
            cleanup.run(outcome)
        except BaseException as error:  # the others must still run; the owner raises it
            self.errors.append(_as_failure(error, token, cleanup.name))
            events.emit(events.CleanupFailed(self.owner, cleanup.name, error))
        if cleanup in self.items:  # it may have deferred something itself, so it need not be the last any more
            self.items.remove(cleanup)

    def _tell_overrun(self, ident: int) -> None:
        name = self.items[-1].name if self.items else "?"
        events.emit(events.CleanupOverran(self.owner, name, stack_of(ident)))


def _as_failure(error: BaseException, token: CancellationToken, name: str) -> BaseException:
    """A cleanup cut by the limit of all cleanups failed for that reason."""
    if not isinstance(error, Cancelled) or token.reason is not error.reason:
        return error
    failure = DeadlineExceeded(f"cleanup {name} was cut short: the time for cleanups was up", error.reason)
    failure.__cause__ = error
    return failure


def _leave(manager: AbstractContextManager[Any], outcome: BaseException | None) -> None:
    if outcome is None:
        manager.__exit__(None, None, None)
    else:
        manager.__exit__(type(outcome), outcome, outcome.__traceback__)


def _name_of(fn: object) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def stack_of(ident: int | None) -> str:
    """The stack of a running thread, as text; empty if it is gone."""
    frame = sys._current_frames().get(ident) if ident is not None else None
    return "" if frame is None else "".join(traceback.format_stack(frame))
