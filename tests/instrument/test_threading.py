"""`instrument("threading")`: bare threads and executors' work become children of the scope that they are started in."""

from __future__ import annotations

import contextvars
import os
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from peers import Attempt, wait_until

import tokenscope
from tokenscope import (
    CancellationToken,
    Cancelled,
    StragglersLeft,
    TaskCancelled,
    ThreadScope,
    current_scope,
    current_token,
    shield,
    sleep,
    use_token,
)

INIT, START, SUBMIT = threading.Thread.__init__, threading.Thread.start, ThreadPoolExecutor.submit


@pytest.fixture(autouse=True)
def _restored():
    yield
    tokenscope.uninstrument()
    assert (threading.Thread.__init__, threading.Thread.start) == (INIT, START)
    assert ThreadPoolExecutor.submit is SUBMIT


@pytest.fixture
def _on():
    assert tokenscope.instrument("threading").turned_on == ("threading",)


def test_it_is_turned_on_by_name_only():
    """Without its name nothing of it is touched."""
    assert "threading" not in tokenscope.instrument().turned_on
    assert threading.Thread.start is START
    tokenscope.instrument("threading")
    assert threading.Thread.start is not START
    assert "threading" in tokenscope.uninstrument().turned_off


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_on")
def test_a_bare_thread_is_joined_by_its_scope():
    """It has ended when the `with` has, and it ran as a child: context, token and owner are the scope's."""
    var = contextvars.ContextVar("var", default="outside")
    go, seen = threading.Event(), []

    def work(*args: Any) -> None:
        go.wait(10)
        seen.append((args, var.get(), current_scope(), current_token(), threading.current_thread().name))

    with ThreadScope() as scope:
        var.set("inside")
        thread = threading.Thread(target=work, args=(1, 2), name="legacy")
        thread.start()
        assert thread.is_alive()
        assert [task.name for task in scope.snapshot().tasks] == ["legacy"]
        go.set()
    thread.join(10)  # its last lines, after the work
    assert not thread.is_alive()
    ((args, value, owner, token, name),) = seen
    assert (args, value, owner, name) == ((1, 2), "inside", scope, "legacy")
    assert token is not scope.token
    assert scope.report.tasks.spawned == scope.report.tasks.finished == 1


@pytest.mark.usefixtures("_on")
def test_a_cancel_ends_it_quietly(monkeypatch):
    """At its next checkpoint; no traceback is printed, and `join` returns."""
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    started = threading.Event()
    with ThreadScope() as scope:
        thread = threading.Thread(target=lambda: (started.set(), sleep(60)))
        thread.start()
        assert started.wait(10)
        scope.cancel()
    thread.join(10)  # its last lines, after the work
    assert not thread.is_alive()
    assert told == []
    assert scope.report.tasks.cancelled == 1
    assert scope.cancelled_caught


@pytest.mark.usefixtures("_on")
def test_what_a_thread_fails_with_is_told_as_ever(monkeypatch):
    """By `threading.excepthook`, and by nobody else: the scope does not fail, siblings go on."""
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append((args.exc_type, args.thread)))
    with ThreadScope() as scope:
        failing = threading.Thread(target=lambda: 1 / 0)
        leaving = threading.Thread(target=lambda: (_ for _ in ()).throw(SystemExit))
        for thread in (failing, leaving):
            thread.start()
            thread.join()
        assert not scope.token.cancelled
    assert told == [(ZeroDivisionError, failing), (SystemExit, leaving)]  # which the usual hook passes over
    assert scope.report.outcome == "succeeded"


@pytest.mark.usefixtures("_on")
def test_a_cancel_of_somebody_else_is_an_error_there(monkeypatch):
    """A `Cancelled` of another token does not end a thread quietly."""
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_type))

    def work() -> None:
        other = CancellationToken()
        other.cancel()
        other.check()

    with ThreadScope():
        threading.Thread(target=work).start()
    assert told == [Cancelled]


@pytest.mark.usefixtures("_on")
def test_a_class_with_a_run_of_its_own_is_adopted_and_left_as_it_was():
    """So is an instance that was given one; and a `Timer` is a thread as any other."""
    ran = []

    class Legacy(threading.Thread):
        def run(self) -> None:
            ran.append(current_scope())

    with ThreadScope() as scope:
        plain, given = Legacy(), threading.Thread()
        given.run = own = lambda: ran.append(current_scope())  # type: ignore[method-assign]
        timer = threading.Timer(0, lambda: ran.append(current_scope()))
        for thread in (plain, given, timer):
            thread.start()
            thread.join()
    assert ran == [scope] * 3
    assert "run" not in plain.__dict__
    assert given.__dict__["run"] is own


@pytest.mark.usefixtures("_on")
def test_children_of_children_belong_to_the_same_scope():
    """A thread that a child starts, whose threads are daemons by inheritance, and one that an adopted thread starts."""
    ended = []

    def inner() -> None:
        ended.append("inner")

    def outer() -> None:
        threading.Thread(target=inner).start()
        ended.append("outer")

    with ThreadScope() as scope:
        scope.spawn(lambda: threading.Thread(target=outer).start())
    assert sorted(ended) == ["inner", "outer"]
    assert scope.report.tasks.spawned == 3


@pytest.mark.usefixtures("_on")
def test_daemons_are_left_alone():
    """Nobody waits for a daemon: that is what the word means. It counts who says so, not who inherits it."""
    stop = threading.Event()
    named = threading.Thread(target=stop.wait, args=(10,), daemon=True)
    by_attribute = threading.Thread(target=stop.wait, args=(10,))
    by_attribute.daemon = True

    def child() -> None:
        threads.append(threading.Thread(target=stop.wait, args=(10,), daemon=True))
        threads[-1].start()

    threads = [named, by_attribute]
    with ThreadScope() as scope:
        for thread in (named, by_attribute):
            thread.start()
        scope.spawn(child)
    assert all(thread.is_alive() for thread in threads)
    assert scope.report.tasks.spawned == 1
    stop.set()
    for thread in threads:
        thread.join(10)


@pytest.mark.usefixtures("_on")
def test_outside_of_scopes_and_in_shields_nothing_is_adopted():
    """The way to leave the owner on purpose is the same as ever."""
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait, args=(10,)) for _ in range(3)]
    threads[0].start()
    with ThreadScope() as scope:
        with shield():
            threads[1].start()
        scope.defer(threads[2].start)
    assert all(thread.is_alive() for thread in threads)
    assert scope.report.tasks.spawned == 0
    stop.set()
    for thread in threads:
        thread.join(10)


@pytest.mark.usefixtures("_on")
def test_under_a_cancelled_scope_a_thread_starts_and_does_nothing():
    """As a task that is cancelled before it begins; whoever joins it goes on."""
    ran = []
    with ThreadScope() as scope:
        scope.cancel()
        thread = threading.Thread(target=ran.append, args=(1,))
        thread.start()
        thread.join(10)
    assert ran == []
    assert scope.report.tasks.never_started == 1


@pytest.mark.usefixtures("_on")
def test_a_scope_that_has_ended_adopts_nobody():
    """Code that kept its context behind: the thread is one as ever."""
    ran = []
    with ThreadScope():
        context = contextvars.copy_context()
    thread = threading.Thread(target=ran.append, args=(1,))
    context.run(thread.start)
    thread.join(10)
    assert ran == [1]


@pytest.mark.usefixtures("_on")
def test_starting_twice_fails_as_ever():
    """And adopts nothing that would be waited for."""
    with ThreadScope() as scope:
        thread = threading.Thread(target=int)
        thread.start()
        with pytest.raises(RuntimeError, match="once"):
            thread.start()
    assert scope.report.tasks.spawned == 1


@pytest.mark.usefixtures("_on")
def test_a_thread_that_the_system_refuses_leaves_nothing_behind(monkeypatch):
    """The error passes, the thread can be started later, and the scope has nobody to wait for."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    thread = threading.Thread(target=int)
    with ThreadScope() as scope:
        with monkeypatch.context() as patch:
            for name in ("_start_new_thread", "_start_joinable_thread"):  # before and since Python 3.13
                patch.setattr(threading, name, refuse, raising=False)
            with pytest.raises(RuntimeError, match="start new thread"):
                thread.start()
        assert "run" not in thread.__dict__
        assert not scope.snapshot().tasks
        thread.start()
    thread.join(10)  # its last lines, after the work
    assert not thread.is_alive()


@pytest.mark.usefixtures("_on")
def test_one_that_does_not_end_is_a_straggler_and_can_be_given_up():
    """As every child: told by name, and reported as an orphan."""
    gate = threading.Event()
    with (
        pytest.raises(StragglersLeft, match="deaf"),
        ThreadScope(on_straggler="abandon", grace=0.01) as scope,
    ):
        thread = threading.Thread(target=gate.wait, args=(10,), name="deaf")
        thread.start()
        scope.cancel()
    assert scope.report.orphans == ("deaf",)
    gate.set()
    thread.join(10)


@pytest.mark.usefixtures("_on")
def test_threads_of_the_standard_library_and_ours_are_left_alone():
    """A pool that is made in a scope may outlive it; so may the timer thread that a deadline needs."""
    with ThreadScope(timeout=60) as scope:
        pool = ThreadPoolExecutor(1)
        with shield():
            pool.submit(int).result()
        scope.spawn(int).result()
    assert scope.report.tasks.spawned == 1
    pool.shutdown()


# --- executors ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool():
    """An executor of one thread, which has started."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        yield pool


@pytest.mark.usefixtures("_on")
def test_the_work_of_an_executor_is_joined(pool):
    """It runs as a child of the scope it was submitted in, on the executor's thread, which keeps its name."""
    go = threading.Event()
    with ThreadScope() as scope:
        future = pool.submit(lambda: (go.wait(10), current_scope())[1])
        go.set()
    assert future.done()
    assert future.result() is scope
    assert scope.report.tasks.spawned == 1
    assert pool.submit(lambda: threading.current_thread().name).result().startswith("ThreadPoolExecutor")


@pytest.mark.usefixtures("_on")
def test_results_and_failures_stay_the_futures(pool):
    """The scope does not fail by them; `map` works as ever."""
    with ThreadScope() as scope:
        assert pool.submit(divmod, 7, 2).result() == (3, 1)
        assert pool.submit(dict, a=1).result() == {"a": 1}
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 7, 0).result()
        assert list(pool.map(str, [1, 2])) == ["1", "2"]
    assert scope.report.outcome == "succeeded"
    assert scope.report.errors == ()


@pytest.mark.usefixtures("_on")
def test_a_cancel_ends_what_runs_and_what_is_queued(pool):
    """Whoever asks the future, and is not cancelled himself, gets no `Cancelled`."""
    started = threading.Event()
    with ThreadScope() as scope:
        running = pool.submit(lambda: (started.set(), sleep(60)))
        queued = pool.submit(int)
        assert started.wait(10)
        scope.cancel()
    with pytest.raises(TaskCancelled) as caught:
        running.result()
    assert caught.value.reason is scope.token.reason
    assert queued.cancelled()
    assert scope.report.tasks.never_started == 1
    assert scope.report.tasks.cancelled == 1


@pytest.mark.usefixtures("_on")
def test_what_others_cancel_in_the_queue_is_not_waited_for(pool):
    """`future.cancel()`, and a shutdown that cancels: the scope ends."""
    gate, busy = threading.Event(), threading.Event()
    blocker = pool.submit(lambda: (busy.set(), gate.wait(10))[1])
    assert busy.wait(10)
    with ThreadScope() as scope:
        first, second = pool.submit(int), pool.submit(int)
        assert first.cancel()
        pool.shutdown(wait=False, cancel_futures=True)
    assert second.cancelled()
    assert scope.report.tasks.never_started == 2
    gate.set()
    assert blocker.result()


@pytest.mark.usefixtures("_on")
def test_an_executor_that_refuses_leaves_nothing_behind(pool):
    """A submit after the shutdown."""
    pool.shutdown()
    with ThreadScope() as scope:
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(int)
        assert not scope.snapshot().tasks


@pytest.mark.usefixtures("_on")
def test_a_broken_executor_is_not_waited_for():
    """Its initializer failed: its work never runs, and the futures say so."""

    def fail() -> None:
        raise ValueError("no")

    with ThreadPoolExecutor(1, initializer=fail) as pool, ThreadScope():
        future: Future[int] = pool.submit(int)
        assert future.exception(10) is not None


@pytest.mark.usefixtures("_on")
def test_work_for_nobody_is_the_executors(pool):
    """Outside of scopes, and in shields."""
    with ThreadScope() as scope, shield():
        assert pool.submit(int).result() == 0
    assert scope.report.tasks.spawned == 0


# --- on and off -----------------------------------------------------------------------------------------------------


def test_turning_it_off_leaves_what_was_adopted_as_it_is():
    """It is still joined, and still ends with the scope."""
    started = threading.Event()
    tokenscope.instrument("threading")
    with ThreadScope() as scope:
        thread = threading.Thread(target=lambda: (started.set(), sleep(60)))
        thread.start()
        assert started.wait(10)
        tokenscope.uninstrument("threading")
        assert threading.Thread.start is START
        scope.cancel()
    thread.join(10)  # its last lines, after the work
    assert not thread.is_alive()


@pytest.mark.usefixtures("_on")
def test_many_starts_and_cancels_at_once():
    """Threads that start threads while the scope is cancelled: all end, none is lost or waited for in vain."""
    for round_ in range(30):
        alive: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()

        def start(depth: int, alive: queue.SimpleQueue[threading.Thread] = alive) -> None:
            if depth:
                thread = threading.Thread(target=start, args=(depth - 1,))
                alive.put(thread)
                thread.start()
                sleep(0)

        with ThreadScope() as scope:
            for _ in range(4):
                scope.spawn(start, 3)
            if round_ % 2:
                scope.cancel()
        threads = [alive.get() for _ in range(alive.qsize())]
        wait_until(lambda threads=threads: not any(thread.is_alive() for thread in threads))


@pytest.mark.usefixtures("_on")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_may_start_threads():
    """In a scope that it inherited: nothing of the parent's is waited for."""
    with ThreadScope():
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ran: list[int] = []
                thread = threading.Thread(target=ran.append, args=(1,))
                thread.start()
                thread.join(10)
                code = 7 if ran == [1] else 2
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.usefixtures("_on")
def test_a_token_alone_owns_nothing():
    """Without a scope there is nobody who would join."""
    go = threading.Event()
    with use_token(CancellationToken()):
        thread = threading.Thread(target=go.wait, args=(10,))
        thread.start()
    assert thread.is_alive()
    go.set()
    assert Attempt(thread.join).value() is None
