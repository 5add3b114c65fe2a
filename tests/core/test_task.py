"""Tasks as futures: what concurrent.futures and asyncio see, their states, how one is cancelled alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading

import pytest
from actors import WAIT, Gate, Sleeper, fail, hearing, until

from tokenscope import (
    CancellationToken,
    DeadlineExceeded,
    ScopeClosed,
    StragglersLeft,
    TaskCancelled,
    ThreadScope,
    current_scope,
    current_token,
    defer,
    sleep,
)
from tokenscope._core import events


@pytest.fixture
def four_ends():
    """One task per way to end: succeeded, failed, cancelled running or queued; and how to end them."""
    gate, sleeper = Gate(), Sleeper()
    with ThreadScope(on_error="collect", max_threads=3) as scope:
        try:
            succeeding = scope.spawn(gate.hold, "value")
            cancelled = scope.spawn(sleeper.sleep)
            failing = scope.spawn(gate.fail, ValueError("failed"))
            queued = scope.spawn(str)
            gate.await_arrival()
            sleeper.await_arrival()

            def end_all():
                assert queued.cancel()
                assert cancelled.cancel()
                gate.open()

            yield [succeeding, failing, cancelled, queued], end_all
        finally:
            gate.open()
            scope.cancel()
            until(scope._crew.idle)
            scope._crew.failures.clear()  # it is the test's own failure, and looked at there


def test_concurrent_futures_wait_knows_tasks(four_ends):
    """wait() blocks until tasks of every end are done."""
    tasks, end_all = four_ends
    done, waiting = concurrent.futures.wait(tasks, timeout=0)
    assert (done, waiting) == (set(), set(tasks))
    threading.Thread(target=end_all).start()
    done, waiting = concurrent.futures.wait(tasks, timeout=WAIT)
    assert (done, waiting) == (set(tasks), set())


def test_concurrent_futures_wait_sees_what_was_done_before(four_ends):
    """wait() on tasks that nobody had waited for before knows their ends."""
    tasks, end_all = four_ends
    end_all()
    until(lambda: all(task.done() for task in tasks))
    done, _ = concurrent.futures.wait(tasks, timeout=0)
    assert done == set(tasks)


def test_concurrent_futures_wait_returns_at_the_first_that_is_done(four_ends):
    """wait(FIRST_COMPLETED) is woken by a task that was cancelled in the queue, while the others run."""
    tasks, _ = four_ends
    threading.Thread(target=tasks[3].cancel).start()
    done, waiting = concurrent.futures.wait(tasks, WAIT, concurrent.futures.FIRST_COMPLETED)
    assert (done, waiting) == ({tasks[3]}, set(tasks[:3]))


def test_concurrent_futures_as_completed_yields_tasks(four_ends):
    """as_completed() yields each task once, in whatever way it ended."""
    tasks, end_all = four_ends
    threading.Thread(target=end_all).start()
    assert set(concurrent.futures.as_completed(tasks, timeout=WAIT)) == set(tasks)


def test_asyncio_wraps_tasks(four_ends):
    """wrap_future() gives value, error and asyncio's own CancelledError, for running and queued tasks."""
    tasks, end_all = four_ends

    async def gather():
        futures = [asyncio.wrap_future(task) for task in tasks]
        await asyncio.to_thread(end_all)
        return await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), WAIT)

    value, error, cancelled, queued = asyncio.run(gather())
    assert value == "value"
    assert isinstance(error, ValueError)
    assert type(cancelled) is type(queued) is asyncio.CancelledError


def test_asyncio_cancels_tasks():
    """Cancelling the asyncio future cancels the task behind it."""
    sleeper = Sleeper()

    async def cancel(task):
        future = asyncio.wrap_future(task)
        future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await future

    with ThreadScope() as scope:
        task = scope.spawn(sleeper.sleep)
        sleeper.await_arrival()
        asyncio.run(cancel(task))
        assert scope.join(WAIT)
    assert task.cancelled()


def test_done_callbacks_run_once_for_every_end(four_ends):
    """A callback added before the end, and one added after it, are each called once with the task."""
    tasks, end_all = four_ends
    called: list[tuple[str, object]] = []
    for task in tasks:
        task.add_done_callback(lambda t: called.append(("before", t)))
    end_all()
    until(lambda: len(called) == 4)
    for task in tasks:
        task.add_done_callback(lambda t: called.append(("after", t)))
    assert sorted(called, key=str) == sorted([(when, task) for when in ("before", "after") for task in tasks], key=str)


def test_the_states_of_a_task_that_is_cancelled():
    """Queued, running, cancelling, done: cancelled() and done() are True only at the end."""
    gate, states = Gate(), []

    def note(task):
        states.append((task.state, task.running(), task.cancelled(), task.done()))

    def checks_late():
        gate.hold()
        sleep(0)

    with ThreadScope(max_threads=1) as scope:
        first = scope.spawn(checks_late)
        second = scope.spawn(str)
        gate.await_arrival()
        note(second)
        note(first)
        first.cancel()
        note(first)
        gate.open()
        assert second.result(WAIT) == ""
        note(first)
        note(second)
    assert states == [
        ("queued", False, False, False),
        ("running", True, False, False),
        ("cancelling", True, False, False),
        ("done", False, True, True),
        ("done", False, False, True),
    ]


def test_what_a_cancelled_task_returned_is_kept():
    """A task that finished in spite of its cancel succeeded: nothing finished looks cut."""
    gate = Gate()
    with ThreadScope() as scope:
        task = scope.spawn(gate.hold, "whole")
        gate.await_arrival()
        assert task.cancel() is True
        gate.open()
        assert task.result(WAIT) == "whole"
    assert not task.cancelled()


def test_cancel_tells_whether_it_won():
    """True for the first cancel, False for later ones and for a task that is done."""
    sleeper = Sleeper()
    with ThreadScope() as scope:
        done = scope.spawn(str)
        done.result(WAIT)
        assert done.cancel() is False
        task = scope.spawn(sleeper.sleep)
        sleeper.await_arrival()
        assert task.cancel("first", kind="stopped", tag="t") is True
        assert task.cancel("second") is False
        assert scope.join(WAIT)
    assert (task.token.reason.message, task.token.reason.kind, task.token.reason.tag) == (
        "first",
        "stopped",
        "t",
    )
    assert not done.token.cancelled


def test_cancelling_a_queued_task_ends_it_at_once():
    """It is done when cancel() returns, never starts, and those behind it move up."""
    gate = Gate()
    with ThreadScope(max_threads=1) as scope:
        scope.spawn(gate.hold)
        queued = scope.spawn(fail, AssertionError("it must not start"))
        behind = scope.spawn(str, 1)
        queued.cancel("not needed")
        assert queued.done()
        assert queued.cancelled()
        with pytest.raises(TaskCancelled) as caught:
            queued.result(0)
        assert caught.value.reason.message == "not needed"
        gate.open()
        assert behind.result(WAIT) == "1"
    assert scope.report.tasks.never_started == 1


def test_cancelling_the_scope_ends_all_queued_tasks_at_once():
    """Also those of a long queue, each counted once, while the running one is still running."""
    gate = Gate()
    with ThreadScope(max_threads=1) as scope:
        running = scope.spawn(gate.hold)
        queued = [scope.spawn(fail, AssertionError("it must not start")) for _ in range(50)]
        gate.await_arrival()
        scope.cancel()
        assert all(task.cancelled() for task in queued)
        assert not running.done()
        gate.open()
    assert scope.report.tasks.never_started == 50
    assert scope.report.tasks.spawned == 51


def test_queued_tasks_are_ended_once_by_many_cancellers_and_the_joiner():
    """Four threads cancel tasks and scope while the scope is left: each task ends and counts once."""
    problems = (events.CallbackFailed, events.ThreadFailed)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with hearing(*problems) as heard:
            for _ in range(30):
                end_many_queued_tasks_at_once()
    finally:
        sys.setswitchinterval(switch)
    assert heard.empty(), heard.get()


def end_many_queued_tasks_at_once():
    gate, go = Gate(), threading.Barrier(5, timeout=WAIT)
    with ThreadScope(max_threads=1) as scope:
        scope.spawn(gate.hold)
        gate.await_arrival()
        tasks = [scope.spawn(str) for _ in range(12)]
        concurrent.futures.wait(tasks, timeout=0)  # whoever has been waited for is published another way

        def cancel_some(mine):
            go.wait()
            for task in mine:
                task.cancel()
            scope.cancel()

        threads = [threading.Thread(target=cancel_some, args=(tasks[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        go.wait()
        gate.open()
    for thread in threads:
        thread.join(WAIT)
    counts = scope.report.tasks
    assert all(task.done() for task in tasks)
    assert counts.spawned == 13
    assert counts.finished + counts.cancelled + counts.never_started == 13
    assert counts.never_started == sum(task.cancelled() for task in tasks)


def test_cancelling_one_task_leaves_its_siblings_alone():
    """A task's cancel reaches what it spawned below it, and nobody else."""
    sleeper, gate = Sleeper(), Gate()

    def parent():
        with ThreadScope() as inner:
            inner.spawn(sleeper.sleep)

    with ThreadScope() as scope:
        task, sibling = scope.spawn(parent), scope.spawn(gate.hold, "alive")
        sleeper.await_arrival()
        task.cancel(kind="stopped")
        assert sleeper.left() == ["stopped"]
        gate.open()
        assert sibling.result(WAIT) == "alive"
    assert task.cancelled()


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_asking_gives_up_after_its_timeout_and_the_task_goes_on(ask):
    """TimeoutError names the task, which is not disturbed."""
    gate = Gate()
    with ThreadScope() as scope:
        task = scope.spawn(gate.hold, "later", name="slow")
        for timeout in (0, 0.01):
            with pytest.raises(TimeoutError, match="slow"):
                getattr(task, ask)(timeout)
        gate.open()
        assert task.result(WAIT) == "later"
        assert task.exception(WAIT) is None


@pytest.mark.parametrize("bad", [-1, float("nan"), "1", True])
def test_a_bad_timeout_of_result_is_an_error_at_the_call(bad):
    """Negative numbers, NaN and non-numbers are refused, also by a task that is done."""
    with ThreadScope() as scope:
        task = scope.spawn(str)
        scope.join(WAIT)
        for ask in (task.result, task.exception):
            with pytest.raises((ValueError, TypeError), match="timeout"):
                ask(bad)


def test_result_and_exception_of_a_failed_task():
    """result() raises the task's error, exception() returns it: the same object."""
    error = ValueError("mine")
    with pytest.raises(ExceptionGroup), ThreadScope(on_error="collect") as scope:
        task = scope.spawn(fail, error)
        with pytest.raises(ValueError, match="mine") as caught:
            task.result(WAIT)
        assert caught.value is error
        assert task.exception(WAIT) is error


def test_results_of_ended_tasks_are_answered_to_a_cancelled_caller():
    """What is there already needs no checkpoint: value and error come at once."""
    error = ValueError("mine")
    with pytest.raises(ExceptionGroup), ThreadScope(on_error="collect") as scope:
        succeeded, failed = scope.spawn(str, 1), scope.spawn(fail, error)
        assert scope.join(WAIT)
        scope.cancel()
        assert succeeded.result() == "1"
        assert failed.exception() is error
        assert succeeded.exception() is None


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_waiting_for_a_task_is_a_checkpoint_of_the_caller(ask):
    """A caller that is cancelled while it waits comes back with Cancelled; the task is not its business."""
    gate, parent = Gate(), CancellationToken()
    task = None

    def wait_for_task():
        with ThreadScope(token=parent):
            gate.arrived.set()
            getattr(task, ask)(WAIT)

    with ThreadScope() as scope:
        deaf = Gate()
        task = scope.spawn(deaf.hold)
        with pytest.raises(ExceptionGroup) as caught, ThreadScope() as other:
            other.spawn(wait_for_task)
            gate.await_arrival()
            parent.cancel()
        deaf.open()
    assert isinstance(caught.value.exceptions[0], TaskCancelled)


def test_a_deadline_ends_the_wait_for_a_task():
    """A caller with a deadline waits no longer than that, and leaves for the deadline."""
    deaf = Gate()
    with ThreadScope() as scope:
        task = scope.spawn(deaf.hold)
        with pytest.raises(DeadlineExceeded), ThreadScope(timeout=0.02):
            task.result()
        assert not task.done()
        deaf.open()


def test_a_task_is_known_by_name_kind_scope_and_thread():
    """The thread bears the task's name while it runs, and what is current is the task's."""

    def look():
        return threading.current_thread().name, current_scope(), current_token()

    with ThreadScope() as scope:
        task = scope.spawn(look, name="looker", kind="tool")
        thread, found, token = task.result(WAIT)
    assert (thread, found, token) == ("looker", scope, task.token)
    assert (task.name, task.kind, task.scope) == ("looker", "tool", scope)
    assert "looker" in repr(task)


def test_a_task_without_a_name_is_called_after_its_function():
    """The name made up tells what runs."""
    with ThreadScope() as scope:
        assert "hearing" in scope.spawn(hearing).name


def test_a_running_task_can_be_asked_for_its_stack():
    """stack() shows where its thread stands, and is empty once it is done."""
    gate = Gate()
    with ThreadScope() as scope:
        task = scope.spawn(gate.hold)
        gate.await_arrival()
        assert "nobody opened the gate" in task.stack()
        gate.open()
        task.result(WAIT)
        assert scope.join(WAIT)
        assert task.stack() == ""


def test_keyword_arguments_reach_the_function():
    """Positional and keyword arguments are passed on, also one called fn."""
    with ThreadScope() as scope:
        assert scope.spawn(dict, a=1, fn=2).result(WAIT) == {"a": 1, "fn": 2}


@pytest.mark.parametrize("interrupt", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_an_interrupt_raised_by_a_child_is_its_failure(interrupt):
    """A child that calls sys.exit() ends nothing in silence: the scope raises it in a group."""
    with pytest.raises(BaseExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.spawn(fail, interrupt)
    assert caught.value.exceptions == (interrupt,)
    assert scope.report.tasks.failed == 1


@pytest.mark.parametrize("error", [ValueError("callback"), SystemExit(3), KeyboardInterrupt()])
def test_a_done_callback_that_raises_keeps_no_scope_open(error, caplog):
    """Whatever a done-callback raises, the task ends, the siblings are told, and the scope is left."""
    gate = Gate()
    with ThreadScope() as scope:
        task = scope.spawn(gate.hold, "value")
        task.add_done_callback(lambda _: fail(error))
        gate.open()
    assert task.result() == "value"
    assert scope.report.tasks.finished == 1


@pytest.mark.parametrize("error", [ValueError("callback"), SystemExit(3), KeyboardInterrupt()])
def test_a_cancel_callback_that_raises_keeps_no_scope_open(error, caplog):
    """A failing child whose cancel meets a callback that calls sys.exit() still ends, as does its scope."""
    failure = ValueError("child")
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.token.on_cancel(fail, error)
            scope.spawn(fail, failure)
    assert caught.value.exceptions == (failure,)


def test_an_abandoned_task_that_fails_later_is_told():
    """No failure is lost: what an orphan raises goes to listeners and the log."""
    gate, error = Gate(), ValueError("too late to be raised")
    with hearing(events.TaskFailed) as heard:
        with pytest.raises(StragglersLeft), ThreadScope(on_straggler="abandon", grace=0.01) as scope:
            scope.spawn(gate.fail, error, name="orphan")
            gate.await_arrival()
            scope.cancel()
        gate.open()
        told = heard.get(timeout=WAIT)
    assert (told.scope, told.task, told.error) == (scope.name, "orphan", error)


def test_defer_into_a_task_that_does_not_run_is_an_error():
    """A cleanup that nobody might run, before the task began or after it ended, is refused."""
    gate = Gate()
    with ThreadScope(max_threads=1) as scope:
        task, queued = scope.spawn(gate.hold), scope.spawn(str)
        with pytest.raises(ScopeClosed, match="queued"):
            queued.defer(print)
        gate.open()
        assert scope.join(WAIT)
        with pytest.raises(ScopeClosed, match="done"):
            task.defer(print)


def test_a_task_cannot_wait_for_itself():
    """result() of the current task would never return: it is an error instead."""
    gate = Gate()

    def wait_for_myself():
        gate.hold()
        return task.result(WAIT)

    with ThreadScope(on_error="collect") as scope:
        task = scope.spawn(wait_for_myself)
        gate.open()
        with pytest.raises(RuntimeError, match="itself"):
            task.result(WAIT)
        scope._crew.failures.clear()


def test_a_cancelled_task_lets_its_cleanups_run_before_it_is_done():
    """Task-level cleanups are part of the task: done() is True only after them."""
    gate, sleeper, order = Gate(), Sleeper(), []

    def work():
        defer(gate.hold)
        defer(order.append, "cleaned")
        sleeper.sleep()

    with ThreadScope() as scope:
        task = scope.spawn(work)
        sleeper.await_arrival()
        task.cancel()
        gate.await_arrival()
        assert not task.done()
        assert order == ["cleaned"]
        gate.open()
        with pytest.raises(TaskCancelled):
            task.result(WAIT)
