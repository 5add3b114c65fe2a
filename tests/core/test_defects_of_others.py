"""Defects found in comparable libraries, in other languages too: each is shown to be absent here."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from actors import WAIT, Gate, Sleeper, fail, run_program, spawn_from_outside

from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    ScopeClosed,
    TaskCancelled,
    ThreadScope,
    fail_after,
    sleep,
)


def test_a_scope_cut_by_its_deadline_never_reports_success():
    """Neither when the body swallowed the cancel and returned, nor when only a child was cut."""
    for body in (swallow, lambda scope: scope.spawn(sleep, WAIT)):
        with pytest.raises(DeadlineExceeded):
            with ThreadScope(timeout=0.02) as scope:
                body(scope)
        assert scope.report.outcome == "deadline"


def swallow(scope):
    with contextlib.suppress(BaseException):
        sleep(WAIT)


def test_a_cancelled_scope_whose_body_returns_normally_says_that_it_was_cancelled():
    """The caller can tell: cancelled_caught and the report."""
    with ThreadScope() as scope:
        scope.cancel()
        swallow(scope)
    assert scope.cancelled_caught
    assert scope.report.outcome == "cancelled"


def test_a_child_that_fails_while_nobody_waits_for_it_kills_no_process():
    """Its error is kept for the scope, which raises it; nothing is printed, nothing dies."""
    said = run_program("""
        import threading
        from tokenscope import ThreadScope
        def fails():
            raise ValueError("nobody waits")
        try:
            with ThreadScope() as scope:
                scope.spawn(fails)
                scope.token.wait(10)
        except ExceptionGroup as group:
            print(group.exceptions[0])
    """)
    assert said == "nobody waits"


def test_a_time_limit_returns_only_when_its_work_has_ended():
    """A scope with a timeout whose child ignores the cancel is left after that child, not before."""
    gate, ended = Gate(), []

    def ignores():
        gate.hold()
        ended.append(True)

    def open_late():
        gate.await_arrival()
        scope.token.wait(WAIT)
        gate.open()

    with pytest.raises(DeadlineExceeded):
        with ThreadScope(timeout=0.05) as scope:
            scope.spawn(ignores)
            threading.Thread(target=open_late).start()
            sleep(WAIT)
    assert ended == [True]


def test_the_loser_of_a_race_has_ended_when_the_race_is_over():
    """First result wins, the scope is cancelled with `race_lost`, and no loser runs on after it."""
    sleeper = Sleeper()
    with ThreadScope() as scope:
        for _ in range(3):
            scope.spawn(sleeper.sleep)
        sleeper.await_arrival(3)
        winner = scope.spawn(str, "won").result(WAIT)
        scope.cancel(kind="race_lost")
    assert winner == "won"
    assert sleeper.left(3) == ["race_lost"] * 3
    assert scope.snapshot().tasks == ()


def test_a_deadline_that_was_not_needed_keeps_no_process_alive():
    """A scope of two milliseconds with an hour's timeout lets the process end at once."""
    began = time.monotonic()
    run_program("""
        from tokenscope import ThreadScope, fail_after
        with ThreadScope(timeout=3600) as scope:
            scope.spawn(str).result(10)
        with fail_after(3600):
            pass
    """)
    assert time.monotonic() - began < 5


def test_the_second_failure_is_not_lost():
    """Nor the third, of a cleanup."""
    errors, go = (
        [ValueError("first"), KeyError("second"), OSError("cleanup")],
        threading.Barrier(2, timeout=WAIT),
    )

    def fails(error):
        go.wait()
        raise error

    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.defer(fail, errors[2])
            for error in errors[:2]:
                scope.spawn(fails, error)
    assert set(caught.value.exceptions) == set(errors)


def test_cancelling_a_parent_cancels_the_child_scope_itself():
    """Not only its tasks: its token, its callbacks; and it takes no more work."""
    parent, called = CancellationToken(), []
    with pytest.raises(Cancelled):
        with ThreadScope(token=parent) as scope:
            scope.token.on_cancel(called.append, "told")
            parent.cancel("gone")
            assert scope.token.cancelled
            assert called == ["told"]
            refused = spawn_from_outside(scope)
            assert isinstance(refused, ScopeClosed)
            assert refused.reason is parent.reason
            scope.spawn(str)


def test_awaiting_one_cancelled_child_does_not_leave_its_siblings_running():
    """A body that lets TaskCancelled through has failed: the siblings are cancelled at once."""
    sleeper = Sleeper()
    with pytest.raises(TaskCancelled):
        with ThreadScope() as scope:
            one, _other = scope.spawn(sleeper.sleep), scope.spawn(sleeper.sleep)
            sleeper.await_arrival(2)
            one.cancel()
            one.result(WAIT)
    assert sorted(sleeper.left(2)) == ["body_failed", "manual"]


def test_spawning_on_a_cancelling_scope_carries_the_reason():
    """From inside its tree as Cancelled, from outside as ScopeClosed: both with why."""
    with ThreadScope() as scope:
        scope.cancel("enough")
        outside = spawn_from_outside(scope)
        with pytest.raises(Cancelled) as inside:
            scope.spawn(str)
    assert type(outside) is ScopeClosed
    assert outside.reason is inside.value.reason is scope.token.reason


def test_the_siblings_of_a_failing_child_are_cancelled_at_once():
    """Ten sleepers of ten seconds are gone long before that, joined, when the scope raises."""
    sleeper, gate = Sleeper(), Gate()
    began = time.monotonic()
    with pytest.raises(ExceptionGroup):
        with ThreadScope() as scope:
            for _ in range(10):
                scope.spawn(sleeper.sleep)
            sleeper.await_arrival(10)
            scope.spawn(gate.fail, ValueError())
            gate.open()
    assert time.monotonic() - began < WAIT / 2
    assert sleeper.left(10) == ["sibling_failed"] * 10


def test_a_time_limit_of_somebody_else_is_not_taken_for_ones_own():
    """The deadline that passed surfaces at the boundary that owns it, and the inner one says nothing."""
    with pytest.raises(DeadlineExceeded) as caught:
        with fail_after(0.02, name="outer"):
            with fail_after(WAIT, name="inner"):
                sleep(WAIT)
    assert caught.value.reason.source == "outer"
