"""Many threads at once on the same trees, with the interpreter switching between them every 10 µs."""

from __future__ import annotations

import gc
import sys
import threading
from contextlib import contextmanager
from random import Random

import pytest
from actors import WAIT, until
from crowd import crowd

from tokenscope import CancellationToken, Cancelled

ROUNDS = 2_000


@pytest.fixture(autouse=True)
def _rapid_switches():
    """Switch threads as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@contextmanager
def rounds(count, *works):
    """In each round all the functions run at once on the round's own world, which the loop body checks then."""
    gate = threading.Barrier(len(works) + 1)
    box = []

    def work(fn):
        for number in range(count):
            gate.wait(WAIT)
            fn(box[0], Random(number))
            gate.wait(WAIT)

    def play(make):
        for _ in range(count):
            box[:] = [make()]
            gate.wait(WAIT)
            gate.wait(WAIT)
            yield box[0]

    with crowd(*[lambda fn=fn: work(fn) for fn in works]):
        try:
            yield play
        except BaseException:
            gate.abort()
            raise


class World:
    """A tree of one round, and what the threads say about it."""

    def __init__(self):
        self.root = CancellationToken()
        self.other = CancellationToken()
        self.child = self.root.child()
        self.linked = CancellationToken.linked(self.child, self.other)
        self.won = []
        self.made = []
        self.calls = []
        self.registered = []
        self.closed = []

    def cancel(self, random):
        self.won.append(self.root.cancel())

    def cancel_linked(self, random):
        self.linked.cancel()

    def make(self, random):
        for _ in range(3):
            parent = random.choice((self.root, self.child, self.linked))
            token = parent.child() if random.random() < 0.7 else CancellationToken.linked(parent, self.other)
            self.made.append(token)

    def register(self, random):
        for _ in range(4):
            key = object()
            token = random.choice((self.root, self.child, self.linked, self.child.child()))
            registration = token.on_cancel(self.calls.append, key)
            self.registered.append((key, registration))

    def register_and_close(self, random):
        for _ in range(4):
            key = object()
            token = random.choice((self.root, self.child, self.linked))
            if token.on_cancel(self.calls.append, key).close():
                self.closed.append(key)
            else:
                self.registered.append((key, None))

    def close_others(self, random):
        for key, registration in list(self.registered):
            if registration is not None and registration.close():
                self.closed.append(key)

    def wait(self, random):
        assert self.linked.wait(WAIT)


def test_everything_at_once():
    """Cancel, register, close, create from eight threads: one winner, all cancelled, each open callback called once."""
    works = [
        World.cancel,
        World.cancel,
        World.cancel_linked,
        World.make,
        World.register,
        World.register_and_close,
        World.close_others,
        World.wait,
    ]
    with rounds(ROUNDS, *works) as play:
        for world in play(World):
            assert sorted(world.won) == [False, True]
            assert all(token.cancelled for token in world.made)
            assert world.linked.reason is not None
            closed = set(world.closed)
            assert len(closed) == len(world.closed)
            expected = {key for key, _ in world.registered} - closed
            assert len(world.calls) == len(set(world.calls))
            assert set(world.calls) == expected
            assert not world.root._tree.pinned
            assert not world.other._tree.pinned


def test_one_winner_of_many():
    """Of six threads that cancel at once exactly one is told that it won, and its reason is the one."""

    class Race:
        def __init__(self):
            self.root = CancellationToken()
            self.leaf = self.root.child().child()
            self.won = []

    def cancel(race, number):
        if race.root.cancel(str(number)):
            race.won.append(str(number))

    with rounds(ROUNDS, *[lambda race, _random, n=n: cancel(race, n) for n in range(6)]) as play:
        for race in play(Race):
            assert race.won == [race.root.reason.message]
            assert race.leaf.reason is race.root.reason


def test_checkers_and_waiters_see_every_cancel():
    """Threads that check and threads that sleep all leave at the cancel, round after round."""

    def check(world, _random):
        with pytest.raises(Cancelled):
            while True:
                world.linked.check()

    def sleep(world, _random):
        with pytest.raises(Cancelled):
            world.child.sleep(WAIT)

    with rounds(ROUNDS // 4, check, sleep, sleep, World.cancel) as play:
        for world in play(World):
            assert world.won == [True]


def test_deadlines_among_cancels():
    """Four threads make, cancel and drop tokens with deadlines: every one that was kept is cancelled in the end."""
    kept = []

    def churn(seed):
        random = Random(seed)
        root = CancellationToken(timeout=60)
        for _ in range(1_500):
            token = root.child(timeout=random.choice((0.0005, 0.002, 0.01, 30)))
            action = random.random()
            if action < 0.2:
                token.cancel()
            elif action < 0.4 and token.remaining() < 1:
                kept.append(token)
        root.cancel()

    with crowd(*[lambda n=n: churn(n) for n in range(4)]):
        pass
    assert kept
    until(lambda: all(token.cancelled for token in kept))


def test_shared_parents_do_not_grow_under_churn():
    """Four threads link, register, cancel and drop under one long-lived parent; nothing of it stays."""
    shutdown = CancellationToken()

    def churn():
        for number in range(1_000):
            token = CancellationToken.linked(shutdown, CancellationToken())
            with token.child().on_cancel(int):
                if number % 2:
                    token.cancel()

    with crowd(*[churn for _ in range(4)]):
        pass
    gc.collect()
    shutdown.child()
    assert len(shutdown._down.refs) <= 1
    assert not shutdown._tree.pinned
    assert not shutdown._tree.inbox
    assert not shutdown._tree.unfinished
