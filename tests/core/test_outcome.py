"""How a scope's end becomes one outcome: the rules as a table, then each of them in real scopes."""

from __future__ import annotations

import re
import threading

import pytest
from actors import WAIT, Gate, Sleeper, fail, fail_when_cancelled, hearing, interrupt_main, until

from tokenscope import (
    CancelKind,
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    StragglersLeft,
    TaskCancelled,
    ThreadScope,
    defer,
    sleep,
)
from tokenscope._core import events
from tokenscope._core.outcome import Ending, Failure, decide, one_line

INTERRUPTS = [KeyboardInterrupt, SystemExit, GeneratorExit]


def cut_of(kind="manual"):
    token = CancellationToken(name="cancelled")
    token.cancel(kind=kind)
    return token._cut


def notes_of(error):
    return getattr(error, "__notes__", [])


# --- the table ----------------------------------------------------------------------------------------------


def test_nothing_happened_is_a_success():
    """Without error and cancel the outcome is a return."""
    verdict = decide(Ending("s"))
    assert (verdict.word, verdict.error, verdict.absorbed) == ("succeeded", None, False)


@pytest.mark.parametrize("kind", INTERRUPTS)
@pytest.mark.parametrize("own", [True, False])
def test_an_interrupt_beats_everything(kind, own):
    """An interrupt of the body leaves as exactly itself, whatever else happened."""
    interrupt = kind()
    ending = Ending("s", body=interrupt, cut=cut_of(), own=own, cut_short=True)
    ending.failures.append(Failure("task a", ValueError("a")))
    verdict = decide(ending)
    assert verdict.word == "interrupted"
    assert verdict.error is interrupt
    assert "task a: ValueError: a" in notes_of(interrupt)[0]


def test_an_interrupt_of_the_join_beats_the_failure_of_the_body():
    """Ctrl-C while leaving wins over what the body had raised, which becomes a note."""
    ending = Ending("s", body=ValueError("body"), interrupt=KeyboardInterrupt())
    verdict = decide(ending)
    assert verdict.error is ending.interrupt
    assert "body: ValueError: body" in notes_of(verdict.error)[0]


@pytest.mark.parametrize("late", [True, False])
def test_a_cancel_from_above_beats_failures(late):
    """What an ancestor cut short leaves as Cancelled, failures are notes."""
    cut = cut_of("client_disconnected")
    ending = Ending("s", cut=cut, cut_short=True, failures=[Failure("task a", ValueError("a"), late)])
    verdict = decide(ending)
    assert verdict.word == "cancelled"
    assert isinstance(verdict.error, Cancelled)
    assert verdict.error.reason is cut.reason
    assert len(notes_of(verdict.error)) == 1


def test_a_cancel_from_above_keeps_the_bodys_own_cancelled():
    """The Cancelled that the body raised goes on, not a copy of it."""
    cut = cut_of()
    body = cut.as_error()
    assert decide(Ending("s", body=body, cut=cut, cut_short=True)).error is body


def test_a_cancel_from_above_leaves_as_one_cancelled_never_as_a_group_of_them():
    """A body that collected several Cancelled in a group ends in a plain Cancelled."""
    cut = cut_of()
    body = BaseExceptionGroup("many", [cut.as_error(), cut.as_error()])
    verdict = decide(Ending("s", body=body, cut=cut, cut_short=True))
    assert type(verdict.error) is Cancelled


def test_a_cancel_from_above_that_cut_nothing_short_changes_nothing():
    """A cancel that came too late for everything is not an outcome."""
    assert decide(Ending("s", cut=cut_of())).word == "succeeded"


def test_a_failure_of_the_body_leaves_unchanged():
    """The body's own exception is not wrapped when it is the only one."""
    body = ValueError("body")
    assert decide(Ending("s", body=body)).error is body


def test_the_bodys_failure_and_a_childs_leave_as_one_group_the_bodys_first():
    """With two failures both are in one group."""
    body, child = ValueError("body"), KeyError("child")
    error = decide(Ending("s", body=body, failures=[Failure("task a", child)])).error
    assert isinstance(error, ExceptionGroup)
    assert error.exceptions == (body, child)


def test_an_error_that_body_and_child_share_is_told_once():
    """A body that re-raises its child's error leaves with that error, unwrapped."""
    error = ValueError("child")
    verdict = decide(Ending("s", body=error, failures=[Failure("task a", error)]))
    assert verdict.error is error
    assert notes_of(error) == []


def test_the_failure_of_one_child_is_a_group_of_one():
    """A child's failure is always in a group, so that except* finds it whatever the number."""
    error = decide(Ending("s", failures=[Failure("task a", ValueError("a"))])).error
    assert isinstance(error, ExceptionGroup)
    assert len(error.exceptions) == 1


def test_a_group_with_an_interrupt_of_a_child_is_a_base_group():
    """SystemExit of a child is kept, which takes a BaseExceptionGroup."""
    error = decide(Ending("s", failures=[Failure("task a", SystemExit(3))])).error
    assert isinstance(error, BaseExceptionGroup)
    assert not isinstance(error, Exception)


def test_lone_stragglers_leave_bare_and_others_in_company():
    """StragglersLeft is wrapped only if something else failed too."""
    left = StragglersLeft("left", {"a": "stack"})
    assert decide(Ending("s", failures=[Failure("stragglers", left)])).error is left
    other = Failure("task b", ValueError("b"))
    error = decide(Ending("s", failures=[Failure("stragglers", left), other])).error
    assert isinstance(error, ExceptionGroup)
    assert error.exceptions == (left, other.error)


def test_the_own_deadline_beats_what_failed_after_it():
    """What a child raised after the scope's deadline is a note on DeadlineExceeded."""
    cut = cut_of("deadline")
    ending = Ending("s", cut=cut, own=True, cut_short=True)
    ending.failures.append(Failure("task a", ValueError("late"), late=True))
    verdict = decide(ending)
    assert verdict.word == "deadline"
    assert isinstance(verdict.error, DeadlineExceeded)
    assert verdict.error.reason is cut.reason
    assert "ValueError: late" in notes_of(verdict.error)[0]


def test_what_failed_before_the_own_deadline_beats_it():
    """A failure that was there before the deadline is told, not covered by it."""
    ending = Ending("s", cut=cut_of("deadline"), own=True, cut_short=True)
    ending.failures.append(Failure("task a", ValueError("early")))
    assert decide(ending).word == "failed"


@pytest.mark.parametrize("body_raised", [True, False])
def test_the_own_cancel_is_absorbed(body_raised):
    """A scope's own cancel ends in it, whether the body let Cancelled through or swallowed it."""
    cut = cut_of()
    body = cut.as_error() if body_raised else None
    verdict = decide(Ending("s", body=body, cut=cut, own=True, cut_short=True))
    assert (verdict.word, verdict.error, verdict.absorbed) == ("cancelled", None, True)


def test_deciding_twice_notes_once():
    """The rules may be asked for the cleanups first and for the end later: notes are not doubled."""
    ending = Ending("s", body=KeyboardInterrupt(), failures=[Failure("task a", ValueError("a"))])
    decide(ending)
    decide(ending)
    assert len(notes_of(ending.body)) == 1


# --- rule 1, in real scopes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interrupt", "kind"),
    [
        (KeyboardInterrupt(), CancelKind.INTERRUPTED),
        (SystemExit(3), CancelKind.BODY_FAILED),
        (GeneratorExit(), CancelKind.SCOPE_ENDED),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("on_error", ["cancel", "collect"])
def test_an_interrupt_in_the_body_comes_out_and_stops_the_children(interrupt, kind, on_error):
    """The very same exception leaves, the children were cancelled for it and joined."""
    sleeper = Sleeper()
    with pytest.raises(type(interrupt)) as caught:
        with ThreadScope(on_error=on_error) as scope:
            scope.spawn(sleeper.sleep)
            sleeper.await_arrival()
            raise interrupt
    assert caught.value is interrupt
    assert sleeper.left() == [kind]
    assert scope.report.outcome == "interrupted"


def test_failures_beside_an_interrupt_become_notes_and_stay_in_the_report():
    """A child that failed although Ctrl-C won is told in both places."""
    started = threading.Event()
    error = ValueError("beside")
    with pytest.raises(KeyboardInterrupt) as caught:
        with ThreadScope() as scope:
            scope.spawn(fail_when_cancelled, started, error, name="child")
            assert started.wait(WAIT)
            raise KeyboardInterrupt
    assert notes_of(caught.value) == [f"also in scope {scope.name!r}: task child: {one_line(error)}"]
    assert error in scope.report.errors


def test_ctrl_c_while_joining_cancels_and_goes_on_joining():
    """One SIGINT in the join cancels with `interrupted`, the child is joined, KeyboardInterrupt comes out."""
    sleeper = Sleeper()

    def press_then_sleep():
        until(lambda: scope.snapshot().state == "leaving", "leaving")
        interrupt_main(lambda: scope.token.cancelled)
        sleeper.sleep()

    with pytest.raises(KeyboardInterrupt):
        with ThreadScope() as scope:
            scope.spawn(press_then_sleep)
    assert sleeper.left() == ["interrupted"]
    assert scope.report.tasks.cancelled == 1
    assert scope.report.reason.kind == "interrupted"


def test_an_interrupt_in_a_cleanup_comes_out_after_all_cleanups():
    """SystemExit of a cleanup is exactly what leaves, and the cleanups before it still ran."""
    ran = []
    with pytest.raises(SystemExit) as caught:
        with ThreadScope() as scope:
            scope.defer(ran.append, "first")
            scope.defer(fail, SystemExit(7))
    assert caught.value.code == 7
    assert ran == ["first"]


def test_a_failure_in_a_note_says_what_it_is_and_where_it_was_raised():
    """One line: type, message, file, line and function; what cannot be known is left out."""
    try:
        fail(ValueError("bad value\nand more"))
    except ValueError as error:
        told = one_line(error)
    assert re.fullmatch(r"ValueError: bad value \(.*\.py:\d+ in fail\)", told)
    assert one_line(KeyError()) == "KeyError"


# --- rule 2 -------------------------------------------------------------------------------------------------


def test_a_child_that_fails_while_the_parent_is_cancelled_is_a_note_on_cancelled():
    """The ancestor's cancel is the outcome; the failure that followed from it is told beside it, once."""
    parent, started, error = CancellationToken(name="parent"), threading.Event(), ValueError("late")
    with pytest.raises(Cancelled) as caught:
        with ThreadScope(token=parent) as scope:
            scope.spawn(fail_when_cancelled, started, error, name="child")
            assert started.wait(WAIT)
            parent.cancel("gone", kind="client_disconnected")
            sleep(WAIT)
    assert caught.value.reason is parent.reason
    assert caught.value.origin == "parent"
    assert notes_of(caught.value) == [f"also in scope {scope.name!r}: task child: {one_line(error)}"]
    assert scope.report.errors == (error,)
    assert scope.report.outcome == "cancelled"
    assert scope.cancelled_caught is False


def test_a_body_that_fails_while_the_parent_is_cancelled_is_a_note_on_cancelled():
    """Whatever error a body makes of the ancestor's cancel, the scope leaves with Cancelled."""
    parent = CancellationToken()
    error = ConnectionError("the transport")

    def body():
        with ThreadScope(token=parent) as scope:
            parent.cancel()
            try:
                sleep(0)
            finally:
                raise error
        return scope

    with pytest.raises(Cancelled) as caught:
        body()
    assert "ConnectionError" in notes_of(caught.value)[0]


def test_a_child_cut_short_by_an_ancestor_is_enough_for_cancelled():
    """A body that returned normally does not make a success of children that were cut short."""
    parent, sleeper = CancellationToken(), Sleeper()
    with pytest.raises(Cancelled):
        with ThreadScope(token=parent) as scope:
            scope.spawn(sleeper.sleep)
            sleeper.await_arrival()
            parent.cancel()
    assert scope.report.tasks.cancelled == 1


def test_a_queued_child_that_an_ancestor_kept_from_starting_is_enough_for_cancelled():
    """A task that never started was cut short."""
    parent, gate = CancellationToken(), Gate()
    with pytest.raises(Cancelled):
        with ThreadScope(token=parent, max_threads=1) as scope:
            scope.spawn(gate.hold)
            scope.spawn(fail, AssertionError("it must not start"))
            gate.await_arrival()
            parent.cancel()
            gate.open()
    assert scope.report.tasks.never_started == 1
    assert scope.report.tasks.finished == 1


# --- rule 3 -------------------------------------------------------------------------------------------------


def test_the_bodys_own_failure_leaves_as_it_is():
    """A body's exception passes the scope untouched, and cancels the children first."""
    sleeper, error = Sleeper(), ValueError("body")
    with pytest.raises(ValueError, match="body") as caught:
        with ThreadScope() as scope:
            scope.spawn(sleeper.sleep)
            sleeper.await_arrival()
            raise error
    assert caught.value is error
    assert sleeper.left() == ["body_failed"]
    assert scope.report.reason.cause.args == error.args


def test_two_children_that_fail_are_both_reported():
    """The second failure, of the time in which the scope was already ending, is in the group too."""
    started, first, second = threading.Event(), ValueError("first"), KeyError("second")
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.spawn(fail_when_cancelled, started, second)
            assert started.wait(WAIT)
            scope.spawn(fail, first)
    assert caught.value.exceptions == (first, second)
    assert scope.report.errors == (first, second)
    assert scope.report.reason.kind == "sibling_failed"


def test_a_body_that_reraises_its_childs_error_tells_it_once():
    """The child's error, asked for and let through by the body, leaves bare and is counted once."""
    error = ValueError("child")
    with pytest.raises(ValueError, match="child") as caught:
        with ThreadScope(on_error="collect") as scope:
            scope.spawn(fail, error).result(WAIT)
    assert caught.value is error
    assert scope.report.errors == (error,)


def test_an_error_that_travelled_through_two_children_is_told_once():
    """A child that lets its sibling's error through adds nothing to the group."""
    error = ValueError("first")
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope(on_error="collect") as scope:
            scope.spawn(scope.spawn(fail, error).result, WAIT)
    assert caught.value.exceptions == (error,)


def test_a_cleanup_that_fails_while_a_child_failed_is_reported_beside_it():
    """Neither failure hides the other."""
    child, cleanup = ValueError("child"), KeyError("cleanup")
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.defer(fail, cleanup)
            scope.spawn(fail, child)
    assert caught.value.exceptions == (child, cleanup)
    assert scope.report.errors == (child, cleanup)


def test_a_cleanup_that_fails_while_the_body_failed_is_reported_after_it():
    """The body's failure comes first in the group."""
    body, cleanup = ValueError("body"), KeyError("cleanup")
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.defer(fail, cleanup)
            raise body
    assert caught.value.exceptions == (body, cleanup)


def test_a_failing_child_wakes_the_body_and_the_siblings():
    """A child's failure cancels all with `sibling_failed`; the Cancelled of the body is no failure."""
    sleeper, gate, error = Sleeper(), Gate(), ValueError("child")
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.spawn(sleeper.sleep)
            scope.spawn(gate.fail, error, name="the-culprit")
            sleeper.await_arrival()
            gate.open()
            sleep(WAIT)
    assert caught.value.exceptions == (error,)
    assert sleeper.left() == ["sibling_failed"]
    assert scope.report.reason.source == "the-culprit"


def test_the_outcome_of_a_child_is_published_before_its_siblings_are_cancelled():
    """Whoever is woken by `sibling_failed` finds the culprit's future done."""
    gate, seen = Gate(), []
    with pytest.raises(ExceptionGroup):
        with ThreadScope() as scope:
            culprit = scope.spawn(gate.fail, ValueError())
            scope.token.on_cancel(lambda: seen.append(culprit.done()))
            gate.open()
    assert seen == [True]


def test_stragglers_leave_bare():
    """Children given up for lost are the outcome, not a group of one, if nothing else failed."""
    gate = Gate()
    with hearing(events.OrphanEnded) as ended:
        with pytest.raises(StragglersLeft) as caught:
            with ThreadScope(on_straggler="abandon", grace=0.01) as scope:
                scope.spawn(gate.hold, name="deaf")
                gate.await_arrival()
                scope.cancel()
        gate.open()
        ended.get(timeout=WAIT)
    assert caught.value.names == ("deaf",)


def test_stragglers_and_a_failure_leave_as_one_group():
    """A failure is not hidden by the stragglers, nor they by it."""
    gate, error = Gate(), ValueError("body")
    with hearing(events.OrphanEnded) as ended:
        with pytest.raises(ExceptionGroup) as caught:
            with ThreadScope(on_straggler="abandon", grace=0.01) as scope:
                scope.spawn(gate.hold, name="deaf")
                gate.await_arrival()
                raise error
        gate.open()
        ended.get(timeout=WAIT)
    assert caught.value.exceptions[0] is error
    assert isinstance(caught.value.exceptions[1], StragglersLeft)


def test_collect_lets_all_run_on_and_tells_at_the_end():
    """With on_error="collect" nobody is cancelled: siblings and body finish, failures come as one group."""
    gate, first, second = Gate(), ValueError("first"), KeyError("second")
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope(on_error="collect") as scope:
            failing = scope.spawn(fail, first)
            healthy = scope.spawn(gate.hold, "done")
            assert failing.exception(WAIT) is first
            assert not scope.token.cancelled
            failing_too = scope.spawn(fail, second)
            assert failing_too.exception(WAIT) is second
            gate.open()
    assert healthy.result() == "done"
    assert caught.value.exceptions == (first, second)
    assert scope.report.reason is None


def test_collect_lets_children_run_on_when_the_body_fails():
    """A failing body does not cancel the children of a collecting scope."""
    gate, error = Gate(), ValueError("body")
    with pytest.raises(ValueError, match="body") as caught:
        with ThreadScope(on_error="collect") as scope:
            scope.token.on_cancel(fail, AssertionError("cancelled"))
            healthy = scope.spawn(gate.hold, "done")
            gate.await_arrival()
            gate.open()
            raise error
    assert caught.value is error
    assert healthy.result() == "done"


# --- rules 4, 5 and 6 ---------------------------------------------------------------------------------------


def test_the_own_deadline_leaves_as_deadline_exceeded():
    """A body cut short by the scope's timeout leaves as DeadlineExceeded, with reason and cause."""
    with pytest.raises(DeadlineExceeded) as caught:
        with ThreadScope(timeout=0.01) as scope:
            sleep(WAIT)
    assert caught.value.reason is scope.token.reason
    assert caught.value.reason.kind == "deadline"
    assert isinstance(caught.value.__cause__, Cancelled)
    assert scope.report.outcome == "deadline"


def test_a_child_that_fails_after_the_own_deadline_is_a_note():
    """The deadline is the outcome; the failure it led to is told beside it and in the report."""
    started, error = threading.Event(), ValueError("late")
    with pytest.raises(DeadlineExceeded) as caught:
        with ThreadScope(timeout=0.02) as scope:
            scope.spawn(fail_when_cancelled, started, error, name="child")
    assert notes_of(caught.value) == [f"also in scope {scope.name!r}: task child: {one_line(error)}"]
    assert scope.report.errors == (error,)


def test_a_child_that_failed_before_the_deadline_is_told_although_it_ended_after_it():
    """A failure is dated by when the child's own code raised, not by when its cleanups were done."""
    error, expired = ValueError("early"), threading.Event()

    def fails_and_cleans_up_slowly():
        defer(expired.wait, WAIT)
        raise error

    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope(timeout=0.05, on_error="collect") as scope:
            scope.token.on_cancel(expired.set)
            scope.spawn(fails_and_cleans_up_slowly)
            sleep(WAIT)
    assert caught.value.exceptions == (error,)


def test_a_body_that_fails_after_the_own_deadline_is_the_outcome():
    """Only children's late failures become notes: the body's own exception is what its reader sees."""
    error = ConnectionError("what the body made of it")
    with pytest.raises(ConnectionError) as caught:
        with ThreadScope(timeout=0.01) as scope:
            try:
                sleep(WAIT)
            finally:
                raise error
    assert caught.value is error
    assert scope.report.reason.kind == "deadline"


def test_the_own_cancel_is_absorbed_by_the_scope():
    """cancel() of the scope ends the body at its next checkpoint and is not seen outside."""
    sleeper = Sleeper()
    with ThreadScope() as scope:
        scope.spawn(sleeper.sleep)
        sleeper.await_arrival()
        assert scope.cancel("enough", tag="mine") is True
        assert scope.cancel("again") is False
        sleep(WAIT)
        pytest.fail("a checkpoint of a cancelled scope returned")
    assert scope.cancelled_caught
    assert scope.report.outcome == "cancelled"
    assert scope.report.reason.tag == "mine"


def test_a_cancel_that_cut_nothing_short_is_only_told():
    """A cancel after all was done leaves the outcome a success, and its reason in the report."""
    with ThreadScope() as scope:
        assert scope.spawn(str, 1).result(WAIT) == "1"
        scope.cancel("too late")
    assert not scope.cancelled_caught
    assert scope.report.outcome == "succeeded"
    assert scope.report.reason.message == "too late"


def test_a_task_cancelled_alone_does_not_make_its_scope_fail():
    """A cancel of one task is an answer for whoever awaits it, not a failure of the others."""
    sleeper = Sleeper()
    with ThreadScope() as scope:
        task = scope.spawn(sleeper.sleep)
        other = scope.spawn(str, 1)
        sleeper.await_arrival()
        task.cancel("just this one")
        with pytest.raises(TaskCancelled):
            task.result(WAIT)
    assert other.result() == "1"
    assert scope.report.outcome == "succeeded"
    assert scope.report.tasks.cancelled == 1


def test_only_the_scope_that_was_cancelled_absorbs_it():
    """A cancel of the outer scope passes the inner one and ends at its origin."""
    after = []
    with ThreadScope() as outer:
        with ThreadScope() as inner:
            outer.cancel()
            sleep(WAIT)
        after.append("the inner scope absorbed it")
    assert after == []
    assert (outer.cancelled_caught, inner.cancelled_caught) == (True, False)


def test_only_the_scope_whose_deadline_it_is_raises_deadline_exceeded():
    """The inner scope passes the outer deadline on as Cancelled."""
    seen = []
    with pytest.raises(DeadlineExceeded) as caught:
        with ThreadScope(timeout=0.02, name="outer"):
            try:
                with ThreadScope(timeout=WAIT, name="inner"):
                    sleep(WAIT)
            except BaseException as error:
                seen.append(type(error))
                raise
    assert seen == [Cancelled]
    assert "outer" in str(caught.value)
