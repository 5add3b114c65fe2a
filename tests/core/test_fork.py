"""Forks in the middle of everything: the child starts afresh, the parent notices nothing."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback

import pytest
from actors import WAIT
from crowd import Runner, crowd

import tokenscope
from tokenscope import CancellationToken
from tokenscope._core.timer import timer
from tokenscope._core.workers import on_thread_release, workers

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    # Since 3.12 forking with threads warns; doing just that, as gunicorn and uWSGI do, is the subject of this file.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def fork(work):
    """Run ``work()`` in a forked child, and end it there; its process id."""
    pid = os.fork()
    if pid:
        return pid
    # A coverage tracer has a lock of its own, which another thread may have held at the fork.
    sys.settrace(None)
    threading.settrace(None)
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, chain=True)  # a child that hangs says where, and dies
        signal.alarm(int(WAIT))
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def status_of(pid, limit=2 * WAIT):
    """How the child ended; it is killed if it does not."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGUSR1)  # says where it hangs
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


@pytest.fixture(autouse=True)
def _stacks_of_what_hangs():
    """Inherited by the child, so that it also tells of a hang before its own first line."""
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    yield
    faulthandler.unregister(signal.SIGUSR1)


class World:
    """One tree that everybody uses, with a linked one below it."""

    def __init__(self):
        self.root = CancellationToken()
        self.child = self.root.child(timeout=3600)
        self.linked = CancellationToken.linked(self.child, CancellationToken())
        self.parents_calls = []
        self.registrations = [
            token.on_cancel(self.parents_calls.append, 1) for token in (self.root, self.child, self.linked)
        ]

    def churn(self, stop, busy=lambda: None):
        """What the parent's threads do all the time; `busy()` after the first round."""
        self.churn_once()
        busy()
        while not stop.is_set():
            self.churn_once()

    def churn_once(self):
        token = self.linked.child(timeout=60)
        with token.on_cancel(int):
            CancellationToken.linked(self.root, token).cancel()
        token.wait(0)
        CancellationToken(timeout=0.0001).on_cancel(int, blocking=True)

    def work_in_child(self):
        """The inherited tree and a new one work: create, register, wait, deadlines, cancel, callbacks, workers."""
        called = []
        fired = threading.Event()
        late = self.linked.child(timeout=0.001)
        late.on_cancel(fired.set)
        self.linked.child().on_cancel(called.append, "mine")
        assert fired.wait(WAIT)
        assert late.reason.kind == "deadline"
        assert not self.root.cancelled
        for registration in self.registrations[:1]:
            registration.close()
        blocking = threading.Event()
        self.child.on_cancel(blocking.set, blocking=True)
        waiter = Runner(lambda: self.linked.wait(WAIT))
        assert self.root.cancel() is True
        assert waiter.result()
        assert self.linked.reason is self.root.reason
        assert called == ["mine"]
        assert blocking.wait(WAIT)
        assert self.parents_calls == []
        self.work_in_new_tree()

    def work_in_new_tree(self):
        fresh = CancellationToken(timeout=0.001)
        assert fresh.wait(WAIT)
        with tokenscope.ThreadScope() as scope:
            assert scope.spawn(pow, 2, 5).result(WAIT) == 32


def test_a_hundred_forks_under_churn():
    """While four threads churn one tree, 100 of 100 children end and work, and the parent is undisturbed."""
    world = World()
    stop = threading.Event()
    # Coverage locks when it meets a file for the first time; a child forked in that moment hangs in our fork hook.
    warm = threading.Barrier(5)
    with crowd(*[lambda: world.churn(stop, busy=warm.wait) for _ in range(4)]):
        try:
            warm.wait(WAIT)
            statuses = [status_of(fork(world.work_in_child)) for _ in range(100)]
        finally:
            stop.set()
    assert statuses == [0] * 100
    assert not world.root.cancelled
    assert world.linked.child().wait(0) is False
    world.root.cancel()
    assert world.parents_calls == [1, 1, 1]


def test_a_fork_in_the_middle_of_a_locked_section():
    """The child gets a fresh lock, though the parent's was held by another thread at the fork."""
    root = CancellationToken()
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        with root._tree.enter(), timer.enter(), workers.enter():
            inside.set()
            go_on.wait(WAIT)

    holder = Runner(hold)
    assert inside.wait(WAIT)

    def work():
        assert root.child(timeout=0.001).wait(WAIT)
        fired = threading.Event()
        root.on_cancel(fired.set, blocking=True)
        root.cancel()
        assert fired.wait(WAIT)
        on_thread_release(int)()

    status = status_of(fork(work))
    go_on.set()
    holder.result()
    assert status == 0
    assert not root.cancelled


def test_a_fork_while_callbacks_run():
    """A cancel that was under way in the parent is marked to its end in the child, without the parent's callbacks."""
    root = CancellationToken()
    leaf = root.child()
    inside, go_on = threading.Event(), threading.Event()
    calls = []
    leaf.on_cancel(calls.append, "older")
    registration = leaf.on_cancel(lambda: (inside.set(), go_on.wait(WAIT)))
    canceller = Runner(root.cancel)
    assert inside.wait(WAIT)

    def work():
        assert leaf.cancelled
        assert registration.close() is False  # and does not wait for a thread that is not here
        assert root.child().cancelled
        leaf.on_cancel(calls.append, "late")
        assert calls == ["late"]
        assert root._tree.unfinished == []

    status = status_of(fork(work))
    go_on.set()
    canceller.result()
    assert status == 0
    assert calls == ["older"]


def test_flags_survive_a_fork_and_registrations_do_not():
    """What was cancelled stays so in the child; callbacks and waiters of the parent are dropped there."""
    root = CancellationToken()
    dead = root.child()
    dead.cancel("before")
    calls = []
    registration = root.on_cancel(calls.append, 1)

    def work():
        assert dead.reason.message == "before"
        root.cancel()
        assert calls == []
        assert not root._tree.pinned
        registration.close()

    assert status_of(fork(work)) == 0
    root.cancel()
    assert calls == [1]


def test_an_inherited_deadline_is_kept_in_the_child():
    """A deadline set before the fork is seen there by whoever waits."""
    token = CancellationToken(timeout=0.05)

    def work():
        assert token.wait(WAIT)
        assert token.reason.kind == "deadline"

    assert status_of(fork(work)) == 0
    assert token.wait(WAIT)


def test_a_grandchild_works_too():
    """A fork in a fork starts afresh once more."""
    world = World()

    def work():
        world.linked.child().cancel()
        assert status_of(fork(world.work_in_child)) == 0
        world.work_in_child()

    assert status_of(fork(work)) == 0
