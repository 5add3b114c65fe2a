"""The cancellation token: the handle that users hold. How a cancel travels is written down in ``tree.py``.

States: *live* -> *cancelled*, once and for ever; the first reason wins, and every descendant holds the same object.

Invariants
    1. `CancellationToken.check` takes no lock, walks nothing and reads no clock: it looks at one field.
    2. The flag and the clock never disagree for long: the timer cancels on time, and whoever sees the time run
       out first (a wait, a socket) cancels with ``deadline`` itself and then looks at the flag.
    3. A child's deadline is never later than those of its parents; a token has an alarm only if its own
       deadline is the earliest.
    4. ``_up`` is strong, ``_down`` weak: a child that its user drops is gone, unless ``tree.py``'s invariant 3
       keeps it.
    5. `Cancelled` leaves a checkpoint only after every cancelled boundary above was told that work was cut
       short (``hit``).

Locks: those of ``tree.py``; nothing is held while a token waits. After a fork the flags stay, registrations go.
"""

from __future__ import annotations

import functools
import math
import weakref
from os import getpid
from threading import get_ident
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, Self, TypeVar

from tokenscope._core import _primitives, ambient, clock, timer
from tokenscope._core._typing import override
from tokenscope._core.errors import Cancelled, DeadlineExceeded
from tokenscope._core.reasons import CancelKind, CancelReason, make_reason
from tokenscope._core.tree import Cut, Extras, Flock, Registration, Tree, Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

__all__ = [
    "NEVER",
    "CancellationToken",
    "Registration",
    "Wakeup",
    "attach",
    "become_boundary",
    "boundary_below",
    "cancel_because_of",
    "cancel_from_library",
    "check_name",
    "cut_short",
    "detach",
    "expire_if_due",
    "is_cut_of",
    "is_within",
    "iterator_of",
    "joined",
    "mark_cut_short",
    "raise_if_cancelled",
    "retire",
    "settle_boundary",
]

P = ParamSpec("P")
T = TypeVar("T")


class CancellationToken:
    """A promise that work may be told to stop, and the place where it asks whether it should.

    Thread-safe in every method. Cancelling reaches all descendants. ``with token:`` makes it current and is a
    boundary: work cut short by this token's own deadline leaves as `DeadlineExceeded`, its own `cancel` is absorbed.

    Args:
        timeout: Seconds until it cancels itself with kind ``deadline``; 0 is at once, None and ``inf`` are never.
        name: For logs and errors.

    Raises:
        ValueError, TypeError: A bad ``timeout`` or ``name``.
        RuntimeError: The timer thread could not be started.
    """

    __slots__ = ("__weakref__", "_cut", "_deadline", "_down", "_more", "_name", "_tree", "_up")

    _cut: Cut | None  # why it is cancelled; changes once, under the tree's lock
    _deadline: float | None  # the effective one, monotonic; set before the token is published
    _down: Flock[CancellationToken] | None  # children; made with the first one, under the tree's lock
    _more: Extras | None  # what few tokens have; made under the tree's lock
    _name: str | None
    _tree: Tree
    _up: CancellationToken | tuple[CancellationToken, ...] | None

    def __init__(self, *, timeout: float | None = None, name: str | None = None) -> None:
        check_name(name)
        seconds = clock.validate_timeout(timeout) if timeout is not None else None
        self._blank(Tree(), None, None, name)
        if seconds is not None:
            self._set_deadline(seconds)

    def _blank(
        self,
        tree: Tree,
        up: CancellationToken | tuple[CancellationToken, ...] | None,
        deadline: float | None,
        name: str | None,
    ) -> None:
        self._cut = self._down = self._more = None
        self._tree, self._up, self._deadline, self._name = tree, up, deadline, name

    def child(self, *, timeout: float | None = None, name: str | None = None) -> CancellationToken:
        """A new token that is cancelled with this one, and can be cancelled alone. Its deadline is never later.

        Raises:
            ValueError, TypeError: A bad ``timeout`` or ``name``.
        """
        # On everyone's path, hence written out: no helper, and the common case first.
        if name is not None:
            check_name(name)
        seconds = None if timeout is None else clock.validate_timeout(timeout)
        tree = self._tree
        token = _bare(CancellationToken)
        token._cut = token._down = token._more = None
        token._tree = tree
        token._up = self
        token._deadline = self._deadline
        token._name = name
        below = self._down
        if below is None or tree.pid != getpid():
            tree.run(tree.link_locked, self, token)
        else:
            # Linked first, then looked: a cancel sets the flag and descends in one locked section, so it either finds
            # the token or has been seen here. So it is in the middle of a section of this very thread, too: linking
            # is one step in C, and whoever descends looks at a copy.
            with tree.lock: below.add_locked(token)
            if self._cut is not None or tree.inbox or tree.unfinished:
                tree.run(tree.link_locked, self, token)
        if seconds is not None:
            token._set_deadline(seconds)
        return token

    @staticmethod
    def linked(
        *tokens: CancellationToken, timeout: float | None = None, name: str | None = None
    ) -> CancellationToken:
        """A child of several parents: cancelled as soon as one of them is, with that one's reason.

        The parents do not keep it alive. Without parents it is a new root.

        Raises:
            ValueError, TypeError: A bad ``timeout`` or ``name``, or something that is no token.
        """
        for parent in tokens:
            if not isinstance(parent, CancellationToken):
                raise TypeError(f"linked() takes tokens, not {parent!r}")
        parents = tuple(dict.fromkeys(parent for parent in tokens if parent is not NEVER))
        token = CancellationToken(name=name)
        seconds = clock.validate_timeout(timeout)
        token._up = parents
        token._deadline = min((p._deadline for p in parents if p._deadline is not None), default=None)
        token._tree.links = (weakref.ref(token),)
        for parent in parents:
            parent._tree.run(parent._tree.link_locked, parent, token)
        if seconds is not None:
            token._set_deadline(seconds)
        return token

    def _set_deadline(self, seconds: float) -> None:
        """Called once, before the token is published."""
        if seconds == 0:
            self._expire()
            return
        deadline = clock.now() + seconds
        if self._deadline is not None and self._deadline <= deadline:
            return  # the ancestor's deadline comes first and cancels this token too
        self._deadline = deadline
        if self._cut is not None:
            return
        extras = self._more = self._more or Extras()
        extras.own_deadline = deadline
        extras.alarm = _DeadlineAlarm(self, deadline, self._tree.keeper)
        timer.timer.add(extras.alarm)

    def _parents(self) -> tuple[CancellationToken, ...]:
        up = self._up
        return up if isinstance(up, tuple) else () if up is None else (up,)

    # --- asking -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """A checkpoint: return at once, or raise.

        Raises:
            Cancelled: The token is cancelled. Every later call raises again.
        """
        if self._cut is not None:
            _raise_cut(self, self._cut)

    @property
    def cancelled(self) -> bool:
        """Whether it is cancelled."""
        return self._cut is not None

    @property
    def reason(self) -> CancelReason | None:
        """Why it is cancelled; None while it is live."""
        cut = self._cut
        return None if cut is None else cut.reason

    @property
    def deadline(self) -> float | None:
        """When it will cancel itself, by ``time.monotonic()``: the earliest of its own and its ancestors', or None."""
        return self._deadline

    def remaining(self) -> float | None:
        """Seconds left until `deadline`, never below 0; None if there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - clock.now())

    @property
    def name(self) -> str:
        """The name given, or one made from its identity."""
        return self._name if self._name is not None else f"token-{id(self):x}"

    @property
    def cancelled_caught(self) -> bool:
        """Whether ``with token:`` absorbed this token's own cancel."""
        return self._more is not None and self._more.caught

    def __repr__(self) -> str:
        state = "live" if self._cut is None else f"cancelled: {self._cut.reason.kind}"
        left = self.remaining()
        return f"<CancellationToken {self.name}, {state}{'' if left is None else f', {left:.3f} s left'}>"

    # --- cancelling ---------------------------------------------------------------------------------------------

    def cancel(
        self,
        message: str = "",
        *,
        kind: str = CancelKind.MANUAL,
        tag: str | None = None,
        cause: BaseException | None = None,
    ) -> bool:
        """Cancel this token and all below it. The first reason wins.

        All flags are set and all blocked calls of the library are woken before the first callback runs;
        callbacks run on this thread, newest first, and their errors are logged, not raised here. May be called
        from anywhere, also from signal handlers.

        Args:
            message: For people and logs.
            kind: A word of `CancelKind`.
            tag: A word of your own.
            cause: The exception behind it.

        Returns:
            True only for the call that won. (A call from a signal handler that interrupted this very tree is
            carried out by what it interrupted, and returns False.)

        Raises:
            ValueError, TypeError: An unknown ``kind`` or arguments of the wrong type.
            KeyboardInterrupt, SystemExit: A callback raised it; everything else was done first.
        """
        return _cancel(self, message, kind, tag, cause, by_library=False)

    def on_cancel(
        self, fn: Callable[P, object], /, *args: Any, blocking: bool = False, **kwargs: Any
    ) -> Registration:
        """Have ``fn(*args, **kwargs)`` called once when the token is cancelled; at once if it is already.

        It runs on the thread that cancels, or on a worker when that is a thread of the library (deadline,
        hang-up). Keep it short; what may take long or block (a second connection, a KILL) wants
        ``blocking=True`` and always gets a worker.

        Returns:
            The registration. Close it (or use it as a context manager) when what the callback touches goes away.

        Raises:
            TypeError: ``fn`` is not callable.
        """
        if not callable(fn):
            raise TypeError(f"on_cancel() takes a callable, not {fn!r}")
        name = getattr(fn, "__qualname__", None) or repr(fn)
        registration = Registration(self, functools.partial(fn, *args, **kwargs), name, blocking=blocking)
        self._register(registration)
        return registration

    def _register(self, registration: Registration) -> None:
        tree = self._tree
        tree.run(tree.arm_locked, self, registration)
        if tree.links:
            tree.pass_pins_on()

    def _expire(self) -> None:
        reason = CancelReason(
            CancelKind.DEADLINE, f"the deadline of {self.name} passed", None, self.name, None, clock.wall()
        )
        Cut(self, reason, by_library=True).start(self)

    # --- waiting ------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the token is cancelled, or for ``timeout`` seconds; True if it is. Never raises `Cancelled`.

        Raises:
            ValueError, TypeError: A bad ``timeout``.
        """
        seconds = clock.validate_timeout(timeout)
        if self._cut is None:
            self._block(seconds)
        return self._cut is not None

    def _block(self, seconds: float | None) -> None:
        left = self.remaining()
        waiter = _primitives.Waiter()
        try:
            if attach(self, waiter):
                waiter.wait(seconds if left is None else min(left, math.inf if seconds is None else seconds))
        finally:
            detach(self, waiter)
        expire_if_due(self)

    def sleep(self, seconds: float) -> None:
        """Sleep, unless cancelled first. A checkpoint even for 0 seconds.

        Raises:
            Cancelled: The token is, or was meanwhile, cancelled.
            ValueError, TypeError: ``seconds`` is not a length of time.
        """
        if seconds is None:
            raise TypeError("sleep() needs a number of seconds, not None")
        self.wait(seconds)
        self.check()

    def guard(self, iterable: Iterable[T]) -> Iterator[T]:
        """Iterate, with a checkpoint before each item; a source that has ``close()`` is closed when cancelled.

        Raises:
            Cancelled: From the iteration, at the first item after the cancel.
            TypeError: ``iterable`` is not one.
        """
        return _guarded(self, iterator_of("guard()", iterable))

    # --- as a boundary ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        before = ambient.token_var.get()
        mine = joined(before, self)
        tree = self._tree
        tree.run(tree.enter_locked, self, (get_ident(), mine, before))
        ambient.token_var.set(mine)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        extras = self._more
        if extras is None or not extras.entered:
            raise RuntimeError(f"{self!r} was left more often than it was entered")
        _ident, mine, before = _take_entry(extras.entered)
        ambient.put_back(ambient.token_var, mine, before, once=False)
        return settle_boundary(self, error)


class _Never(CancellationToken):
    """What is current outside of any scope: it is never cancelled, and keeps nothing."""

    __slots__ = ()

    @override
    def child(self, *, timeout: float | None = None, name: str | None = None) -> CancellationToken:
        return CancellationToken(timeout=timeout, name=name)

    @override
    def cancel(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            "there is nothing to cancel here: this is the token outside of all scopes. Work is cancelled through a"
            " ThreadScope or a CancellationToken that it runs under"
        )

    @override
    def _register(self, registration: Registration) -> None:
        registration.once.clear()

    @override
    def _block(self, seconds: float | None) -> None:
        _primitives.Waiter().wait(seconds)

    @override
    def __enter__(self) -> Self:
        raise RuntimeError("the token outside of all scopes cannot be entered; make a CancellationToken() of your own")


class _DeadlineAlarm(timer.Alarm):
    """Rings on the timer thread: the token's time is up."""

    __slots__ = ()

    @override
    def ring(self) -> None:
        token = self()
        if token is not None:
            token._expire()


_bare = object.__new__


# --- for the rest of the library ----------------------------------------------------------------------------------


def attach(token: CancellationToken, wakeup: Wakeup) -> bool:
    """Have ``wakeup.wake()`` called by a cancel; False if the token is cancelled already. Register, then look.

    The token holds it weakly. On the token outside of all scopes it is True and keeps nothing.
    """
    if token is not NEVER:
        tree = token._tree
        tree.run(tree.attach_locked, token, wakeup)
    return token._cut is None


def detach(token: CancellationToken, wakeup: Wakeup) -> None:
    """Undo `attach`: no new ``wake()`` starts after this. One may be running on another thread. Idempotent."""
    if token._more is not None and token._more.wakes is not None:
        tree = token._tree
        tree.run(tree.detach_locked, token, wakeup)


def cancel_from_library(
    token: CancellationToken,
    message: str = "",
    *,
    kind: str,
    tag: str | None = None,
    cause: BaseException | None = None,
) -> bool:
    """Like `CancellationToken.cancel`, for threads of the library: the users' callbacks run on a worker."""
    return _cancel(token, message, kind, tag, cause, by_library=True)


def cancel_because_of(
    token: CancellationToken, source: str, message: str, *, kind: str, cause: BaseException | None = None
) -> bool:
    """Like `CancellationToken.cancel`, with the name of what caused it (a task) in ``reason.source``."""
    return _cancel(token, message, kind, None, cause, by_library=False, source=source)


def become_boundary(token: CancellationToken) -> None:
    """Have ``token`` learn from now on whether its cancel cut work short."""
    token._tree.run(token._tree.become_boundary_locked, token)


def boundary_below(parent: CancellationToken, timeout: float | None, name: str) -> CancellationToken:
    """A new child that is a boundary from the beginning."""
    token = parent.child(timeout=timeout, name=name)
    if token._more is None:
        token._more = Extras()  # without the lock: nobody else has the token yet, and the walk of a cancel only reads
    return token


def retire(token: CancellationToken) -> None:
    """Its boundary has been left: its deadline need not ring any more."""
    if token._more is not None and token._more.alarm is not None:
        token._more.alarm.call_off()


def expire_if_due(token: CancellationToken) -> None:
    """Cancel with ``deadline`` whatever token in the ancestry owns the deadline that passed. Then look at the token."""
    deadline = token._deadline
    if token._cut is not None or deadline is None or clock.now() < deadline:
        return
    for owner in _ancestry(token):
        if owner._more is not None and owner._more.own_deadline == deadline:
            owner._expire()
    for ancestor in _ancestry(token):
        if token.cancelled:
            return
        if ancestor._cut is not None:
            ancestor._cut.mark()  # somebody else was first, and is on the way down to this token: help


def raise_if_cancelled(token: CancellationToken, cause: BaseException | None = None) -> None:
    """A checkpoint that names the error which a cancel made of a blocked call.

    Raises:
        Cancelled: The token is cancelled; ``cause`` is its ``__cause__``.
    """
    if token._cut is not None:
        _raise_cut(token, token._cut, cause)


def mark_cut_short(token: CancellationToken, cut: Cut) -> None:
    """Tell every boundary at or above ``token`` that this cancel cut work short."""
    for ancestor in _ancestry(token):
        if ancestor._more is not None and cut.is_same(ancestor._cut):
            ancestor._more.hit = True


def cut_short(token: CancellationToken) -> bool:
    """Whether a `Cancelled` was raised at or below ``token`` by the cancel that it has."""
    return token._more is not None and token._more.hit


def is_within(token: CancellationToken, ancestor: CancellationToken) -> bool:
    """Whether ``token`` is ``ancestor`` or descends from it."""
    return any(t is ancestor for t in _ancestry(token))


def is_cut_of(error: BaseException | None, cut: Cut | None) -> bool:
    """Whether ``error`` is the `Cancelled` of this cancel, or a group of nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_cut_of(e, cut) for e in error.exceptions)
    return cut is not None and isinstance(error, Cancelled) and cut.is_same(error._cut)


def settle_boundary(token: CancellationToken, error: BaseException | None, *, move_on: bool = False) -> bool:
    """What a boundary makes of its end: True to absorb, False to let ``error`` pass; ``move_on`` is for deadlines.

    Raises:
        DeadlineExceeded: The token's own deadline cut work short.
    """
    cut = token._cut
    if cut is None or cut.origin() is not token or not (is_cut_of(error, cut) or (error is None and cut_short(token))):
        return False
    if cut.reason.kind is CancelKind.DEADLINE and not move_on:
        raise DeadlineExceeded(cut.reason.message, cut.reason) from error
    if token._more is not None:
        token._more.caught = True
    return error is not None


# --- the steps ----------------------------------------------------------------------------------------------------


def check_name(name: object) -> None:
    """Refuse what cannot name a token.

    Raises:
        TypeError: It is neither a str nor None.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a str or None, not {name!r}")


def _cancel(
    token: CancellationToken,
    message: str,
    kind: str,
    tag: str | None,
    cause: BaseException | None,
    *,
    by_library: bool,
    source: str | None = None,
) -> bool:
    if token is NEVER:
        token.cancel()
    reason = make_reason(kind, message, tag=tag, source=source or token.name, cause=cause)
    if token._cut is not None:
        return False
    return Cut(token, reason, by_library=by_library).start(token)


def _raise_cut(token: CancellationToken, cut: Cut, cause: BaseException | None = None) -> NoReturn:
    """Tell the boundaries that work is being cut short, then raise."""
    mark_cut_short(token, cut)
    error = cut.as_error()
    if cause is not None:
        error.__cause__ = cause
    raise error


def _ancestry(token: CancellationToken) -> Iterator[CancellationToken]:
    """The token and all above it, each once; no recursion."""
    seen: set[int] = set()
    pile = [token]
    while pile:
        here = pile.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        yield here
        pile += here._parents()


def iterator_of(who: str, iterable: Iterable[T]) -> Iterator[T]:
    """``iter(iterable)``, whose failure says who was given what.

    Raises:
        TypeError: It is not iterable.
    """
    try:
        return iter(iterable)
    except TypeError as error:
        raise TypeError(f"{who} takes an iterable, not {iterable!r}") from error


def _guarded(token: CancellationToken, source: Iterator[T]) -> Iterator[T]:
    try:
        token.check()
        for item in source:
            if token._cut is not None:
                token.check()
            yield item
    except Cancelled:
        close = getattr(source, "close", None)
        if close is not None:
            close()
        raise


def joined(before: CancellationToken | None, token: CancellationToken) -> CancellationToken:
    """``token``, or its union with the one that was current, where that would otherwise be forgotten."""
    if before is None or before is NEVER or is_within(token, before):
        return token
    return CancellationToken.linked(before, token, name=token.name)


def _take_entry(entered: list[tuple[int, object, object]]) -> tuple[int, object, object]:
    """The newest entry of this thread; of any thread if a generator carried the boundary to another one."""
    me = get_ident()
    for entry in reversed(entered):
        if entry[0] == me:
            entered.remove(entry)
            return entry
    return entered.pop()


#: The current token outside of any scope.
NEVER: CancellationToken = _Never(name="outside")
