"""What is current here: the ambient token and owner, and the boundaries that change them for a while.

Outside of any scope `current_token` is a constant that is never cancelled. An explicit token is always *added to* the
current one, never put in its place; to leave the owner on purpose there is `shield` (and ``BackgroundScope``).
"""

from __future__ import annotations

import functools
import threading
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from tokenscope._core import ambient, clock
from tokenscope._core._typing import override
from tokenscope._core.errors import Cancelled
from tokenscope._core.token import (
    NEVER,
    CancellationToken,
    become_boundary,
    check_name,
    is_cut_of,
    joined,
    retire,
    settle_boundary,
)
from tokenscope._core.window import hold_here

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from tokenscope._core.window import Window

__all__ = [
    "Boundary",
    "bind",
    "check",
    "current_scope",
    "current_token",
    "defer",
    "effective_token",
    "fail_after",
    "move_on_after",
    "shield",
    "sleep",
    "standing_back",
    "uninterruptible",
    "use_token",
]

P = ParamSpec("P")
T = TypeVar("T")

_get = ambient.token_var.get


def current_token() -> CancellationToken:
    """The token this code runs under; outside of any scope a constant that is never cancelled."""
    token: CancellationToken | None = _get()
    return NEVER if token is None else token


def check() -> None:
    """A checkpoint: return at once, or raise if the current token is cancelled.

    Raises:
        Cancelled: The work of this thread is no longer wanted.
    """
    token = _get()
    if token is not None:
        token.check()


def sleep(seconds: float) -> None:
    """Sleep, unless the current token is cancelled first. A checkpoint even for 0 seconds.

    Raises:
        Cancelled: The work of this thread is, or was meanwhile, cancelled.
        ValueError, TypeError: ``seconds`` is not a length of time.
    """
    current_token().sleep(seconds)


def current_scope() -> Any:
    """The `ThreadScope` that owns this code: the one whose body or child this is.

    Raises:
        LookupError: There is none.
    """
    return _owner("current_scope()").scope


def defer(fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
    """Have ``fn(*args, **kwargs)`` called when the current task (in a scope's body: the scope) ends, newest first.

    Raises:
        LookupError: There is neither a task nor a scope here.
        TypeError: ``fn`` is not callable.
    """
    _owner("defer()").defer(fn, *args, **kwargs)


def _owner(what: str) -> Any:
    owner = ambient.owner_var.get()
    if owner is None:
        raise LookupError(
            f"{what} needs a scope, and there is none here. Open one with `with ThreadScope() as scope:`;"
            " in a thread you started yourself, wrap its target with tokenscope.bind() so that it inherits yours"
        )
    return owner


def effective_token(explicit: CancellationToken | None) -> CancellationToken:
    """What to run under: the current token, together with ``explicit`` if one was given.

    Raises:
        TypeError: ``explicit`` is not a token.
    """
    if explicit is None:
        return current_token()
    _check_token(explicit)
    return joined(_get(), explicit)


def _check_token(token: object) -> None:
    if not isinstance(token, CancellationToken):
        raise TypeError(f"token must be a CancellationToken, not {token!r}")


class Boundary:
    """A token that is current inside a ``with``, and whose end becomes an outcome there. Use once.

    Yields the token. Its own cancel is absorbed; its own deadline becomes `DeadlineExceeded`, or is absorbed too
    (``move_on``); then ``token.cancelled_caught`` is True.
    """

    def __init__(self, make: Callable[[], CancellationToken], *, move_on: bool = False) -> None:
        self._make = make
        self._move_on = move_on
        self._token: CancellationToken | None = None
        self._before: object = None

    def __enter__(self) -> CancellationToken:
        if self._token is not None:
            raise RuntimeError("this boundary was entered before; make a new one each time")
        token = self._token = self._make()
        become_boundary(token)
        self._before = _get()
        ambient.token_var.set(token)
        return token

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._token is None:
            raise RuntimeError("this boundary was left without having been entered")
        ambient.put_back(ambient.token_var, self._token, self._before)
        retire(self._token)
        return settle_boundary(self._token, error, move_on=self._move_on)


def fail_after(seconds: float, *, name: str | None = None) -> Boundary:
    """Limit the body of a ``with`` statement to so many seconds. Yields the token.

    Raises:
        DeadlineExceeded: On leaving, if the time ran out and cut work short.
        ValueError, TypeError: ``seconds`` is not a length of time; ``name`` is no str.
    """
    return _limit(seconds, name, move_on=False)


def move_on_after(seconds: float, *, name: str | None = None) -> Boundary:
    """Like `fail_after`, but goes on after the block; look at ``token.cancelled_caught``.

    Raises:
        ValueError, TypeError: ``seconds`` is not a length of time; ``name`` is no str.
    """
    return _limit(seconds, name, move_on=True)


def _limit(seconds: float, name: str | None, *, move_on: bool) -> Boundary:
    timeout = clock.validate_timeout(seconds, "seconds")
    check_name(name)  # here, and not when the block is entered
    return Boundary(lambda: current_token().child(timeout=timeout, name=name), move_on=move_on)


class Shield(Boundary):
    """A boundary under a token of its own, out of reach of what is cancelled around it, and of interrupts."""

    def __init__(self, timeout: float | None, name: str, *, move_on: bool = False) -> None:
        super().__init__(lambda: CancellationToken(timeout=timeout, name=name), move_on=move_on)
        self._window: Window | None = None

    @override
    def __enter__(self) -> CancellationToken:
        self._window = hold_here(self)
        try:
            return super().__enter__()
        except BaseException:
            self._let_go()
            raise

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            return super().__exit__(kind, error, trace)
        finally:
            self._let_go()  # last: an interrupt that was put off is raised here

    def _let_go(self) -> None:
        if self._window is not None:
            self._window.let_go(self)


def shield(timeout: float | None = 30.0) -> Boundary:
    """Keep cancels from the body of a ``with`` statement, which has ``timeout`` seconds of its own.

    Yields the shield's token. After the block the next checkpoint raises what was held off. Nor is the body interrupted
    (``on_straggler="interrupt"``).

    Raises:
        DeadlineExceeded: On leaving, if the shield's own time ran out and cut work short.
        ValueError, TypeError: A bad ``timeout``.
    """
    seconds = clock.validate_timeout(timeout)
    return Shield(seconds, "shield")


class use_token:  # noqa: N801  # reads as a statement: `with use_token(token):`
    """``with use_token(token):`` makes ``token`` current, together with the one that was. Not a boundary.

    Raises:
        TypeError: ``token`` is not a token.
    """

    def __init__(self, token: CancellationToken) -> None:
        _check_token(token)
        self._token = token
        self._entries: list[tuple[CancellationToken, object]] = []

    def __enter__(self) -> CancellationToken:
        before = _get()
        mine = joined(before, self._token)
        self._entries.append((mine, before))
        ambient.token_var.set(mine)
        return mine

    def __exit__(self, *_: object) -> None:
        ambient.put_back(ambient.token_var, *self._entries.pop(), once=False)


def bind(fn: Callable[P, T], token: CancellationToken | None = None) -> Callable[P, T | None]:
    """Wrap ``fn`` as the target of a bare ``threading.Thread``: it runs in a copy of this context, under this token.

    A ``Cancelled`` of that token ends the thread quietly (the wrapper returns None); any other passes.

    Raises:
        TypeError: ``fn`` is not callable, or ``token`` is not a token.
    """
    if not callable(fn):
        raise TypeError(f"bind() takes a callable, not {fn!r}")
    mine = effective_token(token)
    context = copy_context()

    def under_token(args: tuple[Any, ...], kwargs: dict[str, Any]) -> T | None:
        if mine is not NEVER:
            ambient.token_var.set(mine)
        try:
            return fn(*args, **kwargs)
        except Cancelled as error:
            if not is_cut_of(error, mine._cut):
                raise
            return None

    @functools.wraps(fn)
    def bound(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return context.copy().run(under_token, args, kwargs)

    return bound


_here = threading.local()  # .active: the `uninterruptible` blocks that this thread is in


def standing_back() -> bool:
    """Whether this thread must not be interrupted now (a commit, a cleanup): guards do not attach."""
    return bool(getattr(_here, "active", None))


class uninterruptible(Shield):  # noqa: N801  # reads as a statement
    """A shield that guards respect too. For commits and cleanups."""

    def __init__(self, timeout: float | None = None, *, move_on: bool = False) -> None:
        seconds = clock.validate_timeout(timeout)
        super().__init__(seconds, "uninterruptible", move_on=move_on)
        self._active: set[uninterruptible] = set()  # of the thread that entered it; another one may leave it

    @override
    def __enter__(self) -> CancellationToken:
        if not hasattr(_here, "active"):
            _here.active = set()
        self._active = _here.active
        token = super().__enter__()
        self._active.add(self)
        return token

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._active.discard(self)
        return super().__exit__(kind, error, trace)
