"""One thread that rings alarms on time. It knows callbacks, not tokens.

States of an alarm: *posted*, *waiting* (in the heap), *rung*, *off* (called off, or its owner is gone;
it lies in the heap until the next clearing).

Invariants
    1. ``heap`` is touched under the lock only; ``posted`` and ``stale`` only by single atomic operations, so that
       signal handlers and finalizers may use them in the middle of anything.
    2. ``running`` is the ticket of the one timer thread of this process, from just before its start to its end.
       A thread that finds another ticket there (an interrupt cut its start off after it had begun) ends at
       once.
    3. While ``heap`` is not empty and ``running``, the thread wakes no later than the earliest alarm: whoever adds an
       earlier one than ``planned`` rings the bell.
    4. An alarm is a weak reference: it keeps nothing alive but its ``keeper``.

Lock order: the timer's lock is a leaf. Nothing is called while it is held; alarms ring outside of it, on the timer
thread, and must be quick (a token's alarm marks, wakes, and hands user callbacks to a worker). Hence no deadlock.

After a fork the child gets a fresh lock and no thread; the alarms stay, and the next added alarm starts a thread.
At interpreter exit the thread is a daemon and holds nothing up.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from tokenscope._core import _primitives, clock, events
from tokenscope._core._typing import override

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Alarm", "Timer", "timer"]

THREAD_NAME = "tokenscope-timer"
#: The thread ends after this many seconds with nothing to wait for.
IDLE_SECONDS = 10.0
#: Fewer dead alarms than this are not worth a clearing (a number pulled out of the air).
CLEAR_AT = 64


class Alarm(weakref.ref[Any]):
    """A weak reference to something that wants to be told when ``when`` has come."""

    __slots__ = ("keeper", "off", "when")

    def __new__(cls, owner: object, when: float, keeper: object = None) -> Self:  # noqa: ARG004  # for __init__
        return super().__new__(cls, owner, timer.stale.append)

    def __init__(self, owner: object, when: float, keeper: object = None) -> None:
        super().__init__(owner, timer.stale.append)  # type: ignore[call-arg]
        self.when = when
        self.off = False
        self.keeper = keeper

    def call_off(self) -> None:
        """It need not ring. Takes no lock: safe anywhere, also while another lock is held."""
        if not self.off:
            self.off = True
            timer.stale.append(self)

    def ring(self) -> None:
        """Called by the timer thread; overridden by owners of alarms."""
        raise NotImplementedError


class Timer(_primitives.Room):
    """The heap and its thread. There is one for the process: `timer`."""

    __slots__ = ("_order", "bell", "draining", "heap", "planned", "posted", "running", "stale")

    def __init__(self) -> None:
        super().__init__()
        self._order = itertools.count()  # breaks ties in the heap, so that alarms are never compared
        self.bell = _primitives.Waiter()
        self.posted: deque[Alarm] = deque()
        self.stale: list[Alarm] = []
        self.heap: list[tuple[float, int, Alarm]] = []  # changes under the lock
        self.planned = float("inf")  # when the thread means to wake; changes under the lock
        self.running: object | None = None  # changes under the lock
        self.draining = False  # changes under the lock

    def add(self, alarm: Alarm) -> None:
        """Have ``alarm`` rung at its time. Thread-safe, also in signal handlers.

        Raises:
            RuntimeError: No timer thread could be started.
        """
        self.posted.append(alarm)
        while not self.busy_here():  # else the section that was interrupted looks again when it is done
            with self.enter(): self._take_in_locked()
            if not self.posted:
                return

    def _take_in_locked(self) -> None:
        while self.posted:
            alarm = self.posted[0]
            heapq.heappush(self.heap, (alarm.when, next(self._order), alarm))
            self.posted.popleft()  # an interrupt before this line makes it ring twice, never not at all
        self._clear_locked()
        if self.heap and self.running is None:
            self._start_locked()
        elif self.heap and self.heap[0][0] < self.planned:
            self.planned = self.heap[0][0]
            self.bell.wake()

    def _start_locked(self) -> None:
        try:
            self.running = ticket = object()
            _primitives.start_thread(functools.partial(self._run, ticket), THREAD_NAME)
        except BaseException:
            self.running = None
            raise

    def _clear_locked(self) -> None:
        """Throw dead alarms out, in batches: when they are many, and half of all."""
        if len(self.stale) < CLEAR_AT or len(self.stale) * 2 < len(self.heap):
            return
        self.stale.clear()
        self._weed_locked()

    def _weed_locked(self) -> None:
        rest = [entry for entry in self.heap if not entry[2].off and entry[2]() is not None]
        heapq.heapify(rest)
        self.heap[:] = rest  # in one step: an interrupt leaves the old heap or the new one

    def _run(self, ticket: object) -> None:
        idle_since = clock.now()
        while True:
            with self.enter(): due, delay = self._due_locked(ticket)
            if self.running is not ticket:
                return
            for alarm in due:
                self._ring(alarm)
            if due or self.heap:
                idle_since = clock.now()
            elif self._retire(idle_since):
                return
            if not (due or self.posted):  # posted: by a finalizer, in the middle of the section above
                self.bell.wait(delay)
            del due

    def _due_locked(self, ticket: object) -> tuple[list[Alarm], float]:
        due: list[Alarm] = []
        if self.running is not ticket:
            return due, 0.0
        self._take_in_locked()
        while self.heap and self.heap[0][0] <= clock.now():
            due.append(self.heap[0][2])
            heapq.heappop(self.heap)
        self.planned = self.heap[0][0] if self.heap else clock.now() + IDLE_SECONDS
        return due, self.planned - clock.now()

    def _ring(self, alarm: Alarm) -> None:
        if alarm.off:
            return
        try:
            alarm.ring()
        except BaseException as error:  # one alarm must not silence the others, and nobody above could be told
            events.emit(events.ThreadFailed(THREAD_NAME, error))

    def _retire(self, idle_since: float) -> bool:
        if clock.now() - idle_since < IDLE_SECONDS and not self.draining:
            return False
        with self.enter(): return self._retire_locked()

    def _retire_locked(self) -> bool:
        if self.heap or self.posted:
            return False
        self.running = None
        self.draining = False
        return True

    def drain(self) -> None:
        """Ask the thread to end now if it has nothing to wait for (for leak checks). Returns at once."""
        with self.enter(): self._drain_locked()

    def _drain_locked(self) -> None:
        self._take_in_locked()
        self._weed_locked()
        self.draining = self.running is not None and not self.heap
        self.bell.wake()

    @override
    def _after_fork_locked(self) -> None:
        self.running = None
        self.bell = _primitives.Waiter()


def call_later(when: float, fn: Callable[[], object]) -> _Call:
    """Call ``fn`` on the timer thread at the monotonic time ``when``; keep the result, or it is called off."""
    call = _Call(fn)
    call.alarm = _CallAlarm(call, when)
    timer.add(call.alarm)
    return call


class _Call:
    """A plain callback with an alarm; whoever holds it wants it."""

    __slots__ = ("__weakref__", "alarm", "fn")

    def __init__(self, fn: Callable[[], object]) -> None:
        self.fn = fn
        self.alarm: Alarm

    def call_off(self) -> None:
        self.alarm.call_off()


class _CallAlarm(Alarm):
    __slots__ = ()

    def ring(self) -> None:
        call = self()
        if call is not None:
            call.fn()


timer = Timer()
