"""Cleanups: newest first, each once, all of them, out of reach of cancels, in time, told what happened."""

from __future__ import annotations

import contextlib
import threading

import pytest
from actors import WAIT, Gate, Sleeper, fail, hearing

from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    ScopeClosed,
    TaskCancelled,
    ThreadScope,
    check,
    current_token,
    defer,
    shield,
    sleep,
)
from tokenscope._core import events
from tokenscope._core.current import standing_back


class Resource:
    """A context manager that remembers what it was told."""

    def __init__(self, *, suppress=False) -> None:
        self.told: list[BaseException | None] = []
        self.suppress = suppress

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is (None if error is None else type(error))
        assert trace is (None if error is None else error.__traceback__)
        self.told.append(error)
        return self.suppress


def test_cleanups_run_newest_first_after_all_children():
    """In reverse order, with their arguments, when no child lives any more."""
    order, gate = [], Gate()
    with ThreadScope() as scope:
        scope.defer(order.append, 1)
        scope.defer(lambda *args, **kwargs: order.append((args, kwargs)), 2, three=3)
        scope.defer(lambda: order.append(scope.snapshot().tasks))
        child = scope.spawn(lambda: order.append(gate.hold("child")))
        gate.open()
    assert child.done()
    assert order == ["child", (), ((2,), {"three": 3}), 1]


@pytest.mark.parametrize("end", ["return", "body fails", "child fails", "cancel", "deadline", "interrupt"])
def test_cleanups_run_however_the_scope_ends(end):
    """Each exactly once."""
    ran = []
    with pytest.raises(BaseException) as caught:
        with ThreadScope(timeout=0.01 if end == "deadline" else None) as scope:
            scope.defer(ran.append, "once")
            if end == "body fails":
                raise ValueError
            if end == "child fails":
                scope.spawn(fail, ValueError())
            if end == "interrupt":
                raise KeyboardInterrupt
            if end == "cancel":
                scope.cancel()
            if end in ("cancel", "deadline"):
                sleep(WAIT)
        raise LookupError(end)
    assert ran == ["once"]
    assert isinstance(caught.value, LookupError) == (end in ("return", "cancel"))


def test_cleanups_are_out_of_reach_of_every_cancel():
    """In a scope that was cancelled, by whomever, a cleanup's checkpoints return."""
    parent, seen = CancellationToken(), []

    def clean():
        check()
        sleep(0)
        with ThreadScope() as inner:
            seen.append(inner.spawn(lambda: check() or "helper").result(WAIT))
        seen.append((standing_back(), current_token().cancelled))

    with pytest.raises(Cancelled):
        with ThreadScope(token=parent, timeout=WAIT) as scope:
            scope.defer(clean)
            parent.cancel()
            scope.cancel()
            check()
    assert seen == ["helper", (True, False)]
    assert standing_back() is False


def test_a_failing_cleanup_stops_no_other():
    """All run, all failures are told, newest first, with an event each."""
    ran, first, second = [], ValueError("first"), KeyError("second")
    with hearing(events.CleanupFailed) as heard:
        with pytest.raises(ExceptionGroup) as caught:
            with ThreadScope(name="s") as scope:
                scope.defer(ran.append, 1)
                scope.defer(fail, first)
                scope.defer(ran.append, 2)
                scope.defer(fail, second)
    assert ran == [2, 1]
    assert caught.value.exceptions == (second, first)
    assert scope.report.errors == (second, first)
    told = [heard.get(timeout=WAIT) for _ in range(2)]
    assert [(event.owner, event.cleanup, event.error) for event in told] == [
        ("s", "fail", second),
        ("s", "fail", first),
    ]


def test_all_cleanups_share_one_time_limit():
    """After cleanup_timeout the rest still run, with a cancelled token; the one that overran has failed."""
    seen = []

    def overrun():
        sleep(WAIT)

    def short():
        seen.append(current_token().cancelled)
        check()

    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope(cleanup_timeout=0.02) as scope:
            scope.defer(seen.append, "last")
            scope.defer(short)
            scope.defer(overrun)
    assert seen == [True, "last"]
    assert [type(error) for error in caught.value.exceptions] == [DeadlineExceeded] * 2
    assert "overrun" in str(caught.value.exceptions[0])
    assert scope.report.outcome == "failed"
    check()


def test_a_cleanup_that_swallows_the_end_of_its_time_is_still_told():
    """Eating Cancelled does not make an overrun look like a cleanup."""

    def swallow():
        with contextlib.suppress(Cancelled):
            sleep(WAIT)

    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope(cleanup_timeout=0.01) as scope:
            scope.defer(swallow)
    assert [type(error) for error in caught.value.exceptions] == [DeadlineExceeded]
    assert scope.report.outcome == "failed"


def test_a_cleanup_that_overruns_deaf_is_named_with_its_stack():
    """The event comes while it still runs, and names it, also after it deferred something itself."""
    gate, ran = Gate(), []
    with hearing(events.CleanupOverran) as heard:

        def deaf():
            scope.defer(ran.append, "deferred by a cleanup")
            told.append(heard.get(timeout=WAIT))

        told: list[events.CleanupOverran] = []
        with ThreadScope(cleanup_timeout=0.02, name="s") as scope:
            scope.defer(deaf)
            gate.open()
    assert told[0].owner == "s"
    assert told[0].cleanup.endswith("deaf")
    assert "heard.get(timeout=WAIT)" in told[0].stack
    assert ran == ["deferred by a cleanup"]


def test_the_cleanup_that_overran_is_named_not_the_next_one():
    """The event comes a moment after the time was up; by then the guilty one may have ended, and another one run."""
    with hearing(events.CleanupOverran) as heard:

        def innocent():
            told.append(heard.get(timeout=WAIT))
            scope._cleanups._tell_overrun(threading.get_ident())  # as a worker does that got no processor until now
            told.append(heard.get(timeout=WAIT))

        def guilty():
            current_token().wait(WAIT)  # and goes on as if nothing had happened

        told: list[events.CleanupOverran] = []
        with ThreadScope(cleanup_timeout=0.02) as scope:
            scope.defer(innocent)
            scope.defer(guilty)
    assert [event.cleanup.endswith("guilty") for event in told] == [True, True]
    assert told[1].stack == ""  # it has none any more


def test_no_time_for_cleanups_still_runs_them():
    """cleanup_timeout=0: they begin with a cancelled token."""
    seen = []
    with ThreadScope(cleanup_timeout=0) as scope:
        scope.defer(lambda: seen.append(current_token().cancelled))
    assert seen == [True]


def test_the_time_for_cleanups_may_be_unlimited():
    """cleanup_timeout=None sets no deadline."""
    seen = []
    with ThreadScope(cleanup_timeout=None) as scope:
        scope.defer(lambda: seen.append(current_token().deadline))
    assert seen == [None]


def test_a_cleanup_may_defer_another():
    """What a cleanup defers is run next."""
    order = []
    with ThreadScope() as scope:
        scope.defer(order.append, "old")
        scope.defer(lambda: (scope.defer(order.append, "deferred"), order.append("new")))
    assert order == ["new", "deferred", "old"]


def test_a_context_manager_gets_none_when_all_went_well():
    """enter_context returns what __enter__ did, and leaves without an error."""
    resource = Resource()
    with ThreadScope() as scope:
        assert scope.enter_context(resource) is resource
        assert resource.told == []
    assert resource.told == [None]


def test_a_context_manager_gets_the_outcome_as_its_exception():
    """The failure of a mere child, in the very group that leaves."""
    resource, error = Resource(), ValueError("child")
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.enter_context(resource)
            scope.spawn(fail, error)
    (told,) = resource.told
    assert isinstance(told, ExceptionGroup)
    assert told.exceptions == caught.value.exceptions == (error,)


@pytest.mark.parametrize("how", ["body", "own cancel", "own cancel swallowed", "ancestor", "deadline"])
def test_a_context_manager_is_told_of_every_way_to_be_cut_short(how):
    """Body error, absorbed and swallowed cancels, an ancestor's, the deadline: all look like an exception."""
    resource, parent, body = Resource(), CancellationToken(), ValueError("body")
    expected = {"body": ValueError, "deadline": DeadlineExceeded}.get(how, Cancelled)
    leaves = contextlib.nullcontext() if how.startswith("own") else pytest.raises(expected)
    with leaves:
        with ThreadScope(token=parent, timeout=0.02 if how == "deadline" else None) as scope:
            scope.enter_context(resource)
            if how == "body":
                raise body
            if how == "ancestor":
                parent.cancel()
            elif how != "deadline":
                scope.cancel()
            try:
                sleep(WAIT)
            except Cancelled:
                if how != "own cancel swallowed":
                    raise
    assert [type(error) for error in resource.told] == [expected]


def test_a_context_manager_cannot_suppress_the_outcome():
    """Returning True from __exit__ swallows nothing of the scope's."""
    resource, error = Resource(suppress=True), ValueError("body")
    with pytest.raises(ValueError, match="body") as caught:
        with ThreadScope() as scope:
            scope.enter_context(resource)
            raise error
    assert caught.value is error
    assert resource.told == [error]


def test_context_managers_and_functions_share_one_order():
    """They are left in reverse order of being entered and deferred."""
    order = []

    class Named:
        def __enter__(self):
            return order

        def __exit__(self, *_):
            order.append("manager")

    with ThreadScope() as scope:
        scope.defer(order.append, "first")
        scope.enter_context(Named())
        scope.defer(order.append, "last")
    assert order == ["last", "manager", "first"]


def test_a_context_manager_that_fails_to_enter_is_not_left():
    """Its error comes out of enter_context and nothing is registered."""

    class Broken:
        def __enter__(self):
            raise ValueError("enter")

        def __exit__(self, *_):
            raise AssertionError("left without having been entered")

    with ThreadScope() as scope:
        with pytest.raises(ValueError, match="enter"):
            scope.enter_context(Broken())


# --- tasks --------------------------------------------------------------------------------------------------


def test_defer_in_a_task_runs_on_its_thread_at_its_end():
    """Newest first, before the task is done, on its thread, shielded, while the scope's own cleanups wait."""
    order = []

    def work():
        defer(order.append, "older")
        defer(lambda: order.append((threading.get_ident() == me, standing_back())))
        me = threading.get_ident()
        order.append("work")

    with ThreadScope() as scope:
        defer(order.append, "the scope's")
        task = scope.spawn(work)
        task.result(WAIT)
        assert order == ["work", (True, True), "older"]
    assert order[-1] == "the scope's"


def test_defer_in_a_cancelled_task_is_out_of_reach_of_the_cancel():
    """The task's cleanup can do blocking work although the task was cancelled."""
    sleeper, cleaned = Sleeper(), []

    def work():
        defer(lambda: (sleep(0), cleaned.append(True)))
        sleeper.sleep()

    with ThreadScope() as scope:
        scope.spawn(work)
        sleeper.await_arrival()
        scope.cancel()
    assert cleaned == [True]


def test_a_task_whose_cleanup_fails_has_failed():
    """Even if its own work succeeded; the error is the cleanup's."""
    error = ValueError("cleanup")
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            task = scope.spawn(lambda: defer(fail, error))
    assert caught.value.exceptions == (error,)
    assert task.exception() is error


def test_a_task_that_fails_and_whose_cleanups_fail_tells_all():
    """One group: the work's error first."""
    errors = [ValueError("work"), KeyError("new"), OSError("old")]

    def work():
        defer(fail, errors[2])
        defer(fail, errors[1])
        raise errors[0]

    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.spawn(work, name="worker")
    (group,) = caught.value.exceptions
    assert list(group.exceptions) == errors
    assert "worker" in str(group)


def test_a_tasks_cleanups_have_the_scopes_time_limit():
    """cleanup_timeout holds for a task's cleanups, too."""
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope(cleanup_timeout=0.01) as scope:
            scope.spawn(lambda: defer(sleep, WAIT))
    assert [type(error) for error in caught.value.exceptions] == [DeadlineExceeded]


def test_defer_in_the_body_belongs_to_the_innermost_scope():
    """Each scope runs its own cleanups."""
    order = []
    with ThreadScope():
        defer(order.append, "outer")
        with ThreadScope():
            defer(order.append, "inner")
        order.append("between")
    assert order == ["inner", "between", "outer"]


def test_defer_inside_a_shield_still_belongs_to_the_scope():
    """A shield changes the token, not the owner."""
    order = []
    with ThreadScope():
        with shield():
            defer(order.append, "cleanup")
        order.append("body")
    assert order == ["body", "cleanup"]


# --- bad input ----------------------------------------------------------------------------------------------


def test_defer_outside_of_any_scope_is_an_error_with_help():
    """There is nobody to run it."""
    with pytest.raises(LookupError, match="ThreadScope"):
        defer(print)


@pytest.mark.parametrize("bad", [None, 5, "print"])
def test_what_cannot_be_called_or_entered_is_refused_at_the_call(bad):
    """Defer takes callables, enter_context takes context managers: of scope, task and front door."""
    with ThreadScope() as scope:
        for refuse in (scope.defer, defer):
            with pytest.raises(TypeError, match="callable"):
                refuse(bad)
        with pytest.raises(TypeError, match="context manager"):
            scope.enter_context(bad)
        gate = Gate()
        task = scope.spawn(gate.hold)
        gate.await_arrival()
        with pytest.raises(TypeError, match="callable"):
            task.defer(bad)
        gate.open()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cleanup_that_no_scope_would_run_is_refused(when):
    """Defer and enter_context need a scope that lives; the manager is not entered otherwise."""
    resource = Resource()
    scope = ThreadScope()
    if when == "after":
        with scope:
            pass
    error = RuntimeError if when == "before" else ScopeClosed
    with pytest.raises(error):
        scope.defer(print)
    with pytest.raises(error):
        scope.enter_context(resource)
    assert resource.told == []


def test_a_cleanup_that_meets_a_foreign_cancel_is_told_with_the_cause():
    """A cleanup that checks a cancelled token explicitly has failed, with that token's reason."""
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.cancel("mine")
            scope.defer(scope.token.check)
    (error,) = caught.value.exceptions
    assert isinstance(error, TaskCancelled)
    assert error.reason is scope.token.reason
