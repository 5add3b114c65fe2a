"""The law of Cancelled: who gets it, what it carries, who absorbs it, what never looks like a success."""

from __future__ import annotations

import contextlib
import sqlite3
import threading

import pytest
from actors import WAIT, Gate, Sleeper, fail, hearing

import tokenscope
from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    TaskCancelled,
    ThreadScope,
    check,
    current_token,
    shield,
    sleep,
    use_token,
)
from tokenscope._core import events

# --- who gets it --------------------------------------------------------------------------------------------


def test_a_healthy_body_that_awaits_a_cancelled_task_gets_task_cancelled():
    """result() and exception() of a cancelled task raise TaskCancelled with its reason, never Cancelled."""
    sleeper = Sleeper()
    with ThreadScope() as scope:
        task = scope.spawn(sleeper.sleep)
        sleeper.await_arrival()
        task.cancel("not needed", tag="t")
        for ask in (task.result, task.exception):
            with pytest.raises(TaskCancelled) as caught:
                ask(WAIT)
            assert caught.value.reason is task.token.reason
            assert not isinstance(caught.value, Cancelled)
        check()
    assert scope.report.outcome == "succeeded"


def test_a_cancelled_body_that_awaits_a_cancelled_task_gets_cancelled():
    """The caller's own cancel is looked at first."""
    sleeper = Sleeper()
    with ThreadScope() as scope:
        task = scope.spawn(sleeper.sleep)
        sleeper.await_arrival()
        scope.cancel()
        sleeper.left()
        with pytest.raises(Cancelled):
            task.result(WAIT)


def test_a_foreign_cancelled_in_a_child_is_a_failure():
    """A Cancelled that is not the child's own reaches nobody as such: it becomes TaskCancelled."""
    other = CancellationToken(name="other")
    other.cancel("theirs")
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            task = scope.spawn(other.check)
            assert isinstance(task.exception(WAIT), TaskCancelled)
    (error,) = caught.value.exceptions
    assert isinstance(error, TaskCancelled)
    assert error.reason is other.reason
    assert isinstance(error.__cause__, Cancelled)
    assert scope.report.tasks.failed == 1


def test_a_foreign_cancelled_in_the_body_passes_and_stops_the_children():
    """The scope absorbs only what began at it; what is not its own is a failure of its body."""
    other, sleeper = CancellationToken(), Sleeper()
    other.cancel()
    with pytest.raises(Cancelled) as caught:
        with ThreadScope() as scope:
            scope.spawn(sleeper.sleep)
            sleeper.await_arrival()
            other.check()
    assert caught.value.reason is other.reason
    assert sleeper.left() == ["body_failed"]
    assert scope.report.outcome == "failed"


def test_a_foreign_cancelled_in_a_cleanup_is_a_failure_and_no_cancelled():
    """A cleanup that meets somebody's cancel has not cleaned up: that is told as an ordinary error."""
    other = CancellationToken()
    other.cancel()
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.defer(other.check)
    (error,) = caught.value.exceptions
    assert isinstance(error, TaskCancelled)
    assert error.reason is other.reason


def test_the_scopes_own_cancel_never_leaves_it_inside_a_group():
    """A body that raises its Cancelled together with a failure leaves with the failure alone."""
    error = ValueError("beside it")

    def collect():
        try:
            check()
        except Cancelled as cancelled:
            raise BaseExceptionGroup("both", [cancelled, error]) from None

    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.cancel()
            collect()
    assert caught.value.exceptions == (error,)
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.spawn(lambda: (scope.cancel(), collect()))
    assert caught.value.exceptions[0].exceptions == (error,)


# --- what it carries ----------------------------------------------------------------------------------------


def test_cancelled_carries_the_same_reason_object_everywhere():
    """Body, child, grandchild and token hold one reason, by identity, and the origin's name."""
    ready, seen = threading.Barrier(3, timeout=WAIT), []
    request = CancellationToken(name="request")

    def wait_for_it():
        ready.wait()
        try:
            sleep(WAIT)
        except Cancelled as cancelled:
            seen.append(cancelled)
            raise

    def parent_of_one():
        with ThreadScope() as inner:
            inner.spawn(wait_for_it)
            wait_for_it()

    with pytest.raises(Cancelled) as caught:
        with ThreadScope(token=request) as scope:
            scope.spawn(parent_of_one)
            ready.wait()
            request.cancel("gone")
            sleep(WAIT)
    assert len(seen) == 2
    assert all(one.reason is request.reason for one in [caught.value, *seen])
    assert {one.origin for one in [caught.value, *seen]} == {"request"}
    assert scope.token.reason is request.reason


def test_an_explicit_token_never_drops_the_requests():
    """A scope with token= is cancelled by the current token as well as by the explicit one."""
    for pick in (0, 1):
        tokens = CancellationToken(name="request"), CancellationToken(name="explicit")
        sleeper = Sleeper()
        with use_token(tokens[0]), pytest.raises(Cancelled) as caught:
            with ThreadScope(token=tokens[1]) as scope:
                scope.spawn(sleeper.sleep)
                sleeper.await_arrival()
                tokens[pick].cancel()
                sleep(WAIT)
        assert caught.value.reason is tokens[pick].reason
        assert not tokens[1 - pick].cancelled


def test_nothing_can_cancel_the_token_outside_all_scopes():
    """Its cancel is an error, its children are roots, and scopes that are cancelled leave it alone."""
    outside = current_token()
    with pytest.raises(RuntimeError, match="outside"):
        outside.cancel()
    with pytest.raises(RuntimeError, match="outside"):
        CancellationToken.cancel(outside)
    outside.child().cancel()
    with ThreadScope() as scope:
        scope.cancel()
    with pytest.raises(DeadlineExceeded), ThreadScope(timeout=0):
        check()
    with pytest.raises(ExceptionGroup), ThreadScope() as scope:
        scope.spawn(fail, ValueError())
    with pytest.raises(Cancelled), ThreadScope(token=scope.token):
        check()
    assert current_token() is outside
    assert not outside.cancelled
    check()


# --- who may absorb it --------------------------------------------------------------------------------------


def test_except_exception_does_not_catch_it():
    """A retry loop that eats every Exception is still ended by a cancel."""
    attempts = []
    with ThreadScope() as scope:
        scope.cancel()
        while len(attempts) < 3:
            attempts.append(1)
            try:
                sleep(0)
            except Exception as error:  # the loop under test
                pytest.fail(f"caught {error!r}")
    assert len(attempts) == 1


def test_swallowing_it_once_does_not_save_you():
    """Every later checkpoint raises again."""
    raised = []
    with ThreadScope() as scope:
        scope.cancel()
        for checkpoint in (
            check,
            lambda: sleep(0),
            scope.join,
            lambda: scope.spawn(check),
            scope.token.check,
        ):
            try:
                checkpoint()
            except Cancelled:
                raised.append(checkpoint)
    assert len(raised) == 5


def test_a_shield_holds_it_off_and_hands_it_on():
    """Inside a shield nothing is cancelled; after it the next checkpoint raises what was held off."""
    parent = CancellationToken()
    with pytest.raises(Cancelled):
        with ThreadScope(token=parent):
            parent.cancel()
            with shield():
                check()
                with ThreadScope() as inner:
                    assert inner.spawn(lambda: check() or "ran").result(WAIT) == "ran"
            check()
            pytest.fail("the cancel was forgotten")


# --- what never looks like a success, and what never looks cut ----------------------------------------------


def test_a_body_that_finished_before_the_deadline_reached_it_returns_normally():
    """A deadline that met no checkpoint, blocked call or waiting task cut nothing short."""
    with ThreadScope(timeout=0.01) as scope:
        answer = scope.spawn(str, 1).result(WAIT)
        assert scope.token.wait(WAIT)
    assert answer == "1"
    assert scope.report.outcome == "succeeded"
    assert scope.report.reason.kind == "deadline"


def test_children_that_finished_in_spite_of_the_deadline_are_a_success():
    """Work that was not cut is not made to look cut."""
    gate = Gate()
    with ThreadScope(timeout=0.01) as scope:
        task = scope.spawn(gate.hold, "whole")
        assert scope.token.wait(WAIT)
        gate.open()
    assert task.result() == "whole"
    assert scope.report.outcome == "succeeded"
    assert scope.report.late_events == {"results": 1}


def test_a_swallowed_cancelled_of_the_own_deadline_is_no_success():
    """A body that eats Cancelled and returns still leaves as DeadlineExceeded."""
    with pytest.raises(DeadlineExceeded):
        with ThreadScope(timeout=0.01):
            with contextlib.suppress(BaseException):
                sleep(WAIT)


def test_a_swallowed_cancelled_of_an_ancestor_is_no_success():
    """A body that eats the request's Cancelled still leaves as Cancelled."""
    parent = CancellationToken()
    parent.cancel()
    with pytest.raises(Cancelled) as caught:
        with ThreadScope(token=parent):
            with contextlib.suppress(BaseException):
                check()
    assert caught.value.reason is parent.reason


def test_a_swallowed_cancelled_of_the_own_cancel_is_no_success():
    """The scope absorbs its own cancel and says so."""
    with ThreadScope() as scope:
        scope.cancel()
        with contextlib.suppress(BaseException):
            check()
    assert scope.cancelled_caught
    assert scope.report.outcome == "cancelled"


def test_a_cancelled_swallowed_by_a_child_is_no_success():
    """A child that turns its Cancelled into a return value does not make the deadline unseen."""
    started = threading.Event()

    def swallow():
        started.set()
        try:
            sleep(WAIT)
        except Cancelled:
            return "as if nothing had happened"

    with pytest.raises(DeadlineExceeded):
        with ThreadScope(timeout=0.02) as scope:
            task = scope.spawn(swallow)
            assert started.wait(WAIT)
    assert task.result() == "as if nothing had happened"
    assert scope.report.tasks.finished == 1


@pytest.fixture
def database():
    """A database with one empty table, in autocommit's opposite: changes wait for commit."""
    connection = sqlite3.connect(":memory:")
    connection.execute("create table note (text)")
    connection.commit()
    yield connection
    connection.close()


def count(database):
    return database.execute("select count(*) from note").fetchone()[0]


def test_a_transaction_entered_through_the_scope_rolls_back_when_only_a_child_failed(database):
    """The body wrote and returned; the child's failure is what the transaction sees."""
    gate = Gate()
    with pytest.raises(ExceptionGroup):
        with ThreadScope() as scope:
            scope.enter_context(database)
            scope.spawn(gate.fail, ValueError("child"))
            database.execute("insert into note values ('half done')")
            gate.open()
    assert not database.in_transaction
    assert count(database) == 0


@pytest.mark.parametrize("how", ["own cancel", "deadline", "ancestor", "swallowed"])
def test_a_transaction_entered_through_the_scope_rolls_back_when_it_was_cut_short(database, how):
    """Also a cancel that the scope absorbs, and one that the body swallowed, roll back."""
    parent = CancellationToken()
    try:
        with ThreadScope(token=parent, timeout=0.02 if how == "deadline" else None) as scope:
            scope.enter_context(database)
            database.execute("insert into note values ('half done')")
            if how in ("own cancel", "swallowed"):
                scope.cancel()
            elif how == "ancestor":
                parent.cancel()
            try:
                sleep(WAIT)
            except Cancelled:
                if how != "swallowed":
                    raise
    except (Cancelled, DeadlineExceeded):
        assert how in ("deadline", "ancestor")
    assert not database.in_transaction
    assert count(database) == 0


def test_a_transaction_entered_through_the_scope_commits_when_all_went_well(database):
    """Also when a cancel came that cut nothing short."""
    with ThreadScope() as scope:
        scope.enter_context(database)
        scope.spawn(str)
        database.execute("insert into note values ('whole')")
        scope.join(WAIT)
        scope.cancel("too late")
    assert count(database) == 1


def test_a_cancel_that_was_absorbed_is_still_told_to_listeners():
    """What the caller does not see as an exception is in the event of the scope's end."""
    with hearing(events.ScopeEnded) as heard:
        with ThreadScope() as scope:
            scope.cancel()
            check()
    assert heard.get(timeout=WAIT).report is scope.report


def test_the_law_holds_at_the_front_door():
    """Cancelled is no Exception; TaskCancelled is one that concurrent.futures knows."""
    import concurrent.futures

    assert not issubclass(tokenscope.Cancelled, Exception)
    assert issubclass(TaskCancelled, (concurrent.futures.CancelledError, tokenscope.TokenScopeError))
    assert issubclass(DeadlineExceeded, TimeoutError)
