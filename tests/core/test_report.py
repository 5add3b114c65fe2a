"""The receipt of a scope: what it counts, what it measures, and its JSON."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import pytest
from actors import WAIT, Gate, Sleeper, fail, hearing, spawn_from_outside

from tokenscope import (
    CancellationToken,
    ScopeReport,
    TaskCounts,
    ThreadScope,
    check,
    current_token,
    defer,
    sleep,
)
from tokenscope._core import events


def test_the_report_counts_how_tasks_ended():
    """Each task in exactly one of finished, failed, cancelled, never started; spawned is the sum."""
    gate, sleeper = Gate(), Sleeper()
    with pytest.raises(ExceptionGroup):
        with ThreadScope(max_threads=2, on_error="collect") as scope:
            scope.spawn(str)
            scope.spawn(fail, ValueError())
            scope.join(WAIT)
            scope.spawn(sleeper.sleep)
            scope.spawn(gate.hold)
            for _ in range(3):
                scope.spawn(str)
            sleeper.await_arrival()
            gate.await_arrival()
            assert scope.report.tasks.spawned == 7
            scope.cancel()
            gate.open()
    assert scope.report.tasks == TaskCounts(spawned=7, finished=2, failed=1, cancelled=1, never_started=3)


def test_the_report_may_be_read_at_any_time_and_is_final_at_the_end():
    """While it is open the outcome is `running`; afterwards it is one frozen object."""
    with ThreadScope(name="s") as scope:
        task = scope.spawn(str)
        task.result(WAIT)
        assert scope.join(WAIT)
        early = scope.report
    assert (early.outcome, early.name, early.tasks.finished) == ("running", "s", 1)
    final = scope.report
    assert final is scope.report
    assert final.outcome == "succeeded"
    with pytest.raises(dataclasses.FrozenInstanceError):
        final.outcome = "other"


def test_errors_are_in_the_report_in_full_and_once():
    """With their frames, the body's first."""
    body, child = ValueError("body"), KeyError("child")
    with pytest.raises(ExceptionGroup):
        with ThreadScope(on_error="collect") as scope:
            scope.spawn(fail, child)
            scope.defer(fail, child)
            raise body
    assert scope.report.errors == (body, child)
    assert child.__traceback__ is not None


def test_the_reasons_cause_has_no_frames_but_the_report_has_the_error():
    """A token must not keep a stack alive; whoever reads the report wants it."""
    with pytest.raises(ExceptionGroup):
        with ThreadScope() as scope:
            scope.spawn(fail, ValueError("child"))
    assert scope.token.reason.cause.args == ("child",)
    assert scope.token.reason.cause.__traceback__ is None
    assert scope.report.errors[0].__traceback__ is not None


def test_stop_duration_counts_from_the_cancel_to_the_last_end():
    """It covers a child that took its time, and is None without a cancel."""
    gate, marks = Gate(), {}

    def end_late():
        gate.hold()
        marks["ending"] = time.monotonic()

    with ThreadScope() as scope:
        scope.spawn(end_late)
        gate.await_arrival()
        scope.cancel()
        marks["cancelled"] = time.monotonic()
        gate.open()
    took = marks["ending"] - marks["cancelled"]
    assert scope.report.stop_duration >= took
    assert scope.report.duration >= scope.report.stop_duration
    with ThreadScope() as healthy:
        healthy.spawn(str)
    assert healthy.report.stop_duration is None
    assert healthy.report.post_cancel_work == 0


def test_a_scope_that_was_cancelled_with_nothing_left_to_stop_stopped_at_once():
    """stop_duration is 0 when no child ended after the cancel."""
    with ThreadScope() as scope:
        scope.spawn(str).result(WAIT)
        assert scope.join(WAIT)
        scope.cancel()
    assert scope.report.stop_duration == 0


def test_post_cancel_work_sums_the_childrens_own_code_after_the_cancel():
    """Two children that went on for as long as a third held them are counted twice that; cleanups are not."""
    gate, marks, both = Gate(), {}, threading.Barrier(2, timeout=WAIT)

    def go_on():
        both.wait()
        gate.hold()

    def clean():
        begin = time.monotonic()
        threading.Event().wait(0.2)
        marks["cleanup"] = time.monotonic() - begin

    with ThreadScope() as scope:
        for _ in range(2):
            scope.spawn(go_on)
        gate.await_arrival()
        scope.cancel()
        marks["cancelled"] = time.monotonic()
        assert current_token().wait(WAIT)
        marks["opened"] = time.monotonic()
        gate.open()
    assert scope.report.post_cancel_work >= 2 * (marks["opened"] - marks["cancelled"])
    with ThreadScope() as scope:
        sleeper = Sleeper()
        scope.spawn(lambda: (defer(clean), sleeper.sleep()))
        sleeper.await_arrival()
        scope.cancel()
    assert scope.report.post_cancel_work < marks["cleanup"] <= scope.report.stop_duration


def test_late_events_count_results_and_refused_spawns():
    """What came after the cancel, by kind; with an event each time a spawn is refused."""
    gate, other = Gate(), Gate()
    with hearing(events.LateEvent) as heard:
        with ThreadScope(name="s") as scope:
            for each in (gate, other):
                scope.spawn(each.hold)
                each.await_arrival()
            scope.cancel()
            assert spawn_from_outside(scope)
            gate.open()
            other.open()
    assert scope.report.late_events == {"results": 2, "spawns": 1}
    assert heard.get(timeout=WAIT) == events.LateEvent("s", "spawns")


def test_a_cancelled_scope_reports_the_reason_object():
    """The same that the token and every Cancelled hold."""
    parent = CancellationToken(name="parent")
    with pytest.raises(BaseException) as caught:
        with ThreadScope(token=parent) as scope:
            parent.cancel("gone", kind="client_disconnected", tag="t")
            check()
    assert scope.report.reason is parent.reason is caught.value.reason


def test_the_json_of_a_report_can_be_read_back():
    """One line, plain values, exceptions as text, post-cancel work in milliseconds."""
    gate = Gate()
    with pytest.raises(ExceptionGroup):
        with ThreadScope(name="s") as scope:
            scope.spawn(gate.hold)
            gate.await_arrival()
            scope.spawn(fail, ValueError("child"), name="c")
            scope.token.wait(WAIT)
            gate.open()
    line = scope.report.to_json()
    assert "\n" not in line
    told = json.loads(line)
    assert told["name"] == "s"
    assert told["outcome"] == "failed"
    assert told["reason"] == {"kind": "sibling_failed", "tag": None, "source": "c"}
    assert told["tasks"] == {"spawned": 2, "finished": 1, "failed": 1, "cancelled": 0, "never_started": 0}
    assert told["errors"] == ["ValueError('child')"]
    assert told["post_cancel_work_ms"] == scope.report.post_cancel_work * 1000 > 0
    assert told == json.loads(json.dumps(scope.report.as_dict()))
    assert json.loads(ScopeReport("empty", "running").to_json())["reason"] is None


def test_events_tell_the_life_of_a_scope():
    """Opened, spawned, ended, ended: with names and outcomes, the report last."""
    kinds = (events.ScopeOpened, events.TaskSpawned, events.TaskEnded, events.ScopeEnded)
    with hearing(*kinds) as heard:
        with ThreadScope(name="s") as scope:
            scope.spawn(str, name="t").result(WAIT)
    told = [heard.get(timeout=WAIT) for _ in range(4)]
    assert told[0] == events.ScopeOpened("s")
    assert sorted(told[1:3], key=repr) == [
        events.TaskEnded("s", "t", "succeeded"),
        events.TaskSpawned("s", "t"),
    ]
    assert told[3] == events.ScopeEnded("s", scope.report)


def test_a_queued_task_that_never_started_is_told_as_such():
    """TaskEnded says never_started, once per task."""
    gate = Gate()
    with hearing(events.TaskEnded) as heard:
        with ThreadScope(max_threads=1) as scope:
            scope.spawn(gate.hold, name="first")
            scope.spawn(str, name="second")
            gate.await_arrival()
            scope.cancel()
            gate.open()
    told = sorted((heard.get(timeout=WAIT) for _ in range(2)), key=lambda event: event.task)
    assert [(event.task, event.outcome) for event in told] == [
        ("first", "succeeded"),
        ("second", "never_started"),
    ]
    assert heard.empty()


def test_a_cancelled_sleep_counts_as_cancelled_and_not_as_late():
    """A child that obeyed leaves no late event."""
    with ThreadScope() as scope:
        sleeper = Sleeper()
        scope.spawn(sleeper.sleep)
        sleeper.await_arrival()
        scope.cancel()
        sleep(WAIT)
    assert scope.report.late_events == {}
    assert scope.report.tasks.cancelled == 1
