"""The races of `tokenscope.sync`, tried schedule by schedule."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import count

import pytest
import sync_scenarios
from scheduler import Exhaustive, Inject, Random, Replay, assert_safe

from tokenscope import sync

#: How many times as many schedules as usual; for a night.
EFFORT = int(os.environ.get("TOKENSCOPE_RACES", "1"))


@pytest.mark.parametrize("scenario", sync_scenarios.ALL, ids=lambda s: s.__name__)
def test_a_turn_and_a_cancel(scenario):
    """No schedule loses a lock, a permit, an item or a notification, or gives one to two."""
    assert_safe(scenario, Exhaustive(2, 300 * EFFORT))
    assert_safe(scenario, Random(100 * EFFORT))
    assert_safe(scenario, Random(40 * EFFORT, seed=1_000), lines=True)


def walk(scenario, action):
    """Inject the action at the first actor's first pause, then its second ...; how many there were."""
    for at in count(1):
        injections = []

        def inject(at=at, injections=injections):
            injections[:] = [Inject("actor 0", at, action)]
            return injections

        for strategy in (Replay(), Random(EFFORT, seed=at)):
            assert_safe(scenario, strategy, lines=True, inject=inject)
        if not injections[0].done:
            return at
    return None


class Stage:
    """What the injected action of the present run works on."""

    acquiring = False

    def interrupt(self):
        if self.acquiring:
            raise KeyboardInterrupt


@pytest.mark.parametrize("make", [sync.Lock, sync.RLock, sync.Semaphore])
def test_an_interrupt_while_acquiring(make):
    """A KeyboardInterrupt at any line of `acquire` leaves the lock to the others."""
    stage = Stage()

    def scenario():
        lock = make()

        def use():
            with lock:
                pass

        def acquire():
            stage.acquiring = True
            with suppress(KeyboardInterrupt):
                taken = lock.acquire()
                stage.acquiring = False
                if taken:
                    lock.release()
            stage.acquiring = False

        def check():
            assert lock.acquire(blocking=False)

        return [acquire, use, use], check

    assert walk(scenario, stage.interrupt) > 20


@pytest.mark.parametrize("make", [sync.SimpleQueue, sync.Queue])
def test_a_signal_handler_that_puts(make):
    """A handler that interrupts any line of `get` and puts an item in: the item is there, and nobody waits for it."""
    stage = Stage()

    def scenario():
        stage.items, got = make(), []

        def get():
            got.append(stage.items.get())

        def put():
            stage.items.put("second")

        def check():
            assert len(got) == 1

        return [get, put], check

    assert walk(scenario, lambda: stage.items.put("from the handler")) > 20
