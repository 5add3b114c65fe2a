"""Children that do not obey: told with name and stack, waited for or given up, and counted."""

from __future__ import annotations

import threading

import pytest
from actors import WAIT, Gate, Sleeper, hearing, interrupt_main, until

from tokenscope import DeadlineExceeded, StragglersLeft, ThreadScope, sleep
from tokenscope._core import events


def test_waiting_tells_the_straggler_at_the_grace_and_at_each_doubling():
    """Its name, how long it has been, and where it stands; then it is joined all the same."""
    gate = Gate()
    with hearing(events.StragglerSeen) as heard:

        def let_go_after(count):
            told.extend(heard.get(timeout=WAIT) for _ in range(count))
            gate.open()

        told: list[events.StragglerSeen] = []
        helper = threading.Thread(target=let_go_after, args=(3,))
        with ThreadScope(grace=0.02, name="s") as scope:
            task = scope.spawn(gate.hold, name="deaf")
            gate.await_arrival()
            helper.start()
            scope.cancel()
        helper.join(WAIT)
    assert task.done()
    assert {(event.scope, event.task) for event in told} == {("s", "deaf")}
    for event, at_least in zip(told, (0.02, 0.04, 0.08), strict=True):
        assert event.waited >= at_least
        assert "nobody opened the gate" in event.stack
    assert "nobody opened the gate" in scope.report.stragglers["deaf"]
    assert scope.report.orphans == ()


def test_only_those_who_are_late_are_told():
    """A child that obeys is no straggler."""
    gate, sleeper = Gate(), Sleeper()
    with hearing(events.StragglerSeen) as heard:
        with ThreadScope(grace=0.05) as scope:
            scope.spawn(sleeper.sleep, name="obedient")
            scope.spawn(gate.hold, name="deaf")
            sleeper.await_arrival()
            gate.await_arrival()
            threading.Thread(target=lambda: (heard.get(timeout=WAIT), gate.open())).start()
            scope.cancel()
    assert list(scope.report.stragglers) == ["deaf"]


def test_a_scope_that_was_not_cancelled_waits_without_complaint():
    """A slow child is no straggler: the grace counts from the cancel."""
    gate = Gate()
    with hearing(events.StragglerSeen) as heard:
        timer = threading.Timer(0.1, gate.open)
        with ThreadScope(grace=0.01, on_straggler="abandon") as scope:
            task = scope.spawn(gate.hold, "value")
            timer.start()
    assert task.result() == "value"
    assert heard.empty()
    assert scope.report.stragglers == {}


def test_a_cancel_long_ago_is_told_once_not_once_per_doubling():
    """A body that took long to leave has its stragglers told once for all the time that has passed."""
    gate, far_past = Gate(), threading.Event()
    with hearing(events.StragglerSeen) as heard:
        with ThreadScope(grace=0.001) as scope:
            scope.spawn(gate.hold)
            gate.await_arrival()
            scope.cancel()
            far_past.wait(0.1)  # a hundred graces
            helper = threading.Timer(0.005, gate.open)
            helper.start()
        helper.join(WAIT)
    assert heard.qsize() <= 2


def test_abandon_gives_the_straggler_up_with_name_and_stack():
    """StragglersLeft, an Orphaned event, the report: all name it; cleanups and siblings are as ever."""
    gate, sleeper, cleaned = Gate(), Sleeper(), []
    with hearing(events.Orphaned) as heard, hearing(events.OrphanEnded) as ended:
        with pytest.raises(StragglersLeft) as caught:
            with ThreadScope(on_straggler="abandon", grace=0.02, name="s") as scope:
                scope.defer(cleaned.append, "cleaned")
                scope.spawn(sleeper.sleep, name="obedient")
                orphan = scope.spawn(gate.hold, name="deaf")
                sleeper.await_arrival()
                gate.await_arrival()
                scope.cancel()
        told = heard.get(timeout=WAIT)
        assert not orphan.done()
        gate.open()
        late = ended.get(timeout=WAIT)
    assert caught.value.names == ("deaf",)
    assert "nobody opened the gate" in caught.value.stacks["deaf"]
    assert "nobody opened the gate" in str(caught.value)
    assert "s" in str(caught.value)
    assert (told.scope, dict(told.stacks)) == ("s", caught.value.stacks)
    assert cleaned == ["cleaned"]
    report = scope.report
    assert report.orphans == ("deaf",)
    assert list(report.stragglers) == ["deaf"]
    assert (report.tasks.spawned, report.tasks.cancelled) == (2, 1)
    assert (late.scope, late.task) == ("s", "deaf")
    assert orphan.result(WAIT) is None


def test_stragglers_of_one_name_are_told_apart():
    """Three deaf children called the same are three in the error, in the events and in the report."""
    gates = [Gate(), Gate(), Gate()]
    names = ["deaf", "deaf (2)", "deaf (3)"]
    with hearing(events.OrphanEnded) as ended:
        with pytest.raises(StragglersLeft) as caught:
            with ThreadScope(on_straggler="abandon", grace=0.02) as scope:
                for gate in gates:
                    scope.spawn(gate.hold, name="deaf")
                    gate.await_arrival()
                scope.cancel()
        for gate in gates:
            gate.open()
        late = [ended.get(timeout=WAIT).task for _ in gates]
    assert sorted(caught.value.names) == sorted(scope.report.orphans) == names
    assert sorted(scope.report.stragglers) == sorted(late) == names


def test_how_late_an_orphan_ended_counts_from_when_it_was_given_up():
    """OrphanEnded.late is the time since the scope let it go, also if no other child ever ended."""
    gate = Gate()
    with hearing(events.OrphanEnded) as ended:
        with pytest.raises(StragglersLeft), ThreadScope(on_straggler="abandon", grace=0.01) as scope:
            scope.spawn(gate.hold)
            gate.await_arrival()
            scope.cancel()
        gate.open()
        assert 0 <= ended.get(timeout=WAIT).late < WAIT


def test_an_orphan_that_ends_during_the_cleanups_is_still_counted():
    """The report tells whom the scope gave up, also if it ended before the report was written."""
    gate = Gate()
    with hearing(events.OrphanEnded) as ended:
        with pytest.raises(StragglersLeft), ThreadScope(on_straggler="abandon", grace=0.01) as scope:
            scope.defer(lambda: (gate.open(), ended.get(timeout=WAIT)))
            scope.spawn(gate.hold, name="deaf")
            gate.await_arrival()
            scope.cancel()
    assert scope.report.orphans == ("deaf",)
    assert scope.report.tasks.spawned == 1


def test_an_orphan_can_spawn_nothing_into_its_scope():
    """What comes late is refused with the reason, and counted as a late event."""
    gate, refused = Gate(), []

    def spawn_late():
        gate.hold()
        try:
            scope.spawn(str)
        except BaseException as error:
            refused.append(error)

    with hearing(events.OrphanEnded) as ended:
        with pytest.raises(StragglersLeft), ThreadScope(on_straggler="abandon", grace=0.01) as scope:
            scope.spawn(spawn_late)
            gate.await_arrival()
            scope.cancel("stop", kind="stopped")
        gate.open()
        ended.get(timeout=WAIT)
    assert refused[0].reason is scope.token.reason


def test_abandon_goes_with_the_deadline():
    """Stragglers of a scope whose time was up are the outcome; the deadline is in the report."""
    gate = Gate()
    with hearing(events.OrphanEnded) as ended:
        with pytest.raises((StragglersLeft, DeadlineExceeded)) as caught:
            with ThreadScope(timeout=0.05, on_straggler="abandon", grace=0.01) as scope:
                scope.spawn(gate.hold, name="deaf")
                sleep(WAIT)
        gate.open()
        ended.get(timeout=WAIT)
    assert isinstance(caught.value, StragglersLeft)
    assert scope.report.reason.kind == "deadline"


def test_the_thread_of_an_orphan_is_not_reused_before_it_ended():
    """New work gets another thread while the orphan still holds its own."""
    gate = Gate()
    with hearing(events.OrphanEnded) as ended:
        with pytest.raises(StragglersLeft), ThreadScope(on_straggler="abandon", grace=0.01) as scope:
            orphan = scope.spawn(gate.hold)
            gate.await_arrival()
            scope.cancel()
        with ThreadScope() as other:
            idents = {other.spawn(threading.get_ident).result(WAIT) for _ in range(5)}
        assert orphan._ident not in idents
        gate.open()
        ended.get(timeout=WAIT)


def test_a_straggler_that_a_second_interrupt_gave_up_is_named():
    """Ctrl-C twice: the scope ends although a child does not obey, and says whom it left."""
    gate = Gate()

    def press_twice():
        until(lambda: scope.snapshot().state == "leaving")
        interrupt_main(lambda: scope.token.cancelled)
        interrupt_main(lambda: scope.report.orphans)
        gate.hold()

    with hearing(events.OrphanEnded) as ended:
        with pytest.raises(KeyboardInterrupt) as caught:
            with ThreadScope() as scope:
                scope.spawn(press_twice, name="deaf")
        gate.open()
        ended.get(timeout=WAIT)
    assert "deaf" in caught.value.__notes__[0]
    assert scope.report.orphans == ("deaf",)
    assert scope.report.outcome == "interrupted"
