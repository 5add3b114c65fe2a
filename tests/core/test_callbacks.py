"""Callbacks: who is called, when, on which thread, in which order, and what closing a registration promises."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from actors import WAIT, hearing, until
from crowd import Runner, on_thread

from tokenscope import CancelKind, CancellationToken
from tokenscope._core import _primitives, events
from tokenscope._core.token import cancel_from_library
from tokenscope._core.workers import IDLE_NAME
from tokenscope.testing import drain


def here():
    return threading.get_ident()


# --- being called --------------------------------------------------------------------------------------------------


def test_a_callback_gets_exactly_what_was_given():
    """The arguments of on_cancel go to the callback, and nothing else."""
    token = CancellationToken()
    calls = []
    token.on_cancel(lambda *args, **kwargs: calls.append((args, kwargs)), 1, 2, blocking=False, fn=3, name="x")
    token.on_cancel(lambda *args: calls.append(args))
    token.cancel()
    assert calls == [(), ((1, 2), {"fn": 3, "name": "x"})]


def test_an_event_can_be_set_by_a_cancel():
    """The plainest bridge to older code works: on_cancel(event.set)."""
    token = CancellationToken()
    event = threading.Event()
    token.on_cancel(event.set)
    assert not event.is_set()
    token.cancel()
    assert event.is_set()


def test_a_callback_on_a_cancelled_token_is_called_at_once():
    """Who registers too late is called before on_cancel returns, on the thread that registers."""
    token = CancellationToken()
    token.cancel()
    called = []
    registration = token.on_cancel(lambda: called.append(here()))
    assert called == [here()]
    assert registration.close() is False
    assert called == [here()]


def test_a_callback_is_called_once():
    """Cancelling again, or a parent later, calls nobody twice."""
    root = CancellationToken()
    token = root.child()
    called = []
    token.on_cancel(called.append, 1)
    token.cancel()
    token.cancel()
    root.cancel()
    assert called == [1]


def test_the_newest_is_called_first_across_the_subtree():
    """Callbacks run newest first, wherever below the cancelled token they were registered."""
    root = CancellationToken()
    linked = CancellationToken.linked(root, CancellationToken())
    tokens = [root, root.child(), linked, root.child().child(), linked.child(), root]
    calls = []
    for number, token in enumerate(tokens):
        token.on_cancel(calls.append, number)
    root.cancel()
    assert calls == [5, 4, 3, 2, 1, 0]


def test_a_users_cancel_runs_callbacks_on_its_own_thread():
    """cancel() returns when the callbacks have run, on the thread that called it."""
    token = CancellationToken()
    called = []
    token.child().on_cancel(lambda: called.append(here()))
    ident = on_thread(lambda: token.cancel() and here())
    assert called == [ident]


def test_blocked_calls_are_woken_before_the_first_callback():
    """A callback that takes its time does not keep a sleeping thread waiting."""
    token = CancellationToken()
    sleeper = Runner(lambda: token.wait(WAIT))
    until(lambda: token._more is not None and token._more.wakes is not None)
    ended = []

    def slow():
        sleeper.join(WAIT)
        ended.append(sleeper.is_alive())

    token.on_cancel(slow)
    token.cancel()
    assert ended == [False]


def test_a_slow_callback_holds_no_lock():
    """While one thread is in a callback, others use the same tree, and a second cancel returns at once."""
    root = CancellationToken()
    inside, go_on = threading.Event(), threading.Event()
    root.on_cancel(lambda: (inside.set(), go_on.wait(WAIT)))
    canceller = Runner(root.cancel)
    assert inside.wait(WAIT)
    late = []
    assert root.cancel() is False
    assert root.child().cancelled
    root.on_cancel(late.append, 1)
    assert late == [1]
    assert canceller.is_alive()
    go_on.set()
    assert canceller.result() is True


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_callback_that_raises_stops_no_other(caplog):
    """Its error is logged and emitted, not raised into the canceller, and the rest runs."""
    token = CancellationToken(name="job")
    calls = []
    token.on_cancel(calls.append, "old")
    token.on_cancel(lambda: 1 / 0)
    token.on_cancel(calls.append, "new")
    with hearing(events.CallbackFailed) as heard, caplog.at_level(logging.ERROR, "tokenscope"):
        assert token.cancel() is True
    assert calls == ["new", "old"]
    event = heard.get_nowait()
    assert heard.empty()
    assert isinstance(event.error, ZeroDivisionError)
    assert "job" in event.where
    (record,) = [r for r in caplog.records if r.name == "tokenscope"]
    assert record.levelno == logging.ERROR
    assert "CallbackFailed" in record.getMessage()
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_from_a_callback_is_raised_after_the_rest_ran(kind):
    """KeyboardInterrupt and SystemExit come out of cancel(), when every other callback has run."""
    token = CancellationToken()
    calls = []

    def interrupt():
        raise kind

    token.on_cancel(calls.append, "old")
    token.on_cancel(interrupt)
    token.on_cancel(calls.append, "new")
    with pytest.raises(kind):
        token.cancel()
    assert calls == ["new", "old"]
    with pytest.raises(kind):
        token.on_cancel(interrupt)
    assert not token.child().cancel()


# --- what a callback may do ----------------------------------------------------------------------------------------


def test_a_callback_may_read_its_token():
    """Flag, reason and checkpoint of the token are there for its callbacks."""
    token = CancellationToken()
    seen = []
    token.on_cancel(
        lambda: seen.append((token.cancelled, token.reason.message, token.wait(WAIT), token.child().cancelled))
    )
    token.cancel("why")
    assert seen == [(True, "why", True, True)]


def test_a_callback_may_cancel_another_tree():
    """A cancel may set off another, also in a circle."""
    one, two = CancellationToken(), CancellationToken()
    one.on_cancel(two.cancel, "from one")
    two.on_cancel(one.cancel, "from two")
    assert one.cancel() is True
    assert two.reason.message == "from one"


def test_a_callback_may_cancel_its_own_tree():
    """A callback on a child may cancel the root: the child keeps its reason, the rest gets the new one."""
    root = CancellationToken()
    child, other = root.child(), root.child()
    child.on_cancel(root.cancel, "all")
    child.cancel("one")
    assert (child.reason.message, other.reason.message) == ("one", "all")


def test_a_callback_may_register_and_close():
    """Inside a callback a registration on the same token is called at once, and closing one that is due stops it."""
    token = CancellationToken()
    calls = []
    older = token.on_cancel(calls.append, "closed in time")

    def work():
        calls.append(older.close())
        token.on_cancel(calls.append, "late")
        other = CancellationToken()
        other.on_cancel(calls.append, "never").close()
        other.cancel()

    token.on_cancel(work)
    token.cancel()
    assert calls == [True, "late"]


def test_two_callbacks_may_close_each_other():
    """On one thread the newer one runs and closes the older; neither waits for the other."""
    token = CancellationToken()
    closed = []
    registrations = []
    for me, other in ((0, 1), (1, 0)):
        registrations.append(
            token.on_cancel(lambda me=me, other=other: closed.append((me, registrations[other].close())))
        )
    token.cancel()
    assert closed == [(1, True)]


def test_two_running_callbacks_may_close_each_other():
    """On two threads, both running, each closes the other and neither waits: no deadlock."""
    tokens = CancellationToken(), CancellationToken()
    both = threading.Barrier(2)
    closed = []

    def close(number):
        both.wait(WAIT)
        closed.append(registrations[number].close())
        both.wait(WAIT)

    registrations = [tokens[0].on_cancel(close, 1), tokens[1].on_cancel(close, 0)]
    runners = [Runner(token.cancel) for token in tokens]
    assert all(runner.result() for runner in runners)
    assert closed == [False, False]


# --- closing -------------------------------------------------------------------------------------------------------


def test_a_closed_registration_is_never_called():
    """close() says True when it came in time, and then the callback never runs."""
    token = CancellationToken()
    called = []
    registration = token.on_cancel(called.append, 1)
    assert registration.close() is True
    assert registration.close() is False
    with token.on_cancel(called.append, 2):
        pass
    token.cancel()
    assert called == []


def test_close_waits_for_a_callback_that_runs_on_another_thread():
    """When close() returns, the callback is not running: what it touched may be freed."""
    token = CancellationToken()
    inside, go_on = threading.Event(), threading.Event()
    ended = []
    registration = token.on_cancel(lambda: (inside.set(), go_on.wait(WAIT), ended.append(True)))
    canceller = Runner(token.cancel)
    assert inside.wait(WAIT)
    closer = Runner(lambda: (registration.close(), list(ended)))
    until(lambda: "close" in stack_names(closer))
    assert closer.is_alive()
    go_on.set()
    assert closer.result() == (False, [True])
    canceller.result()


def stack_names(thread):
    import sys

    frame = sys._current_frames().get(thread.ident)
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def test_close_without_waiting_returns_while_the_callback_runs():
    """close(wait=False) is for callers that hold a lock which the callback wants."""
    token = CancellationToken()
    inside, go_on = threading.Event(), threading.Event()
    registration = token.on_cancel(lambda: (inside.set(), go_on.wait(WAIT)))
    canceller = Runner(token.cancel)
    assert inside.wait(WAIT)
    assert registration.close(wait=False) is False
    assert "running" in repr(registration)
    go_on.set()
    canceller.result()
    assert "ended" in repr(registration)


def test_a_callback_may_close_its_own_registration():
    """Closing from within does not wait for itself."""
    token = CancellationToken()
    closed = []
    registration = token.on_cancel(lambda: closed.append(registration.close()))
    assert "waiting" in repr(registration)
    token.cancel()
    assert closed == [False]


def test_close_does_not_wait_on_a_thread_that_runs_another_callback():
    """A thread that itself runs a cancel callback never waits for one, so no circle of waiting can form."""
    slow, quick = CancellationToken(), CancellationToken()
    inside, go_on = threading.Event(), threading.Event()
    registration = slow.on_cancel(lambda: (inside.set(), go_on.wait(WAIT)))
    canceller = Runner(slow.cancel)
    assert inside.wait(WAIT)
    closed = []
    quick.on_cancel(lambda: closed.append(registration.close()))
    quick.cancel()
    assert closed == [False]
    assert canceller.is_alive()
    go_on.set()
    canceller.result()


# --- which thread --------------------------------------------------------------------------------------------------


def cancel_by_timer(token):
    return token.child(timeout=0.05)


def cancel_by_library(token):
    cancel_from_library(token, kind=CancelKind.CLIENT_DISCONNECTED)
    return token


@pytest.mark.parametrize("cancel", [cancel_by_timer, cancel_by_library])
def test_a_cancel_by_the_library_hands_callbacks_to_a_worker(cancel):
    """Timer and watcher threads never run user code: the callbacks run on a worker, newest first."""
    token = CancellationToken()
    calls = []
    done = threading.Event()
    token = cancel(token) if cancel is cancel_by_timer else token
    token.on_cancel(done.set)
    token.on_cancel(lambda: calls.append(threading.current_thread().name))
    if cancel is cancel_by_library:
        cancel(token)
    assert done.wait(WAIT)
    assert calls == [IDLE_NAME]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_blocking_callback_always_runs_on_a_worker(when):
    """blocking=True gets a thread of its own, even if a user cancels, and even if it comes too late."""
    token = CancellationToken()
    ran = []
    done = threading.Event()
    if when == "after":
        token.cancel()
    token.on_cancel(lambda: (ran.append(here()), done.set()), blocking=True)
    token.cancel()
    assert done.wait(WAIT)
    assert ran != [here()]


def test_a_blocking_callback_keeps_nobody_waiting():
    """cancel() returns, and all other callbacks run, while a blocking one still blocks; close() waits for it."""
    token = CancellationToken()
    inside, go_on = threading.Event(), threading.Event()
    calls = []
    token.on_cancel(calls.append, "quick")
    registration = token.on_cancel(lambda: (inside.set(), go_on.wait(WAIT), calls.append("slow")), blocking=True)
    assert token.cancel() is True
    assert calls == ["quick"]
    assert inside.wait(WAIT)
    closer = Runner(registration.close)
    go_on.set()
    assert closer.result() is False
    assert calls == ["quick", "slow"]


def test_a_slow_callback_does_not_delay_another_tokens_deadline():
    """While a callback of one expired token blocks, another's deadline is kept within 50 ms."""
    go_on = threading.Event()
    slow = CancellationToken(timeout=0.005)
    registrations = [slow.on_cancel(go_on.wait, WAIT) for _ in range(3)]
    assert slow.wait(WAIT)
    late = []
    for _ in range(5):
        token = CancellationToken(timeout=0.02)
        fired = threading.Event()
        token.on_cancel(fired.set)
        assert fired.wait(WAIT)
        late.append(time.monotonic() - token.deadline)
    go_on.set()
    for registration in registrations:
        registration.close()
    assert sorted(late)[2] < 0.05


def test_callbacks_run_on_the_librarys_thread_if_no_other_can_be_had(monkeypatch):
    """Late is better than never: where no worker can be started, whoever cancels runs them, and says so."""
    assert drain()

    def none(target, name):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_primitives, "start_thread", none)
    token = CancellationToken()
    calls = []
    token.on_cancel(calls.append, "plain")
    token.on_cancel(calls.append, "blocking", blocking=True)
    with hearing(events.ThreadFailed) as heard:
        cancel_from_library(token, kind=CancelKind.SHUTDOWN)
    assert calls == ["blocking", "plain"]
    assert heard.qsize() == 2
