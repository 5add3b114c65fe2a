"""The thread cache: every job gets a thread, few threads do many jobs, and idle ones go."""

from __future__ import annotations

import queue
import threading

import pytest
from actors import WAIT, hearing, until

from tokenscope import on_thread_release
from tokenscope._core import _primitives, events
from tokenscope._core import workers as workers_module
from tokenscope._core.workers import IDLE_NAME, Workers, release_thread, submit, workers
from tokenscope.testing import drain


def threads():
    return [thread for thread in threading.enumerate() if thread.name == IDLE_NAME]


@pytest.fixture(autouse=True)
def _fresh():
    """Begin without cached threads."""
    assert drain()


def test_a_job_runs_on_a_daemon_thread():
    """submit() runs the job on a thread of the cache, which rests under a name of its own."""
    done = threading.Event()
    seen = []
    submit(lambda: (seen.append(threading.current_thread()), done.set()))
    assert done.wait(WAIT)
    (thread,) = seen
    assert thread.daemon
    assert thread is not threading.main_thread()
    until(lambda: thread.name == IDLE_NAME)


def test_jobs_that_wait_for_each_other_all_get_a_thread():
    """Fifty jobs that can only end together do not starve."""
    barrier = threading.Barrier(50)
    done = threading.Semaphore(0)
    for _ in range(50):
        submit(lambda: (barrier.wait(WAIT), done.release()))
    for _ in range(50):
        assert done.acquire(timeout=WAIT)


def test_a_burst_of_trivial_jobs_stays_on_few_threads():
    """A thousand jobs that do nothing need a handful of threads, not a thousand.

    How many is the system's choice: a new thread that gets no processor is no help, and the next one is started. So the
    best of some bursts counts; a thread for each job would fail them all.
    """
    assert min(threads_of_a_burst(1_000) for _ in range(10)) < 50


def threads_of_a_burst(jobs):
    idents = set()
    done = threading.Semaphore(0)
    for _ in range(jobs):
        submit(lambda: (idents.add(threading.get_ident()), done.release()))
    for _ in range(jobs):
        assert done.acquire(timeout=WAIT)
    assert drain()
    return len(idents)


def test_a_thread_is_used_again_only_after_its_job_has_ended():
    """While a job runs, its thread takes no other."""
    go_on, second = threading.Event(), threading.Event()
    idents = []
    started = threading.Event()
    submit(lambda: (idents.append(threading.get_ident()), started.set(), go_on.wait(WAIT)))
    assert started.wait(WAIT)
    submit(lambda: (idents.append(threading.get_ident()), second.set()))
    assert second.wait(WAIT)
    go_on.set()
    assert idents[0] != idents[1]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_job_that_fails_is_told_and_costs_no_thread(error):
    """Whatever a job raises, the worker lives and the error is told."""

    def fail():
        threading.current_thread().name = "job"
        raise error

    with hearing(events.ThreadFailed) as heard:
        submit(fail)
        event = heard.get(timeout=WAIT)
    assert (event.where, type(event.error)) == ("job", error)
    done = threading.Event()
    submit(done.set)
    assert done.wait(WAIT)
    until(lambda: len(threads()) == workers.threads)


def test_idle_threads_end(monkeypatch):
    """A worker without a job ends after a while, and the next job starts another."""
    monkeypatch.setattr(workers_module, "IDLE_SECONDS", 0.02)
    for _ in range(2):
        done = threading.Event()
        submit(done.set)
        assert done.wait(WAIT)
        until(lambda: threads() == [])
        assert (workers.idle, workers.starting, workers.threads) == (0, set(), 0)


def test_a_thread_that_cannot_start_leaves_nothing_behind(monkeypatch):
    """submit() raises, the job will never run, and the next one finds a working cache."""
    ran = []

    def none(target, name):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(_primitives, "start_thread", none)
        with pytest.raises(RuntimeError, match="start new thread"):
            submit(lambda: ran.append("never"))
    assert workers.starting == set()
    done = threading.Event()
    submit(done.set)
    assert done.wait(WAIT)
    assert ran == []


def test_a_backlog_that_gets_no_thread_is_told_and_waits(monkeypatch):
    """If the second of two jobs gets no thread, somebody is told, and it runs when the first has ended."""
    go_on, started, done = threading.Event(), threading.Event(), threading.Event()
    allow = [True]
    real = _primitives.start_thread

    def one(target, name):
        if not allow:
            raise RuntimeError("can't start new thread")
        allow.clear()
        return real(target, name)

    monkeypatch.setattr(_primitives, "start_thread", one)
    submit(lambda: (started.set(), go_on.wait(WAIT)))
    assert started.wait(WAIT)
    with pytest.raises(RuntimeError):
        submit(int)
    workers.jobs.put([done.set])  # one that came while the worker seemed idle
    go_on.set()
    assert done.wait(WAIT)


def test_hooks_run_when_a_thread_is_released():
    """Every hook runs, one that raises stops no other, and unregistering ends it, once for each registration."""
    ran = []

    def fail():
        ran.append("fails")
        raise ValueError

    ends = [on_thread_release(hook) for hook in (fail, lambda: ran.append("second"), fail)]
    with hearing(events.CallbackFailed) as heard:
        release_thread()
    assert ran == ["fails", "second", "fails"]
    assert heard.qsize() == 2
    ends[0]()
    ends[0]()
    ran.clear()
    with hearing(events.CallbackFailed):
        release_thread()
    assert ran == ["second", "fails"]
    for end in ends:
        end()
    release_thread()
    assert ran == ["second", "fails"]


def test_a_hook_must_be_callable():
    """on_thread_release refuses what it could not call."""
    with pytest.raises(TypeError, match="callable"):
        on_thread_release("close")


def test_a_job_that_comes_while_this_thread_looks_for_work_gets_a_thread():
    """A signal handler submits when the look that it interrupted has just found nothing to do: it looks again."""
    cache, first, second = Workers(), threading.Event(), threading.Event()

    class Jobs(queue.SimpleQueue):
        def empty(self):
            if cache.busy_here() and not first.is_set():
                self.get_nowait().pop()()  # another thread takes the job ...
                cache.submit(second.set)  # ... and the handler comes
                return True
            return super().empty()

    cache.jobs = Jobs()
    cache.submit(first.set)
    assert first.is_set()
    assert second.wait(WAIT)
    until(lambda: cache.idle == 1)
    cache.drain()
    until(lambda: cache.threads == 0)
