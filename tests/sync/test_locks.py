"""Locks, semaphores, conditions and barriers: what `threading` promises, and what a cancel leaves behind."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest
from waits import WAIT, Waiting, lock, until

from tokenscope import CancellationToken, Cancelled, sync, use_token


@pytest.fixture
def cancelled():
    token = CancellationToken()
    token.cancel()
    return token


@pytest.fixture(params=[sync.Lock, sync.RLock])
def a_lock(request):
    return request.param()


def test_a_cancel_in_a_with_leaves_the_lock_unheld(a_lock, cancelled):
    """`with lock:` that raises `Cancelled` has not taken the lock."""
    with pytest.raises(Cancelled), use_token(cancelled), a_lock:
        pytest.fail("it went in")
    assert a_lock.acquire(blocking=False)
    a_lock.release()


def test_without_blocking_it_is_no_checkpoint(a_lock, cancelled):
    """`acquire(blocking=False)` and `release` do their work for a cancelled thread too: cleanups need them."""
    with use_token(cancelled):
        assert a_lock.acquire(blocking=False)
        a_lock.release()


def test_bad_arguments_are_those_of_threading(a_lock):
    """The same calls are refused as in `threading`."""
    for arguments in ((False, 1), (True, -2)):
        with pytest.raises(ValueError, match="timeout"):
            a_lock.acquire(*arguments)
    with pytest.raises(RuntimeError):
        a_lock.release()
    assert a_lock.acquire(timeout=None)
    a_lock.release()


REFUSED = {
    "value must be an int, not 'x'": lambda: sync.Semaphore("x"),
    "value must be an int, not nan": lambda: sync.BoundedSemaphore(float("nan")),
    "value must be 0 or more, not -1": lambda: sync.Semaphore(-1),
    "n must be an int, not 1.5": lambda: sync.Semaphore().release(1.5),
    "n must be 1 or more, not 0": lambda: sync.Semaphore().release(0),
    "parties must be an int, not None": lambda: sync.Barrier(None),
    "parties must be 1 or more, not 0": lambda: sync.Barrier(0),
    "action must be callable or None, not 5": lambda: sync.Barrier(1, 5),
    "timeout must be a number of seconds or None, not 'x'": lambda: sync.Barrier(1, timeout="x"),
    r"lock must have acquire\(\) and release\(\), not 5": lambda: sync.Condition(5),
    "predicate must be callable, not True": lambda: sync.Condition().wait_for(True),
    "n must be an int, not 'all'": lambda: sync.Condition().notify("all"),
    "n must be 0 or more, not -1": lambda: sync.Condition().notify(-1),
    "maxsize must be an int, not None": lambda: sync.Queue(None),
    "maxsize must be an int, not '5'": lambda: sync.PriorityQueue("5"),
    "maxsize must be an int, not True": lambda: sync.LifoQueue(True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_counted_or_called_is_named_with_its_value(message):
    """Where `threading` and `queue` fail later, or with words of Python's own, the call itself says what is wrong."""
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        REFUSED[message]()


def test_nobody_overtakes():
    """A lock that is let go while somebody waits is that thread's; who comes by does not get it."""
    it = sync.Lock()
    way = lock(lambda: it)
    waiting = way.start()
    it.release()
    assert not it.acquire(blocking=False)
    waiting.end()
    it.release()
    assert it.acquire(blocking=False)


def test_an_rlock_belongs_to_its_thread():
    """It is taken as often as one likes by its owner, and let go by nobody else."""
    it = sync.RLock()
    with it, it:
        with pytest.raises(RuntimeError, match="un-acquired"):
            Waiting(it.release).end()
        assert Waiting(lambda: it.acquire(blocking=False)).end() is False
    assert Waiting(lambda: it.acquire(blocking=False)).end() is True


def test_a_cancel_ends_the_wait_for_an_rlock():
    """Whoever waits for another thread's lock leaves with `Cancelled`, and the lock is as it was."""
    it = sync.RLock()
    with it:
        first, second = Waiting(it.acquire), Waiting(it.acquire)
        until(lambda: len(it._line.turns) == 2)
        first.token.cancel()
        with pytest.raises(Cancelled):
            first.end()
        assert second.waits()
    assert second.end() is True
    assert it.acquire(timeout=0) is False


def test_a_bounded_semaphore_counts():
    """It takes back no more permits than it gave."""
    it = sync.BoundedSemaphore(1)
    with it:
        assert not it.acquire(blocking=False)
    with pytest.raises(ValueError, match="too many"):
        it.release()


def test_a_semaphore_gives_several_at_once():
    """`release(n)` lets n threads go."""
    it = sync.Semaphore(0)
    waitings = [Waiting(it.acquire) for _ in range(3)]
    it.release(3)
    assert [waiting.end() for waiting in waitings] == [True] * 3


@pytest.mark.parametrize("make", [sync.RLock, sync.Lock, threading.RLock, threading.Lock])
def test_a_cancelled_wait_of_a_condition_holds_the_lock_again(make):
    """`Cancelled` comes out of `wait` with the lock taken back, however long that takes: the `with` lets it go."""
    it = sync.Condition(make())
    held = []

    def wait():
        with it:
            try:
                it.wait()
            finally:
                held.append(it._is_owned())

    waiting = Waiting(wait)
    until(lambda: it._line.turns)
    with it:
        waiting.token.cancel()
        assert waiting.waits()
        assert not held
    with pytest.raises(Cancelled):
        waiting.end()
    assert held == [True]
    with it:
        pass  # it is free


def test_a_condition_waits_for_something():
    """`wait_for` looks again after each notification, and returns the predicate's answer."""
    it, items = sync.Condition(), []

    def take():
        with it:
            return it.wait_for(lambda: items and items[-1])

    waiting = Waiting(take)
    for item in (0, "something"):
        until(lambda: it._line.turns)
        with it:
            items.append(item)
            it.notify_all()
    assert waiting.end() == "something"
    with it:
        assert it.wait_for(lambda: 0, timeout=0.01) == 0


def test_a_condition_wants_its_lock_held():
    """Waiting and notifying without the lock are errors, as in `threading`."""
    it = sync.Condition()
    for call in (it.wait, it.notify, it.notify_all):
        with pytest.raises(RuntimeError, match="un-acquired"):
            call()


def test_a_barrier_lets_all_go_together():
    """Each party gets a number of its own, and the barrier can be used again."""
    it = sync.Barrier(3)
    for _ in range(2):
        waitings = [Waiting(it.wait) for _ in range(3)]
        assert sorted(waiting.end() for waiting in waitings) == [0, 1, 2]


def test_a_cancelled_party_breaks_the_barrier():
    """The others are told, instead of waiting for somebody who does not come."""
    it = sync.Barrier(3)
    waitings = [Waiting(it.wait) for _ in range(2)]
    until(lambda: len(it._cond._line.turns) == 2)
    waitings[0].token.cancel()
    with pytest.raises(Cancelled):
        waitings[0].end()
    with pytest.raises(sync.BrokenBarrierError):
        waitings[1].end()
    it.reset()
    assert not it.broken


def test_an_event_that_is_cleared_at_once_wakes_all_the_same():
    """Nobody who waits at the moment of `set` misses it."""
    it = sync.Event()
    waitings = [Waiting(it.wait) for _ in range(3)]
    until(lambda: len(it._line.turns) == 3)
    it.set()
    it.clear()
    assert [waiting.end() for waiting in waitings] == [True] * 3
    assert not it.is_set()


def test_ctrl_c_in_a_wait_loses_nothing():
    """A KeyboardInterrupt leaves the line, and the lock goes to the next as if nobody had been there."""
    it = sync.Lock()
    it.acquire()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with pytest.raises(KeyboardInterrupt):
            it.acquire(timeout=WAIT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not it._line.turns
    it.release()
    assert it.acquire(blocking=False)


def test_a_signal_handler_may_set_release_and_put():
    """What gives is done even by a handler that interrupted this very thing, and is not lost."""
    event, semaphore, inbox = sync.Event(), sync.Semaphore(0), sync.SimpleQueue()

    def locked():
        event.set()
        semaphore.release()
        inbox.put("an item")

    for desk in (event._desk, semaphore._desk, inbox._desk):
        desk.ask(locked)
    assert event.is_set()
    assert [semaphore.acquire(blocking=False) for _ in range(4)] == [True, True, True, False]
    assert [inbox.get_nowait() for _ in range(3)] == ["an item"] * 3


def test_waiting_for_oneself_is_refused():
    """A handler that would wait for the step it interrupted gets an error instead of a deadlock."""
    it = sync.Semaphore(0)
    with pytest.raises(RuntimeError, match="signal handler"):
        it._desk.ask(it.acquire)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_nobody_waits_in_a_forked_child():
    """The threads that waited are not there any more: what comes free is for whoever asks."""
    it = sync.Semaphore(0)
    waiting = Waiting(it.acquire)
    until(lambda: it._line.turns)
    child = os.fork()
    if not child:
        sys.settrace(None)  # a coverage tracer has a lock of its own, which another thread may have held
        it.release()
        os._exit(0 if it.acquire(blocking=False) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert waiting.waits()
    it.release()
    waiting.end()
