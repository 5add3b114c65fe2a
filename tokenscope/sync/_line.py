"""How threads wait for their turn: one line of waiters for each thing they wait for, first come, first served.

All primitives are made of two parts. A `Desk` is some state under one lock. A `Line` is those who wait for a part of
that state: a permit, an item, a free place, an event. Whoever waits is blocked on a raw lock of its own
(``_primitives.Waiter``), so that a cancel can wake exactly this thread, from anywhere, and takes no lock for that.

States of a turn: *waiting* (in ``turns``) -> *granted* (in ``granted``; woken) -> *left*. From *waiting* also straight
    to *left*: cancelled, or the time was up.

Invariants, whenever the desk's lock is free
    1. A granted turn reserves one unit, and ``len(granted)`` units of what is free belong to granted turns. Nobody
       else may take them: so nobody overtakes.
    2. While somebody waits, all free units are reserved. (`SimpleQueue.put` adds a unit without the lock, and then sees
       to it that this holds again.)
    3. Who leaves a granted turn without taking its unit (cancelled at that very moment) has the line served again: the
       unit goes to the next, or is free.
    4. The unit is taken by the thread that got the turn, under the lock, not by the one who granted it. So there is no
       moment in which an item is in nobody's hands.

Locks: the desk's lock is a leaf but for what a queue's ``_put`` and ``_get`` call (``__lt__`` of items). No lock is
    held while a thread waits.

Re-entry: what gives (`Desk.run`) may be called by a signal handler that interrupted this very desk, and is then done
    right after the interrupted step. What takes is refused there: it would wait for itself.

Fork: in the child nobody waits; the state is what it was.
"""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tokenscope._core import _primitives, clock
from tokenscope._core import token as tokens
from tokenscope._core._typing import override
from tokenscope._core.current import current_token, effective_token, standing_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.token import CancellationToken
    from tokenscope._core.tree import Wakeup

__all__ = ["NOTHING", "Desk", "Line", "end_of", "time_left", "waiting_token", "whole_number"]

T = TypeVar("T")


class _Nothing:
    """What was taken if nothing was; None may be an item."""

    __slots__ = ()


NOTHING: Final = _Nothing()


def waiting_token(explicit: CancellationToken | None) -> CancellationToken:
    """What a wait that begins now listens to; in a section that must not be cut, only to that section's own limit.

    Raises:
        TypeError: ``explicit`` is not a token.
    """
    if explicit is None:
        return current_token()
    both = effective_token(explicit)
    return current_token() if standing_back() else both


def end_of(timeout: float | None) -> float | None:
    """When a wait of ``timeout`` seconds ends; a negative number is no time at all, as in ``threading``.

    Raises:
        TypeError, ValueError: It is not a number.
    """
    if isinstance(timeout, int | float) and timeout < 0:
        return clock.now()
    return clock.deadline_after(clock.validate_timeout(timeout))


def whole_number(name: str, value: Any, *, least: int | None = None) -> int:
    """A number of things, given by a user.

    Raises:
        TypeError: It is no whole number (``True`` is none here).
        ValueError: It is less than ``least``.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {value!r}")
    number = operator.index(value)
    if least is not None and number < least:
        raise ValueError(f"{name} must be {least} or more, not {value!r}")
    return number


def time_left(token: CancellationToken, end: float | None) -> float | None:
    """Seconds until the token's deadline or ``end``, whichever is first; None if there is neither."""
    left = token.remaining()
    if end is None:
        return left
    until_end = max(0.0, end - clock.now())
    return until_end if left is None else min(left, until_end)


class Line:
    """Those who wait at a desk for the same thing. Everything but `watchers` is under the desk's lock."""

    __slots__ = ("granted", "turns", "watchers")

    def __init__(self) -> None:
        # Ordered, and any of them can be taken out in one step: thousands may be cancelled together.
        self.turns: OrderedDict[_primitives.Waiter, None] = OrderedDict()
        self.granted: set[_primitives.Waiter] = set()
        self.watchers: list[Wakeup] = []  # woken when something is free; they take nothing. Changed in single steps

    def serve_locked(self, free: float) -> None:
        """Grant turns, oldest first, while anything of the ``free`` units is not reserved; then tell who watches."""
        while self.turns and free > len(self.granted):
            turn = next(iter(self.turns))
            self.granted.add(turn)
            turn.wake()
            self.leave_waiting_locked(turn)  # last: an interrupt before it leaves a turn that is merely served twice
        if free > len(self.granted):
            for watcher in tuple(self.watchers):
                watcher.wake()

    def leave_waiting_locked(self, turn: _primitives.Waiter) -> None:
        """Take a turn off the line, if it is there."""
        self.turns.pop(turn, None)

    def leave_locked(self, turn: _primitives.Waiter) -> bool:
        """End a turn; True if it had been granted."""
        granted = turn in self.granted
        self.turns.pop(turn, None)
        self.granted.discard(turn)
        return granted

    def first(self, count: int) -> list[_primitives.Waiter]:
        """The oldest turns."""
        return list(itertools.islice(self.turns, count))


class Desk(_primitives.Room):
    """Some state under one lock, and the lines of those who wait for a part of it."""

    __slots__ = ("lines",)

    def __init__(self, *lines: Line) -> None:
        super().__init__()
        self.lines = lines

    @override
    def _after_fork_locked(self) -> None:
        for line in self.lines:
            line.turns.clear()
            line.granted.clear()
            line.watchers.clear()

    def attempt(self, line: Line, free: Callable[[], float], claim: Callable[[], T], undo: Callable[[], object]) -> Any:
        """Take a unit if one is free that nobody was promised.

        Args:
            line: Those who wait for such units.
            free: How many there are, promised ones included.
            claim: Takes one, and returns what was taken.
            undo: Gives it back, for the case that this thread is interrupted before it can have it.

        Returns:
            What ``claim`` returned, or `NOTHING`; this too in a signal handler that interrupted this very desk.
        """
        if self.busy_here():
            return NOTHING
        taken: Any = NOTHING
        try:
            with self.enter(): taken = self._attempt_locked(line, free, claim)  # fmt: skip
            self._tidy()
            return taken  # noqa: TRY300 - inside of the `try`: until the caller has it, an interrupt undoes it
        except BaseException:
            if taken is not NOTHING:
                undo()
            raise

    def _attempt_locked(self, line: Line, free: Callable[[], float], claim: Callable[[], T]) -> Any:
        if line.turns:
            line.serve_locked(free())
        return claim() if free() > len(line.granted) else NOTHING

    def obtain(
        self,
        line: Line,
        free: Callable[[], float],
        claim: Callable[[], T],
        undo: Callable[[], object],
        token: CancellationToken,
        end: float | None,
    ) -> Any:
        """As `attempt`, and wait in line if need be.

        Raises:
            Cancelled: The token is cancelled. Nothing was taken.
            RuntimeError: This is a signal handler that interrupted this very desk.
        """
        token.check()
        turn: _primitives.Waiter | None = None
        taken: Any = NOTHING
        try:
            taken = self.attempt(line, free, claim, undo)
            if taken is NOTHING:
                self.refuse_reentry()
                turn = _primitives.Waiter()
                with self.enter(): taken = self._queue_up_locked(line, turn, free, claim)  # fmt: skip
                self._tidy()  # before going to sleep: what a signal handler left may be what is waited for
            if taken is NOTHING and turn is not None:
                self.sleep(line, turn, token, end)
                token.check()
                with self.enter(): taken = self._finish_locked(line, turn, claim)  # fmt: skip
                self._tidy()
            return taken  # noqa: TRY300 - as above
        except BaseException:
            if turn is not None:
                self.ask(self._give_up_locked, line, turn, free)
            if taken is not NOTHING:
                undo()
            raise

    def _queue_up_locked(
        self, line: Line, turn: _primitives.Waiter, free: Callable[[], float], claim: Callable[[], T]
    ) -> Any:
        line.turns[turn] = None
        line.serve_locked(free())
        return claim() if turn in line.granted and line.leave_locked(turn) else NOTHING

    def _finish_locked(self, line: Line, turn: _primitives.Waiter, claim: Callable[[], T]) -> Any:
        return claim() if line.leave_locked(turn) else NOTHING

    def _give_up_locked(self, line: Line, turn: _primitives.Waiter, free: Callable[[], float]) -> None:
        if line.leave_locked(turn):
            line.serve_locked(free())

    def sleep(self, line: Line, turn: _primitives.Waiter, token: CancellationToken, end: float | None) -> None:
        """Block until the turn is granted, the token is cancelled or the time is up. Look which; it raises nothing."""
        try:
            if tokens.attach(token, turn):
                while turn not in line.granted and not token.cancelled and (left := time_left(token, end)) != 0:
                    turn.wait(left)
        finally:
            tokens.detach(token, turn)
        tokens.expire_if_due(token)

    def post(self, step: Callable[[], object]) -> None:
        """As `run`, but without waiting for the lock: who holds it now does the step after letting go of it."""
        self.inbox.append(step)
        # Between this look and `settle` another thread may take the lock, and that one is waited for. It is no
        # finalizer that waits for us in turn: it would have had to look after us, and to find our lock held.
        while self.inbox and not self.busy_here() and self.enter().acquire(blocking=False):
            self.lock.release()
            self.settle()

    def refuse_reentry(self) -> None:
        """Refuse to wait in a signal handler or finalizer that interrupted a step at this very desk."""
        if self.busy_here():
            raise RuntimeError("a signal handler or finalizer cannot wait for what its own thread is just changing")

    def ask(self, step: Callable[..., T], *args: Any) -> T:
        """Do ``step(*args)`` under the lock; its answer."""
        with self.enter(): answer = step(*args)  # fmt: skip
        self._tidy()
        return answer

    def _tidy(self) -> None:
        """Do what a signal handler or another thread's `post` left here meanwhile. Called after every section."""
        if self.inbox:
            self.settle()
