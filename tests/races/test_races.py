"""The races of the core, tried schedule by schedule."""

from __future__ import annotations

import functools
import os
from itertools import count

import pytest
import scenarios
from scheduler import Exhaustive, Inject, Random, Replay, assert_safe

from tokenscope import CancellationToken

#: How many times as many schedules as usual; for a night.
EFFORT = int(os.environ.get("TOKENSCOPE_RACES", "1"))


@pytest.mark.parametrize("scenario", scenarios.SMALL, ids=lambda s: s.__name__)
def test_two_preemptions(scenario):
    """Every schedule with two preemptions at locks, queues and thread starts, or the first few hundred, is sound."""
    assert assert_safe(scenario, Exhaustive(2, 400 * EFFORT)) > 50


@pytest.mark.parametrize("scenario", scenarios.SMALL, ids=lambda s: s.__name__)
def test_one_preemption_at_any_line(scenario):
    """A switch at any single line of the core, or the first few hundred of them, does no harm; nor do many at random."""
    assert assert_safe(scenario, Exhaustive(1, 250 * EFFORT), lines=True) > 100
    assert_safe(scenario, Random(60 * EFFORT), lines=True)


@pytest.mark.parametrize("scenario", scenarios.LARGE, ids=lambda s: s.__name__)
def test_timers_workers_and_scopes(scenario):
    """Where time passes and threads are started, random switches at locks and at lines do no harm."""
    assert_safe(scenario, Exhaustive(1, 100 * EFFORT))
    assert_safe(scenario, Random(150 * EFFORT))
    assert_safe(scenario, Random(40 * EFFORT, seed=1_000), lines=True)


@pytest.mark.xfail(strict=True, reason="scope.py: spawn() looks at the scope after its checkpoint, not before")
def test_a_spawn_as_the_deadline_passes_is_no_closed_scope():
    """A spawn by the body itself, as the scope's deadline passes, is cut short by it: never ScopeClosed."""
    assert_safe(scenarios.spawn_as_the_deadline_passes, Random(200), lines=True)


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


@pytest.mark.parametrize("what", ["cancel", "work"])
def test_a_signal_handler_at_any_point(what):
    """A handler that cancels the tree, or uses it, at each line of a busy actor beside another: nothing is lost."""
    worlds = []

    def scenario():
        worlds[:] = [Busy()]
        return [worlds[0].work, worlds[0].work], worlds[0].check

    handlers = {"cancel": lambda: worlds[0].root.cancel(), "work": lambda: worlds[0].work()}
    reached = walk(scenario, lambda strategy: strategy, handlers[what], Replay)
    assert reached > 60
    walk(scenario, lambda strategy: strategy, handlers[what], lambda: Random(1 * EFFORT, seed=reached))


def walk(scenario, _make, action, strategy):
    """Inject the action at the first actor's first pause, then its second ...; how many there were."""
    for at in count(1):
        injection = []

        def inject(at=at, injection=injection):
            injection[:] = [Inject("actor 0", at, action)]
            return injection

        assert_safe(scenario, strategy(), lines=True, inject=inject)
        if not injection[0].done:
            return at
    return None


def test_an_interrupt_at_any_point():
    """A KeyboardInterrupt at each line of an actor, with another one beside it: the other one's work is whole."""
    worlds = []

    def interrupt():
        raise KeyboardInterrupt

    def scenario():
        world = Busy()
        worlds[:] = [world]

        def work_until_interrupted():
            try:
                world.root.cancel()
            except KeyboardInterrupt:
                pass

        return [work_until_interrupted, world.work], world.check

    assert walk(scenario, None, interrupt, Replay) > 60
    walk(scenario, None, interrupt, lambda: Random(2 * EFFORT))


def crossed():
    """Two actors, each in its own tree, and two tokens: what is injected into one uses the other's."""
    one, two = CancellationToken(), CancellationToken()
    calls = []
    one.on_cancel(calls.append, 1)
    two.on_cancel(calls.append, 2)

    def check():
        assert one.cancelled
        assert two.cancelled
        assert sorted(calls) == [1, 2]

    return one, two, check


def try_finalizers_that_use_each_others_trees(strategy):
    """In the middle of each actor's operation a finalizer cancels the token that the other one is busy with."""
    worlds = []

    def scenario():
        one, two, check = crossed()
        worlds[:] = [one, two]
        return [one.child, two.child], check

    for at in range(6, 21):
        inject = functools.partial(finalizers, worlds, at)
        assert_safe(scenario, strategy(), lines=True, inject=inject)


def finalizers(worlds, at):
    return [
        Inject("actor 0", at, lambda: worlds[1].cancel()),
        Inject("actor 1", at, lambda: worlds[0].cancel()),
    ]


def test_finalizers_that_use_each_others_trees():
    """Two threads, each inside its own tree, in each a finalizer that wants the other's: nobody waits for ever."""
    try_finalizers_that_use_each_others_trees(lambda: Exhaustive(1, 60 * EFFORT))
