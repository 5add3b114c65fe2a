"""The life of a scope: entered and left once, settings checked, children owned, threads bounded."""

from __future__ import annotations

import threading
from decimal import Decimal
from fractions import Fraction

import pytest
from actors import WAIT, Gate, Sleeper, fail, spawn_from_outside

import tokenscope
from tokenscope import (
    CancellationToken,
    Cancelled,
    ScopeClosed,
    ThreadScope,
    check,
    current_scope,
    current_token,
    use_token,
)

NAN, INF = float("nan"), float("inf")

# --- bad input ----------------------------------------------------------------------------------------------

TIMES = [
    (-1, ValueError),
    (-0.001, ValueError),
    (NAN, ValueError),
    ("1", TypeError),
    (True, TypeError),
    ([], TypeError),
]


@pytest.mark.parametrize("setting", ["timeout", "cleanup_timeout", "grace"])
@pytest.mark.parametrize(("bad", "error"), [*TIMES, (-INF, ValueError), (1j, TypeError)])
def test_a_bad_length_of_time_is_an_error_when_the_scope_is_made(setting, bad, error):
    """Negative, NaN and what is no number: the error names the setting and the value."""
    with pytest.raises(error, match=setting) as caught:
        ThreadScope(**{setting: bad})
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", [0, None, INF])
def test_the_grace_is_more_than_nothing_and_finite(bad):
    """Without an end, or without a beginning, there would be nothing to double."""
    with pytest.raises(ValueError, match="grace"):
        ThreadScope(grace=bad)


@pytest.mark.parametrize(
    ("setting", "bad", "error"),
    [
        ("name", 5, TypeError),
        ("name", b"bytes", TypeError),
        ("token", "token", TypeError),
        ("token", CancellationToken, TypeError),
        ("max_threads", 0, ValueError),
        ("max_threads", -1, ValueError),
        ("max_threads", 1.0, TypeError),
        ("max_threads", True, TypeError),
        ("max_threads", "4", TypeError),
        ("on_error", "ignore", ValueError),
        ("on_error", None, ValueError),
        ("on_straggler", "kill", ValueError),
        ("on_straggler", None, ValueError),
    ],
)
def test_a_bad_setting_is_an_error_when_the_scope_is_made(setting, bad, error):
    """The error names the setting and shows the value."""
    with pytest.raises(error, match=setting) as caught:
        ThreadScope(**{setting: bad})
    assert repr(bad) in str(caught.value)


def test_settings_are_keywords_only():
    """Nobody has to guess what ThreadScope("x", 5) would mean."""
    with pytest.raises(TypeError):
        ThreadScope("name")


@pytest.mark.parametrize("timeout", [None, INF, 5, 5.0, Fraction(5), 0.5])
def test_every_kind_of_real_number_is_a_length_of_time(timeout):
    """Inf and None mean none; whole numbers and fractions will do."""
    with ThreadScope(timeout=timeout) as scope:
        assert (scope.token.deadline is None) == (timeout in (None, INF))


def test_a_decimal_is_no_length_of_time():
    """What is no numbers.Real is refused rather than rounded in silence."""
    with pytest.raises(TypeError, match="timeout"):
        ThreadScope(timeout=Decimal(5))


@pytest.mark.parametrize("bad", [None, 5, "str", object()])
def test_spawning_what_cannot_be_called_is_an_error_at_the_call(bad):
    """Nothing is left behind by it."""
    with ThreadScope() as scope:
        with pytest.raises(TypeError, match="callable"):
            scope.spawn(bad)
    assert scope.report.tasks.spawned == 0


@pytest.mark.parametrize(("setting", "bad"), [("name", 5), ("name", b"x"), ("kind", 5)])
def test_a_bad_name_or_kind_of_a_task_is_an_error_at_the_call(setting, bad):
    """Names and kinds are words."""
    with ThreadScope() as scope:
        with pytest.raises(TypeError, match=setting):
            scope.spawn(str, **{setting: bad})
    assert scope.report.tasks.spawned == 0


@pytest.mark.parametrize(("bad", "error"), TIMES)
def test_joining_for_a_bad_length_of_time_is_an_error_at_the_call(bad, error):
    """As everywhere else."""
    with ThreadScope() as scope, pytest.raises(error, match="timeout"):
        scope.join(bad)


def test_cancelling_for_an_unknown_kind_is_an_error_that_lists_the_kinds():
    """The list of kinds is closed; a refused cancel cancels nothing."""
    with ThreadScope() as scope:
        with pytest.raises(ValueError, match="client_disconnected"):
            scope.cancel(kind="because")
        for bad in ({"message": 5}, {"tag": 5}, {"cause": "error"}):
            with pytest.raises(TypeError):
                scope.cancel(**bad)
        assert not scope.token.cancelled


# --- misuse -------------------------------------------------------------------------------------------------


def test_a_scope_cannot_be_entered_twice():
    """Neither while it is open nor after it has ended; the open one goes on."""
    with ThreadScope(name="once") as scope:
        with pytest.raises(RuntimeError, match="once"):
            scope.__enter__()
        assert scope.spawn(str, 1).result(WAIT) == "1"
    with pytest.raises(RuntimeError, match="once"):
        scope.__enter__()


def test_a_scope_cannot_be_left_twice():
    """The second leaving is an error, and the report stays what it was."""
    with ThreadScope(name="once") as scope:
        pass
    report = scope.report
    with pytest.raises(RuntimeError, match="left before"):
        scope.__exit__(None, None, None)
    assert scope.report is report


def test_a_scope_cannot_be_left_without_being_entered():
    """It has nothing to leave."""
    with pytest.raises(RuntimeError, match="entered"):
        ThreadScope().__exit__(None, None, None)


@pytest.mark.parametrize(
    "use",
    [
        lambda scope: scope.spawn(str),
        lambda scope: scope.map(str, []),
        lambda scope: scope.join(),
        lambda scope: scope.cancel(),
        lambda scope: scope.token,
        lambda scope: scope.report,
        lambda scope: scope.snapshot(),
        lambda scope: scope.defer(print),
        lambda scope: scope.enter_context(threading.Lock()),
    ],
)
def test_a_scope_that_was_not_entered_cannot_be_used(use):
    """Every use tells how to enter it."""
    with pytest.raises(RuntimeError, match="with ThreadScope"):
        use(ThreadScope())


def test_spawning_after_the_end_is_an_error():
    """ScopeClosed, from whatever thread, without a reason where there was none."""
    with ThreadScope(name="over") as scope:
        pass
    with pytest.raises(ScopeClosed, match="over") as caught:
        scope.spawn(str)
    assert caught.value.reason is None
    assert scope.report.tasks.spawned == 0


def test_spawning_after_a_cancelled_end_carries_the_reason():
    """Whoever comes late learns why."""
    with ThreadScope() as scope:
        scope.cancel("enough", kind="stopped")
    with pytest.raises(ScopeClosed, match="enough") as caught:
        scope.spawn(str)
    assert caught.value.reason is scope.token.reason


def test_spawning_into_a_cancelled_scope_from_outside_its_tree_is_refused_with_the_reason():
    """A healthy caller gets ScopeClosed, not Cancelled, and it is counted as a late event."""
    with ThreadScope() as scope:
        scope.cancel("enough", kind="stopped")
        refused = spawn_from_outside(scope)
    assert type(refused) is ScopeClosed
    assert refused.reason is scope.token.reason
    assert scope.report.late_events == {"spawns": 1}


def test_a_child_that_joins_its_own_scope_gets_an_error():
    """It would wait for itself."""
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.spawn(scope.join)
    assert "itself" in str(caught.value.exceptions[0])


def test_current_scope_outside_of_any_scope_is_an_error_with_help():
    """LookupError tells how to get one."""
    with pytest.raises(LookupError, match="ThreadScope"):
        current_scope()


# --- working ------------------------------------------------------------------------------------------------


def test_what_is_current_in_the_body_and_after_it():
    """The scope and its token inside, what was before outside, also when scopes are nested and fail."""
    outside = current_token()
    with ThreadScope(name="outer") as outer:
        assert current_scope() is outer
        assert current_token() is outer.token
        with pytest.raises(ValueError, match="x"), ThreadScope(name="inner") as inner:
            assert current_scope() is inner
            assert current_token() is inner.token
            raise ValueError("x")
        assert current_scope() is outer
        assert current_token() is outer.token
    assert current_token() is outside


def test_a_child_may_spawn_siblings():
    """A tree of children that grows from within is joined as a whole."""
    done = []

    def grow(depth):
        if depth:
            scope.spawn(grow, depth - 1)
            scope.spawn(grow, depth - 1)
        done.append(depth)

    with ThreadScope() as scope:
        scope.spawn(grow, 6)
    assert len(done) == 127
    assert scope.report.tasks.finished == 127


def test_a_child_may_spawn_while_the_body_is_leaving():
    """Until nothing lives any more the scope takes work."""
    gate, late = Gate(), Gate()

    def spawn_late():
        gate.hold()
        late.task = scope.spawn(str, "late")

    with ThreadScope() as scope:
        scope.spawn(spawn_late)
        threading.Thread(target=lambda: (gate.await_arrival(), gate.open())).start()
    assert late.task.result() == "late"


def test_children_that_wait_for_each_other_do_not_starve():
    """Without max_threads every child has a thread, also a hundred that all wait for the last."""
    barrier = threading.Barrier(100, timeout=WAIT)
    with ThreadScope() as scope:
        tasks = [scope.spawn(barrier.wait) for _ in range(100)]
    assert sorted(task.result() for task in tasks) == list(range(100))


def test_max_threads_bounds_how_many_children_run():
    """Never more than so many at a time, and never fewer while some wait."""
    together, guard, now = threading.Barrier(3, timeout=WAIT), threading.Lock(), [0, 0]

    def work():
        with guard:
            now[0] += 1
            now[1] = max(now)
        together.wait()
        with guard:
            now[0] -= 1

    with ThreadScope(max_threads=3) as scope:
        for _ in range(12):
            scope.spawn(work)
    assert now == [0, 3]


def test_many_children_may_wait():
    """Twenty thousand in the queue are as quick for each as twenty: run, cancelled one by one, or all at once."""
    gate, ran = Gate(), []
    with ThreadScope(max_threads=1) as scope:
        scope.spawn(gate.hold)
        tasks = [scope.spawn(ran.append, n) for n in range(20_000)]
        for task in tasks[5_000:10_000]:
            assert task.cancel()
            assert task.done()
        gate.open()
        assert tasks[0].result(WAIT) is None
        scope.join()
        gate = Gate()
        scope.spawn(gate.hold)
        tasks = [scope.spawn(ran.append, n) for n in range(20_000)]
        scope.spawn(scope.cancel)
        scope.cancel()
        assert all(task.done() for task in tasks)
        gate.open()
    assert ran == [*range(5_000), *range(10_000, 20_000)]
    assert scope.report.tasks.never_started == 25_001


@pytest.mark.parametrize("into", ["spawn", "map"])
def test_async_functions_are_refused(into):
    """A thread would make a coroutine of it that nobody runs, and call that success."""

    async def work(*_):
        raise AssertionError("it must not run")

    async def items():
        yield 1

    with ThreadScope() as scope:
        for bad in (work, items):
            with pytest.raises(TypeError, match=rf"{into}\(\).*{bad.__name__}.*async"):
                scope.spawn(bad) if into == "spawn" else scope.map(bad, [1])


def test_queued_children_start_in_order():
    """First come, first served."""
    order = []
    with ThreadScope(max_threads=1) as scope:
        for number in range(50):
            scope.spawn(order.append, number)
    assert order == list(range(50))


def test_join_waits_until_no_child_lives():
    """True when all have ended; the scope can be used on after it."""
    gate = Gate()
    with ThreadScope() as scope:
        assert scope.join(0) is True
        scope.spawn(gate.hold)
        assert scope.join(0) is False
        assert scope.join(0.01) is False
        gate.open()
        assert scope.join() is True
        assert scope.spawn(str, 1).result(WAIT) == "1"


def test_join_is_a_checkpoint():
    """Whoever waits in join() is woken by a cancel while the child runs on."""
    gate = Gate()

    def cancel_soon():
        gate.await_arrival()
        scope.cancel()
        gate.open()

    helper = threading.Thread(target=cancel_soon)
    raised = []
    with ThreadScope() as scope:
        scope.spawn(gate.hold)
        helper.start()
        try:
            scope.join()
        except Cancelled as cancelled:
            raised.append(cancelled.reason)
            raise
    helper.join(WAIT)
    assert raised == [scope.token.reason]


def test_join_gives_up_when_the_callers_own_deadline_passes():
    """A caller that is not of the scope's tree is ended by its own deadline, not by the scope's."""
    gate = Gate()
    with ThreadScope() as scope:
        scope.spawn(gate.hold)
        with tokenscope.move_on_after(0.01) as limit:
            scope.join()
        assert limit.cancelled_caught
        assert not scope.token.cancelled
        gate.open()


def test_a_cancel_reaches_body_children_and_their_children():
    """From any thread, with one reason."""
    sleeper = Sleeper()

    def parent():
        with ThreadScope() as inner:
            inner.spawn(sleeper.sleep)
            sleeper.sleep()

    with ThreadScope() as scope:
        scope.spawn(parent)
        sleeper.await_arrival(2)
        threading.Thread(target=scope.cancel, kwargs={"kind": "stopped"}).start()
        try:
            sleeper.sleep()
        finally:
            assert sleeper.left(3) == ["stopped"] * 3


def test_a_scope_in_a_cancelled_context_starts_nothing():
    """Entering is no checkpoint; the first spawn is."""
    parent = CancellationToken()
    parent.cancel()
    with use_token(parent), pytest.raises(Cancelled):
        with ThreadScope() as scope:
            scope.spawn(fail, AssertionError("it must not start"))
    assert scope.report.tasks.spawned == 0


def test_a_scope_without_time_is_cancelled_at_once():
    """timeout=0 is a deadline that has passed: the first checkpoint ends it."""
    with pytest.raises(tokenscope.DeadlineExceeded):
        with ThreadScope(timeout=0):
            check()


def test_an_inner_scopes_deadline_is_never_later_than_the_outers():
    """A generous inner timeout does not buy time."""
    with ThreadScope(timeout=5) as outer, ThreadScope(timeout=50) as inner:
        assert inner.token.deadline == outer.token.deadline
    with ThreadScope(timeout=50) as outer, ThreadScope(timeout=5) as inner:
        assert inner.token.deadline < outer.token.deadline


def test_a_snapshot_shows_who_lives():
    """Names, kinds, states and ages of the children, the state of the scope and its time."""
    gate = Gate()
    with ThreadScope(name="s", max_threads=1, timeout=WAIT) as scope:
        scope.spawn(gate.hold, name="runs", kind="tool")
        gate.await_arrival()
        scope.spawn(str, name="waits")
        shot = scope.snapshot()
        gate.open()
    assert (shot.name, shot.state, shot.reason) == ("s", "open", None)
    assert 0 < shot.remaining <= WAIT
    tasks = {task.name: task for task in shot.tasks}
    assert (tasks["runs"].state, tasks["runs"].kind) == ("running", "tool")
    assert tasks["runs"].age >= 0
    assert (tasks["waits"].state, tasks["waits"].age) == ("queued", None)
    assert scope.snapshot().state == "ended"
    assert scope.snapshot().tasks == ()


def test_the_states_of_a_scope_are_in_its_repr():
    """New, open, ended: with its name."""
    scope = ThreadScope(name="s")
    assert repr(scope) == "<ThreadScope s, new>"
    with scope:
        assert repr(scope) == "<ThreadScope s, open>"
    assert repr(scope) == "<ThreadScope s, ended>"


def test_a_scope_without_a_name_gets_one_of_its_own():
    """Two nameless scopes can be told apart."""
    assert ThreadScope().name != ThreadScope().name


def test_an_extension_is_made_once_for_a_scope():
    """What an upper floor keeps with a scope is one object per key, also for many threads at once."""
    made, together = [], threading.Barrier(8, timeout=WAIT)

    def ask():
        together.wait()
        return scope.extension("key", lambda: made.append(1) or object())

    with ThreadScope() as scope:
        tasks = [scope.spawn(ask) for _ in range(8)]
        found = {task.result(WAIT) for task in tasks}
        other = scope.extension("other", dict)
    assert len(found) == 1
    assert made == [1]
    assert other == {}


def test_what_makes_an_extension_must_be_callable():
    """A factory that is none is told at the call, with its value."""
    with ThreadScope() as scope:
        with pytest.raises(TypeError, match="factory must be callable, not 5"):
            scope.extension("key", 5)


def test_a_scope_that_is_dropped_without_being_left_warns_and_stops_its_children():
    """Its children do not run on unnoticed."""
    import contextvars
    import gc
    import warnings

    sleeper = Sleeper()

    def enter_and_forget():
        scope = ThreadScope(name="forgotten")
        scope.__enter__()
        scope.spawn(sleeper.sleep)
        sleeper.await_arrival()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        contextvars.copy_context().run(enter_and_forget)
        gc.collect()
        assert sleeper.left() == ["scope_ended"]
    assert any("forgotten" in str(warning.message) for warning in caught)
