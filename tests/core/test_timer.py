"""The timer: alarms ring on time and in order, dead ones cost nothing, and its one thread comes and goes."""

from __future__ import annotations

import gc
import threading
import time

import pytest
from actors import WAIT, hearing, until

import tokenscope
from tokenscope import CancellationToken
from tokenscope._core import _primitives, clock, events
from tokenscope._core import timer as timer_module
from tokenscope._core.timer import CLEAR_AT, THREAD_NAME, Alarm, call_later, timer
from tokenscope.testing import drain


class Owner:
    """Something that wants to be told."""


class Note(Alarm):
    """An alarm that writes down that it rang; or does something else."""

    __slots__ = ("action",)

    def __new__(cls, owner, after, action):
        return super().__new__(cls, owner, clock.now() + after)

    def __init__(self, owner, after, action):
        super().__init__(owner, clock.now() + after)
        self.action = action

    def ring(self):
        self.action()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.fixture(autouse=True)
def nothing_ticks():
    """Take out what earlier tests left ticking: a token with a callback is kept until its deadline."""
    with timer.enter():
        timer.heap.clear()
        timer.stale.clear()


def test_alarms_ring_in_the_order_of_their_times():
    """Whatever the order in which they are set, they ring by time, and never too early."""
    owner, rung, done = Owner(), [], threading.Event()
    start = time.monotonic()
    for after in (0.03, 0.01, 0.02):
        timer.add(Note(owner, after, lambda after=after: rung.append((after, time.monotonic() - start))))
    timer.add(Note(owner, 0.04, done.set))
    assert done.wait(WAIT)
    assert [after for after, _ in rung] == [0.01, 0.02, 0.03]
    assert all(late >= after for after, late in rung)


def test_a_nearer_alarm_is_not_kept_waiting_by_a_farther_one():
    """The thread, asleep until a distant alarm, is woken for one that is due before."""
    owner, done = Owner(), threading.Event()
    far = Note(owner, 3600, int)
    timer.add(far)
    until(lambda: timer.running is not None and far in [entry[2] for entry in timer.heap])
    timer.add(Note(owner, 0.01, done.set))
    assert done.wait(WAIT)
    far.call_off()


def test_deadlines_are_punctual():
    """Half of all deadlines are kept within 50 ms, with hundreds of others around them."""
    keep = [CancellationToken(timeout=30 + n) for n in range(300)]
    late = []
    for _ in range(9):
        token = CancellationToken(timeout=0.01)
        assert token.wait(WAIT)
        late.append(time.monotonic() - token.deadline)
    assert sorted(late)[4] < 0.05
    assert not any(token.cancelled for token in keep)


def test_what_was_called_off_or_dropped_does_not_ring():
    """An alarm that was called off, or whose owner is gone, stays silent."""
    kept, dropped, rung, done = Owner(), Owner(), [], threading.Event()
    off = Note(kept, 0.01, lambda: rung.append("off"))
    timer.add(off)
    timer.add(Note(dropped, 0.01, lambda: rung.append("dropped")))
    off.call_off()
    off.call_off()
    ghost = CancellationToken(timeout=0.01)
    reasons = []
    with hearing(events.TokenCancelled) as heard:
        name = ghost.name
        del ghost, dropped
        timer.add(Note(kept, 0.03, done.set))
        assert done.wait(WAIT)
        reasons += [event.token for event in heard.queue]
    assert "off" not in rung
    assert name not in reasons


def test_dead_alarms_are_cleared_in_batches():
    """However many alarms are called off or dropped, only a bounded rest of them stays in the heap."""
    assert drain()
    owner = Owner()
    living = [Note(owner, 3600, int) for _ in range(10)]
    for alarm in living:
        timer.add(alarm)
    for _ in range(20 * CLEAR_AT):
        alarm = Note(owner, 3600, int)
        timer.add(alarm)
        alarm.call_off()
        timer.add(Note(Owner(), 3600, int))
    assert len(timer.heap) <= 10 + 3 * CLEAR_AT
    assert {id(alarm) for alarm in living} <= {id(entry[2]) for entry in timer.heap}
    for alarm in living:
        alarm.call_off()


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_alarm_that_fails_silences_no_other(error):
    """An error in one alarm is told, and the thread lives on."""
    owner, done = Owner(), threading.Event()

    def fail():
        raise error

    with hearing(events.ThreadFailed) as heard:
        timer.add(Note(owner, 0.005, fail))
        timer.add(Note(owner, 0.01, done.set))
        assert done.wait(WAIT)
        event = heard.get(timeout=WAIT)
    assert (event.where, type(event.error)) == (THREAD_NAME, error)
    assert len(threads()) == 1


def test_there_is_one_daemon_thread_and_it_ends_when_idle(monkeypatch):
    """With nothing to wait for the thread ends, and the next alarm starts a new one."""
    assert drain()
    monkeypatch.setattr(timer_module, "IDLE_SECONDS", 0.02)
    for _ in range(2):
        tokens = [CancellationToken(timeout=0.01) for _ in range(20)]
        (thread,) = threads()
        assert thread.daemon
        assert all(token.wait(WAIT) for token in tokens)
        thread.join(WAIT)
        assert threads() == []
        assert timer.running is None


def test_drain_ends_the_thread_unless_it_is_needed():
    """drain() ends an idle timer, and lets one alone that somebody's deadline needs."""
    token = CancellationToken(timeout=3600)
    assert drain()
    assert len(threads()) == 1
    del token
    assert drain()
    assert threads() == []


def test_a_thread_that_cannot_start_is_an_error_and_no_more(monkeypatch):
    """Where no timer thread can be had, a timeout is refused loudly; later ones work."""
    assert drain()

    def none(target, name):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(_primitives, "start_thread", none)
        with pytest.raises(RuntimeError, match="start new thread"):
            CancellationToken(timeout=1)
    token = CancellationToken(timeout=0.01)
    assert token.wait(WAIT)


def test_a_boundary_that_was_left_gives_its_alarm_up():
    """fail_after leaves nothing ticking, though its token may live on."""
    with tokenscope.fail_after(3600) as token:
        alarm = token._more.alarm
        assert not alarm.off
    assert alarm.off
    cancelled = CancellationToken(timeout=3600)
    cancelled.cancel()
    assert cancelled._more.alarm.off


def test_call_later_calls_once_unless_called_off_or_dropped():
    """A plain callback on the timer: it comes if somebody still holds it."""
    calls, done = [], threading.Event()
    kept = call_later(clock.now() + 0.01, done.set)
    off = call_later(clock.now() + 0.005, lambda: calls.append("off"))
    off.call_off()
    call_later(clock.now() + 0.005, lambda: calls.append("dropped"))
    gc.collect()
    assert done.wait(WAIT)
    assert calls == []
    del kept


@pytest.mark.parametrize("timeout", [1e9, 1e300])
def test_a_deadline_beyond_all_clocks_is_one(timeout):
    """Absurdly long timeouts are kept, and waiting for them is possible."""
    token = CancellationToken(timeout=timeout)
    assert token.remaining() > 1e8
    assert token.wait(0.001) is False
    done = threading.Event()
    near = CancellationToken(timeout=0.001)
    near.on_cancel(done.set)
    assert done.wait(WAIT)


def test_an_alarm_of_its_own_kind_must_say_how_it_rings():
    """The bare Alarm has no sound."""
    with pytest.raises(NotImplementedError):
        Alarm(Owner(), 0.0).ring()
