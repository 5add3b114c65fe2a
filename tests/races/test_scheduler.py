"""The scheduler finds bugs that are planted on purpose, and none in the core as it is."""

from __future__ import annotations

import itertools

import pytest
import scenarios
from scheduler import Deadlock, Exhaustive, Random, Replay, assert_safe, explore
from test_races import try_finalizers_that_use_each_others_trees

from tokenscope import CancellationToken
from tokenscope._core import _primitives, token, tree, workers


def arm_without_looking(monkeypatch):
    """A registration that does not look whether the token was cancelled meanwhile."""

    def arm_locked(self, token, registration):
        registration.armed = True
        self.extras_locked(token).regs[registration.seq] = registration

    monkeypatch.setattr(tree.Tree, "arm_locked", arm_locked)


def attach_without_looking(monkeypatch):
    """A waiter that looks first and registers then."""

    def attach_locked(self, token, wakeup):
        extras = self.extras_locked(token)
        extras.wakes = extras.wakes or tree.Flock()
        extras.wakes.add_locked(wakeup)

    monkeypatch.setattr(tree.Tree, "attach_locked", attach_locked)
    monkeypatch.setattr(
        token, "attach", lambda t, wakeup: t._cut is None and (t._tree.run(t._tree.attach_locked, t, wakeup), True)[1]
    )


def mark_without_a_lock(monkeypatch):
    """A cancel that marks the descendants outside of the tree's lock."""

    def mark(self):
        while top := self.work[-1:]:
            top[0]._tree.mark_locked(self)
        return True

    monkeypatch.setattr(tree.Cut, "mark", mark)


def begin_without_looking(monkeypatch):
    """A cancel that does not look whether another one was first."""

    def begin_locked(self, token, cut):
        self.unfinished.append(cut)
        token._cut = cut

    monkeypatch.setattr(tree.Tree, "begin_locked", begin_locked)


def close_without_waiting(monkeypatch):
    """A close that returns while the callback runs."""
    monkeypatch.setattr(tree.Registration, "_runs_elsewhere", lambda self: False)


def link_without_looking(monkeypatch):
    """A child that is hung up under a parent which was cancelled meanwhile."""

    def link_locked(self, parent, token):
        parent._down = parent._down or tree.Flock()
        parent._down.add_locked(token)

    monkeypatch.setattr(tree.Tree, "link_locked", link_locked)


def expire_without_helping(monkeypatch):
    """A sleeper that sees the time run out, finds somebody else cancelling, and does not wait for the mark."""

    def expire_if_due(t):
        for owner in token._ancestry(t):
            if owner._more is not None and owner._more.own_deadline == t._deadline:
                owner._expire()

    monkeypatch.setattr(token, "expire_if_due", expire_if_due)


def retire_by_an_old_look(monkeypatch):
    """A worker that looks into the queue first, and counts itself out then."""

    def _retire_locked(self):
        if not self.jobs.empty():
            return False
        self._leave_locked()
        return True

    monkeypatch.setattr(workers.Workers, "_retire_locked", _retire_locked)


def sync_pins_by_an_old_look(monkeypatch):
    """Pins of linked trees that are passed on by a look taken outside of the lock, and only where it saw a change."""

    def pass_pins_on(pile):
        for tree_ in pile:
            for root in tree._alive(tree_.links):
                for parent in root._parents():
                    above = parent._tree
                    before = bool(above.pinned)
                    above.run(above.sync_pin_locked, root, [], set())
                    if before != bool(above.pinned):
                        pile.append(above)

    monkeypatch.setattr(tree, "pass_pins_on", pass_pins_on)


PLANTED = [
    (arm_without_looking, scenarios.cancel_and_register, Exhaustive(2), False),
    (attach_without_looking, scenarios.cancel_and_wait, Exhaustive(2), False),
    (mark_without_a_lock, scenarios.cancel_and_child, Random(3_000), True),
    (begin_without_looking, scenarios.two_cancels, Exhaustive(2), False),
    (close_without_waiting, scenarios.cancel_and_close, Exhaustive(2), False),
    (link_without_looking, scenarios.cancel_and_child, Exhaustive(2), False),
    (expire_without_helping, scenarios.sleep_past_a_deadline, Random(3_000), False),
    (retire_by_an_old_look, scenarios.submit_and_retire, Exhaustive(1), True),
    (sync_pins_by_an_old_look, scenarios.register_and_close_below_a_link, Random(3_000), True),
]


@pytest.mark.parametrize(
    ("plant", "scenario", "strategy", "lines"), PLANTED, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_planted_bug_is_found(plant, scenario, strategy, lines, monkeypatch):
    """With the bug some schedule fails, and fails again when repeated; with the core as it is none does."""
    with monkeypatch.context() as patched:
        plant(patched)
        found = explore(scenario, strategy, lines=lines)
        assert found.error is not None
        again = explore(scenario, Replay(found.choices), lines=lines)
        assert type(again.error) is type(found.error)
    assert_safe(scenario, Replay(found.choices), lines=lines)
    assert_safe(scenario, Random(100), lines=lines)


def test_a_circle_of_finalizers_is_found(monkeypatch):
    """Without the look at the lock that it is about to wait for, each of two finalizers waits for the other's tree."""
    monkeypatch.setattr(tree.Tree, "busy_here", _primitives.Room.busy_here)
    with pytest.raises(Deadlock):
        try_finalizers_that_use_each_others_trees(lambda: Exhaustive(1, 60))


def test_exhaustive_tries_every_schedule_once():
    """Of two actors with two steps each it makes all six orders, none of them twice."""
    orders = []

    def scenario():
        lock = _primitives.Lock()
        order = []

        def step(name):
            with lock:
                order.append(name)

        def actor(name):
            step(name + "1")
            step(name + "2")

        return [lambda: actor("a"), lambda: actor("b")], lambda: orders.append(tuple(order))

    strategy = Exhaustive(4)
    runs = assert_safe(scenario, strategy)
    assert runs > 6
    legal = {
        p
        for p in itertools.permutations(["a1", "a2", "b1", "b2"])
        if p.index("a1") < p.index("a2") and p.index("b1") < p.index("b2")
    }
    assert set(orders) == legal


def test_a_deadlock_is_reported():
    """Two locks taken in two orders: the schedule that deadlocks is found."""

    def scenario():
        one, two = _primitives.Lock(), _primitives.Lock()

        def take(first, second):
            with first:
                with second:
                    pass

        return [lambda: take(one, two), lambda: take(two, one)], lambda: None

    outcome = explore(scenario, Exhaustive(1))
    assert isinstance(outcome.error, Deadlock)
    assert "take" in str(outcome.error)


def test_virtual_time_passes_in_no_time():
    """An hour's deadline passes when nobody can run, and not before."""
    seen = []

    def scenario():
        root = CancellationToken(timeout=3600)

        def wait():
            seen.append(root.wait(10))
            seen.append(root.wait())

        return [wait], lambda: None

    assert_safe(scenario, Replay())
    assert seen == [False, True]


def test_random_schedules_can_be_repeated():
    """The same seed makes the same choices."""
    first, second = Random(1, seed=7), Random(1, seed=7)
    for strategy in (first, second):
        explore(scenarios.cancel_and_link, strategy)
        strategy.last = strategy.choices
    strategies = []
    for _ in range(2):
        strategy = Random(1, seed=7)
        strategy.begin()
        strategies.append([strategy.choose(3, preempts=False) for _ in range(50)])
    assert strategies[0] == strategies[1]


def test_what_is_still_locked_after_a_run_is_noticed():
    """A check that needs a lock which an actor left held fails, instead of waiting for it."""

    def scenario():
        root = CancellationToken()
        return [root._tree.lock.acquire], root._tree.lock.acquire

    outcome = explore(scenario, Replay())
    assert isinstance(outcome.error, Deadlock)
