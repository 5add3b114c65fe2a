"""Re-entry: signal handlers and finalizers that use the very trees in whose locked sections they arrive."""

from __future__ import annotations

import gc
import signal
import threading
import time
from contextlib import contextmanager
from itertools import cycle

import pytest
from actors import WAIT, until
from crowd import crowd

from tokenscope import CancellationToken
from tokenscope._core import events
from tokenscope._core.timer import timer
from tokenscope._core.workers import on_thread_release, workers

pytestmark = [
    pytest.mark.timeout(60, method="thread"),  # the other method needs the signal that is used here
    # Coverage takes a plain lock of its own whenever it meets a new file, and a handler in the middle of that waits
    # for itself.
    pytest.mark.no_cover,
]

EVERY = 200e-6
#: Seconds that one storm lasts.
STORM = 1.5

_muted = []


@contextmanager
def signals(handler):
    """Have ``handler()`` called every 200 µs in the main thread, in the middle of whatever it does.

    Also in the middle of itself, but not deeper: on a slow machine a handler takes longer than the interval, and
    nothing but handlers in handlers would ever run.
    """
    depth = 0
    over = False

    def on_signal(_number, _frame):
        nonlocal depth
        if _muted or depth > 1:
            return
        depth += 1
        try:
            handler()
        finally:
            depth -= 1
            if not (depth or over):  # the next one is counted from here, so that the main code gets its turn
                signal.setitimer(signal.ITIMER_REAL, EVERY, EVERY)

    before = signal.signal(signal.SIGALRM, on_signal)
    signal.setitimer(signal.ITIMER_REAL, EVERY, EVERY)
    try:
        yield
    finally:
        over = True  # first: a handler that runs on the next line must not set the timer again
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def quiet():
    """Let no handler run in the block. Blocking the signal would only send it to another thread of the process."""
    _muted.append(True)
    try:
        yield
    finally:
        _muted.clear()


@pytest.fixture
def _eager_gc():
    """Collect garbage after every 50 allocations."""
    before = gc.get_threshold()
    gc.set_threshold(50)
    yield
    gc.set_threshold(*before)


class Trash:
    """Garbage in a cycle that uses the tree in its finalizer."""

    def __init__(self, world):
        self.me = self
        self.world = world

    def __del__(self):
        self.world.disturb("finalizer")


class World:
    """One round: trees that the main code and its disturbers use at the same time."""

    def __init__(self):
        self.root, self.other = CancellationToken(name="root"), CancellationToken(name="other")
        self.child = self.root.child()
        self.linked = CancellationToken.linked(self.child, self.other)
        self.calls = []  # keys of callbacks that were called
        self.armed = {}  # key -> registration, of callbacks that must be called unless closed
        self.closed = []  # keys of registrations that were closed in time
        self.made = [self.child, self.linked]
        self.disturbances = 0
        self.steps = cycle((self.make, self.link, self.cancel_one, self.register, self.close_one, self.deadline))

    def disturb(self, _who):
        self.disturbances += 1
        next(self.steps)()

    def make(self):
        self.made.append(self.linked.child())
        self.made.append(self.root.child())

    def link(self):
        self.made.append(CancellationToken.linked(self.child, self.linked))

    def cancel_one(self):
        token = CancellationToken.linked(self.root, self.child)
        key = self.register(token)
        token.cancel()
        self.made.append(token)
        return key

    def register(self, token=None):
        key = object()
        self.armed[key] = (token or self.linked).on_cancel(self.calls.append, key)
        return key

    def close_one(self):
        key = self.register(self.child.child())
        if self.armed[key].close():
            self.closed.append(key)

    def deadline(self):
        self.made.append(self.child.child(timeout=30))

    def work(self, times):
        """What the main code does, over and over."""
        for _ in range(times):
            Trash(self)
            self.make()
            self.link()
            self.register()
            self.close_one()
            self.cancel_one()
            self.deadline()

    def check(self):
        """No cancel and no callback was lost; nothing is left locked or put off."""
        assert self.root.cancelled
        assert all(token.cancelled for token in self.made)
        assert len(set(self.calls)) == len(self.calls)
        assert set(self.calls) == set(self.armed) - set(self.closed)
        for tree in {token._tree for token in (self.root, self.other, self.linked)}:
            assert not tree.busy_here()
            assert not tree.inbox
            assert all(cut.finished for cut in tree.unfinished)
            assert not tree.pinned


@pytest.mark.usefixtures("_eager_gc")
def test_a_storm_of_signals_and_finalizers():
    """A signal every 200 µs and a collection every 50 allocations, all on the same trees: no hang, no lost cancel."""
    worlds = [World()]
    disturbances = rounds = 0
    end = time.monotonic() + STORM
    with signals(lambda: worlds[0].disturb("signal")):
        while time.monotonic() < end or rounds <= 10:
            world = worlds[0]
            world.work(5)
            assert world.root.cancel("main") or world.root.cancelled
            with quiet():
                gc.collect()
                world.check()
                rounds += 1
                disturbances += world.disturbances
                worlds[0] = World()
    assert disturbances > rounds


@pytest.mark.usefixtures("_eager_gc")
def test_a_storm_while_other_threads_work():
    """The same, with three more threads on the trees: they, too, meet finalizers, and the main thread signals."""
    worlds = [World()]
    end = time.monotonic() + STORM
    barrier = threading.Barrier(4)

    def helper():
        while True:
            barrier.wait(WAIT)
            if worlds[0] is None:
                return
            worlds[0].work(3)
            barrier.wait(WAIT)

    with crowd(helper, helper, helper):
        try:
            with signals(lambda: worlds[0] and worlds[0].disturb("signal")):
                while time.monotonic() < end:
                    world = worlds[0]
                    barrier.wait(WAIT)
                    world.work(3)
                    assert world.root.cancel("main") or world.root.cancelled
                    barrier.wait(WAIT)
                    with quiet():
                        gc.collect()
                        world.check()
                        worlds[0] = World()
                worlds[0] = None
                barrier.wait(WAIT)
        except BaseException:
            barrier.abort()
            raise


def test_a_cancel_from_a_handler_is_never_lost():
    """A handler that cancels the tree in the middle of any operation on it: the operation carries it out."""
    roots = [CancellationToken()]
    fired = []

    def handler():
        roots[0].cancel("handler")
        fired.append(roots[0])

    end = time.monotonic() + STORM / 2
    with signals(handler):
        while time.monotonic() < end or len(fired) <= 100:
            root = CancellationToken()
            linked = CancellationToken.linked(root, CancellationToken())
            roots[0] = root
            while not root.cancelled:
                linked.child()
                linked.on_cancel(int).close()
                linked.child(timeout=9).wait(0)
                linked.child().cancel()
            child = linked.child()
            assert child.cancelled


def test_deadlines_set_by_handlers_are_kept():
    """Alarms posted in the middle of the timer's own sections ring all the same."""
    made = []

    def handler():
        made.append(CancellationToken(timeout=0.001))

    end = time.monotonic() + STORM / 2
    with signals(handler):
        while time.monotonic() < end:
            made.append(CancellationToken(timeout=0.002))
            CancellationToken(timeout=30)
    until(lambda: all(token.cancelled for token in made))
    assert not timer.posted


def test_deadlines_set_by_finalizers_on_the_timer_thread_are_kept():
    """A finalizer that runs in the middle of the timer thread's own section may set a deadline."""
    made = []
    ready = threading.Event()

    class Late:
        def __del__(self):
            made.append((threading.current_thread().name, CancellationToken(timeout=0.001)))
            ready.set()

    class Owner:
        pass

    owner = Owner()
    owner.late = Late()
    alarm = _DropsItsOwner(owner, time.monotonic() + 0.01)
    alarm.box.append(owner)
    del owner
    timer.add(alarm)
    assert ready.wait(WAIT)
    (name, token) = made[0]
    assert name == "tokenscope-timer"
    until(lambda: token.cancelled)


class _DropsItsOwner(type(CancellationToken(timeout=3600)._more.alarm)):
    """An alarm whose time is compared in the section, which drops the last reference to its owner there."""

    __slots__ = ("box",)

    def __init__(self, owner, when):
        super().__init__(owner, _Dropping(when, self))
        self.box = []

    def ring(self):
        pass


class _Dropping(float):
    """A time that lets go of what its alarm holds when the heap is looked at by the timer thread."""

    def __new__(cls, value, alarm):
        return super().__new__(cls, value)

    def __init__(self, value, alarm):
        self.alarm = alarm

    def __le__(self, other):
        if threading.current_thread().name == "tokenscope-timer" and float(self) <= other:
            self.alarm.box.clear()
        return float(self) <= other


class Hooked(set):
    """A set that calls something in the middle of the section in which it is added to."""

    hook = staticmethod(int)

    def add(self, item):
        self.hook()
        super().add(item)


@pytest.mark.parametrize("section", ["child", "linked", "wait"])
def test_a_finalizer_never_waits_for_another_tree(section):
    """In the middle of a section of one tree it uses another, which is locked: what it wants is done by the holder."""
    one, two = CancellationToken(), CancellationToken()
    running = CancellationToken()
    inside, go_on, called = threading.Event(), threading.Event(), []
    slow = running.on_cancel(lambda: (inside.set(), go_on.wait(WAIT)))
    two.on_cancel(called.append, 1)

    def finalize():
        assert two.cancel() is False
        assert slow.close() is False  # it runs on another thread, which is not waited for

    one.child().wait(0)
    one.wait(0)
    refs = one._more.wakes if section == "wait" else one._down
    refs.refs = Hooked()
    refs.refs.hook = finalize
    holding = threading.Event()

    def hold_locked():
        holding.set()
        go_on.wait(WAIT)

    def hold():
        two._tree.run(hold_locked)

    with crowd(hold, running.cancel):
        assert holding.wait(WAIT)
        assert inside.wait(WAIT)
        {"child": one.child, "linked": lambda: CancellationToken.linked(one), "wait": lambda: one.wait(0)}[section]()
        assert not two.cancelled
        assert not go_on.is_set()
        go_on.set()
    assert two.cancelled
    assert called == [1]


def test_a_registration_closed_before_it_was_armed_keeps_nothing():
    """A handler that registers in the middle of a section and closes at once leaves no pin behind."""
    token = CancellationToken()
    called = []
    with token._tree.enter():
        kept = token.on_cancel(called.append, "kept")
        assert token.on_cancel(called.append, "closed").close() is True
    token.child()
    assert len(token._more.regs) == 1
    kept.close()
    assert not token._tree.pinned
    token.cancel()
    assert called == []


def test_jobs_submitted_by_handlers_run():
    """A handler that submits work in the middle of submitting finds a thread for it."""
    submitted, ran = [], []

    def submit():
        submitted.append(1)
        workers.submit(lambda: ran.append(1))

    end = time.monotonic() + STORM / 3
    with signals(submit):
        while time.monotonic() < end:
            submit()
    until(lambda: len(ran) == len(submitted))


def test_listeners_and_hooks_may_come_and_go_in_handlers():
    """Subscribing in the middle of subscribing neither hangs nor loses anybody."""
    heard, ends = [], []

    def handler():
        ends.append(events.subscribe(heard.append, events.TokenCancelled))
        ends.append(on_thread_release(int))

    end = time.monotonic() + STORM / 5
    with signals(handler):
        while time.monotonic() < end:
            events.subscribe(heard.append, events.TokenCancelled, events.ScopeEnded)()
            on_thread_release(int)()
            with quiet():
                for unsubscribe in ends:
                    unsubscribe()
                ends.clear()
    for unsubscribe in ends:
        unsubscribe()
    assert not events.wants(events.TokenCancelled)
