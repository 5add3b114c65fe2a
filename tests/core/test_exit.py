"""What is left when a scope, a task or the process has ended: nothing that holds anything up."""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import threading
import time
import weakref

import pytest
from actors import WAIT, Gate, Program, Sleeper, hearing, run_program, until

from tokenscope import CancellationToken, ThreadScope, current_token, on_thread_release, sleep
from tokenscope._core import _primitives, events
from tokenscope._core.timer import timer
from tokenscope.testing import drain


class Payload:
    """Something with a weak reference, to see whether anybody still holds it."""


# --- the interpreter ----------------------------------------------------------------------------------------


def test_the_interpreter_exits_promptly_with_parked_threads():
    """Cached workers and the timer, which would stay for ten seconds, do not hold the exit up."""
    began = time.monotonic()
    said = run_program("""
        import threading
        from tokenscope import ThreadScope, sleep
        barrier = threading.Barrier(20)
        with ThreadScope(timeout=3600) as scope:
            for _ in range(20):
                scope.spawn(barrier.wait)
        print(sum(thread.name == "tokenscope-idle" for thread in threading.enumerate()) > 0)
    """)
    assert said == "True"
    assert time.monotonic() - began < 5


def test_the_interpreter_exits_promptly_with_an_orphan():
    """A child that was given up does not keep the process either."""
    began = time.monotonic()
    said = run_program("""
        import threading
        from tokenscope import StragglersLeft, ThreadScope
        arrived = threading.Event()
        def deaf():
            arrived.set()
            threading.Event().wait(60)
        try:
            with ThreadScope(on_straggler="abandon", grace=0.01) as scope:
                scope.spawn(deaf)
                arrived.wait()
                scope.cancel()
        except StragglersLeft:
            print("left")
    """)
    assert said == "left"
    assert time.monotonic() - began < 5


def test_an_uncaught_error_in_a_scope_ends_the_process_promptly():
    """sys.exit() in the body cancels the children, and its status is the process's."""
    code = """
        import sys
        import tokenscope
        with tokenscope.ThreadScope() as scope:
            scope.spawn(tokenscope.sleep, 60)
            sys.exit(3)
    """
    began = time.monotonic()
    with Program(code) as program:
        assert program.finish() == (3, "", "")
    assert time.monotonic() - began < 5


def test_a_forked_child_leaves_an_inherited_scope_without_joining():
    """Threads do not survive a fork: leaving waits for nobody, and the parent's scope is undisturbed."""
    said = run_program("""
        import os, sys, threading, warnings
        from tokenscope import ThreadScope, check
        warnings.simplefilter("ignore")
        opened, arrived = threading.Event(), threading.Event()
        def hold():
            arrived.set()
            opened.wait(30)
            return "undisturbed"
        with ThreadScope() as scope:
            task = scope.spawn(hold)
            arrived.wait()
            child = os.fork()
            if child == 0:
                scope.__exit__(None, None, None)
                with ThreadScope() as own:
                    own.spawn(check).result(10)
                os._exit(7)
            _, status = os.waitpid(child, 0)
            opened.set()
            print(os.waitstatus_to_exitcode(status), task.result(10))
    """)
    assert said == "7 undisturbed"


# --- threads ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_threads(monkeypatch):
    """A system that has no thread to give, until it is told otherwise."""
    assert drain()
    start = _primitives.start_thread

    def refuse(target, name):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_primitives, "start_thread", refuse)
    return lambda: monkeypatch.setattr(_primitives, "start_thread", start)


@pytest.mark.parametrize("max_threads", [None, 1])
def test_a_thread_that_cannot_start_leaves_nothing_behind(no_threads, max_threads):
    """Spawn raises, no task lives, the scope can be used on and left, and nothing of the task is kept."""
    payload = Payload()
    kept = weakref.ref(payload)
    ran = []
    with ThreadScope(max_threads=max_threads) as scope:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            scope.spawn(ran.append, payload)
        assert scope.snapshot().tasks == ()
        assert scope.join(0)
        del payload
        gc.collect()
        assert kept() is None
        no_threads()
        assert scope.spawn(str, 1).result(WAIT) == "1"
    assert ran == []
    assert scope.report.tasks.spawned == 1


def test_a_queued_task_runs_although_no_further_thread_can_be_started(monkeypatch):
    """When the thread before it is free again it takes over; nothing is stuck."""
    assert drain()
    gate = Gate()
    with ThreadScope(max_threads=1) as scope:
        scope.spawn(gate.hold)
        gate.await_arrival()
        task = scope.spawn(str, 1)

        def refuse(target, name):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(_primitives, "start_thread", refuse)
        gate.open()
        assert task.result(WAIT) == "1"


def test_threads_are_used_again():
    """A thousand trivial children, one after the other, do not take a thousand threads."""
    with ThreadScope() as scope:
        idents = {scope.spawn(threading.get_ident).result(WAIT) for _ in range(1000)}
    assert len(idents) < 50


def test_idle_threads_are_named_as_such_and_are_daemons():
    """So that leak checks and interpreters know them."""
    with ThreadScope() as scope:
        thread = scope.spawn(threading.current_thread, name="mine").result(WAIT)
    until(lambda: thread.name == "tokenscope-idle")
    assert thread.daemon


def test_release_hooks_run_on_the_tasks_thread_before_it_counts_as_ended():
    """A hook can close what is kept per thread; one that raises changes no outcome."""
    gate, seen = Gate(), []

    def hook():
        seen.append(threading.get_ident())
        gate.hold()

    def broken():
        raise ValueError("hook")

    unregister = [on_thread_release(broken), on_thread_release(hook)]
    try:
        with hearing(events.CallbackFailed) as heard:
            with ThreadScope() as scope:
                task = scope.spawn(threading.get_ident)
                gate.await_arrival()
                assert not task.done()
                assert scope.join(0) is False
                gate.open()
                assert seen == [task.result(WAIT)]
            assert str(heard.get(timeout=WAIT).error) == "hook"
    finally:
        for undo in unregister:
            undo()
    with ThreadScope() as scope:
        scope.spawn(str).result(WAIT)
    assert len(seen) == 1
    with pytest.raises(TypeError, match="callable"):
        on_thread_release("hook")


# --- alarms and memory --------------------------------------------------------------------------------------


def test_the_alarm_of_a_scope_is_gone_when_it_ends():
    """Ten thousand scopes with an hour's timeout leave neither tokens nor a heap of alarms."""
    refs = []
    for _ in range(1000):
        with ThreadScope(timeout=3600) as scope:
            pass
        refs.append(weakref.ref(scope.token))
    alarms = [entry[2] for entry in timer.heap]
    assert sum(not alarm.off for alarm in alarms if alarm() is not None and alarm().deadline is not None) == 0
    del scope, alarms
    gc.collect()
    assert not any(ref() for ref in refs)
    assert len(timer.heap) < 300


@pytest.mark.parametrize("max_threads", [None, 2])
@pytest.mark.parametrize("end", ["return", "fail", "cancel"])
def test_nothing_is_kept_of_finished_tasks(end, max_threads):
    """Arguments, results, tokens and tasks of an open scope can be collected, also of what had to wait."""
    parent = CancellationToken()
    refs: list[weakref.ref] = []

    def work(payload):
        refs.append(weakref.ref(current_token()))
        if end == "fail":
            raise ValueError
        if end == "cancel":
            sleep(WAIT)
        return payload

    def spawn_many(scope):
        tasks = []
        for _ in range(50):
            payload = Payload()
            refs.append(weakref.ref(payload))
            tasks.append(scope.spawn(work, payload))
            refs.append(weakref.ref(tasks[-1]))
        if end == "cancel":
            for task in tasks:
                task.cancel()

    try:
        with ThreadScope(token=parent, max_threads=max_threads, on_error="collect") as scope:
            spawn_many(scope)
            assert scope.join(WAIT)
            scope._crew.failures.clear()  # these are kept: they are raised at the end
            until_collected(refs)
            assert scope.report.tasks.spawned == 50
    finally:
        del scope


def until_collected(refs):
    """Wait for the last worker to let go of its last task."""

    def gone():
        gc.collect()
        return not any(ref() for ref in refs)

    until(gone, "the end of what finished tasks held")


@pytest.mark.parametrize("max_threads", [None, 1])
def test_memory_is_flat_however_many_tasks_a_scope_has_had(max_threads):
    """An open scope holds no object per finished task, whether it ran at once or had to wait."""
    parent, held = CancellationToken(), []
    with ThreadScope(token=parent, max_threads=max_threads) as scope:
        for _ in range(8):
            for _ in range(400):
                scope.spawn(str)
            assert scope.join(WAIT)
            gc.collect()
            held.append(len(gc.get_objects()))
    # The median: a thread that started, or one that still holds its last task, is no leak.
    growths = [after - before for before, after in itertools.pairwise(held)]
    assert statistics.median(growths) < 40, held


def test_an_ended_scope_is_not_kept_by_a_living_parent():
    """A token that lives as long as the process does not collect the scopes that ran under it."""
    parent, refs = CancellationToken(), []
    for _ in range(20):
        with ThreadScope(token=parent, timeout=3600, max_threads=1) as scope:
            for _ in range(3):
                scope.spawn(str)
            scope.defer(str)
        refs += [weakref.ref(scope), weakref.ref(scope.token)]
    del scope
    until_collected(refs)
    assert not parent.cancelled


def test_a_failed_childs_frames_go_with_its_scope():
    """When error and scope are dropped, nothing of the library keeps what the frames held."""
    refs = []

    def work():
        payload = Payload()
        refs.append(weakref.ref(payload))
        raise ValueError

    with pytest.raises(ExceptionGroup):
        with ThreadScope() as scope:
            scope.spawn(work)
    del scope
    sys.last_value = None
    until_collected(refs)


def test_cancelling_a_long_queue_is_quick():
    """Two thousand queued tasks end within a second or so: no quadratic walk per task."""
    gate, sleeper = Gate(), Sleeper()
    with ThreadScope(max_threads=1) as scope:
        scope.spawn(gate.hold)
        gate.await_arrival()
        for _ in range(2000):
            scope.spawn(sleeper.sleep)
        began = time.monotonic()
        scope.cancel()
        took = time.monotonic() - began
        gate.open()
    assert scope.report.tasks.never_started == 2000
    assert took < 5
