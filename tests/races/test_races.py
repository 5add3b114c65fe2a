"""The races of the core, tried schedule by schedule."""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from itertools import count

import pytest
import scenarios
from scheduler import Exhaustive, Inject, Random, Replay, assert_safe

from tokenscope import CancellationToken, ThreadScope

#: How many times as many schedules as usual; for a night.
EFFORT = int(os.environ.get("TOKENSCOPE_RACES", "1"))


@pytest.mark.parametrize("scenario", scenarios.SMALL, ids=lambda s: s.__name__)
def test_two_preemptions(scenario):
    """Every schedule with two preemptions at locks, queues and thread starts, or the first few hundred, is sound."""
    assert assert_safe(scenario, Exhaustive(2, 300 * EFFORT)) > 50


@pytest.mark.parametrize("scenario", scenarios.SMALL, ids=lambda s: s.__name__)
def test_one_preemption_at_any_line(scenario):
    """A switch at any single line of the core, or the first few hundred, does no harm; nor do many at random."""
    assert assert_safe(scenario, Exhaustive(1, 150 * EFFORT), lines=True) > 100
    assert_safe(scenario, Random(40 * EFFORT), lines=True)


@pytest.mark.parametrize("scenario", scenarios.LARGE, ids=lambda s: s.__name__)
def test_timers_workers_and_scopes(scenario):
    """Where time passes and threads are started, random switches at locks and at lines do no harm."""
    assert_safe(scenario, Exhaustive(1, 60 * EFFORT))
    assert_safe(scenario, Random(100 * EFFORT))
    assert_safe(scenario, Random(25 * EFFORT, seed=1_000), lines=True)


# --- injected in the middle ----------------------------------------------------------------------------------------


class Busy:
    """An actor at work on a tree, another beside it, and room for what is injected."""

    def __init__(self):
        self.root = CancellationToken()
        self.linked = CancellationToken.linked(self.root.child(), CancellationToken())
        self.made, self.calls, self.keys = [], [], count()
        self.expected = set()

    def register(self):
        key = next(self.keys)
        registration = self.linked.on_cancel(self.calls.append, key)
        self.expected.add(key)
        return key, registration

    def work(self):
        self.made.append(self.linked.child())
        key, registration = self.register()
        if registration.close():
            self.expected.discard(key)
        self.register()
        self.made.append(CancellationToken.linked(self.root, self.linked))

    def check(self):
        self.root.child()
        self.root.cancel()
        assert all(token.cancelled for token in self.made)
        assert len(self.calls) == len(set(self.calls))
        assert set(self.calls) == self.expected
        assert not self.root._tree.pinned
        assert not self.root._tree.inbox
        assert not self.linked._tree.inbox


class Stage:
    """Where the world of the present run stands, for what is injected into it."""

    world: Busy
    scope: ThreadScope

    def set(self):
        self.world = Busy()
        return self.world

    def cancel(self):
        self.world.root.cancel()

    def work(self):
        self.world.work()

    def interrupt(self):
        raise KeyboardInterrupt

    def expire(self):
        if self.scope._token is not None:
            self.scope._token._expire()


def walk(scenario, action, always=None):
    """Inject the action at the first actor's first pause, then its second ...; how many there were."""
    for at in count(1):
        strategies = [Replay()] if at % 4 else [Replay(), Random(EFFORT, seed=at)]
        strategies += [always()] if always else []
        injections = []

        def inject(at=at, injections=injections):
            injections[:] = [Inject("actor 0", at, action)]
            return injections

        for strategy in strategies:
            assert_safe(scenario, strategy, lines=True, inject=inject)
        if not injections[0].done:
            return at
    return None


@pytest.mark.parametrize("what", ["cancel", "work"])
def test_a_signal_handler_at_any_point(what):
    """A handler that cancels the tree, or uses it, at each line of a busy actor beside another: nothing is lost."""
    stage = Stage()

    def scenario():
        world = stage.set()
        return [world.work, world.work], world.check

    assert walk(scenario, getattr(stage, what)) > 60


def test_an_interrupt_at_any_point():
    """A KeyboardInterrupt at each line of a cancel, with another actor beside it: the other one's work is whole."""
    stage = Stage()

    def scenario():
        world = stage.set()

        def cancel_until_interrupted():
            with suppress(KeyboardInterrupt):
                world.root.cancel()

        return [cancel_until_interrupted, world.work], world.check

    assert walk(scenario, stage.interrupt) > 60


class Crossed:
    """Two actors, each in its own tree; what is injected into one uses the other's."""

    def set(self):
        self.one, self.two = CancellationToken(), CancellationToken()
        self.calls = []
        self.one.on_cancel(self.calls.append, 1)
        self.two.on_cancel(self.calls.append, 2)
        return [self.one.child, self.two.child], self.check

    def inject(self, at):
        return [Inject("actor 0", at, self.cancel_two), Inject("actor 1", at, self.cancel_one)]

    def cancel_one(self):
        self.one.cancel()

    def cancel_two(self):
        self.two.cancel()

    def check(self):
        assert self.one.cancelled
        assert self.two.cancelled
        assert sorted(self.calls) == [1, 2]


def try_finalizers_that_use_each_others_trees(strategy):
    """In the middle of each actor's operation a finalizer cancels the token that the other one is busy with."""
    crossed = Crossed()
    for at in range(6, 21):
        assert_safe(crossed.set, strategy(), lines=True, inject=functools.partial(crossed.inject, at))


def test_finalizers_that_use_each_others_trees():
    """Two threads, each inside its own tree, in each a finalizer that wants the other's: nobody waits for ever."""
    try_finalizers_that_use_each_others_trees(lambda: Exhaustive(1, 60 * EFFORT))


def test_a_spawn_as_the_deadline_passes_is_no_closed_scope():
    """A body's own spawn, with the scope's deadline passing at any line of it, is cut short: never ScopeClosed."""
    stage = Stage()

    def scenario():
        stage.scope = ThreadScope(timeout=1.0, grace=100.0)

        def run():
            with suppress(TimeoutError):
                with stage.scope:
                    stage.scope.spawn(int)

        return [run], lambda: None

    assert walk(scenario, stage.expire) > 20
