"""Many threads, many cancels, exact counts: nothing is lost, nothing is there twice."""

from __future__ import annotations

import queue
import random
import threading
from typing import Self

import pytest
from waits import Waiting

from tokenscope import CancellationToken, Cancelled, sync

THREADS, ROUNDS = 8, 150


class Storm:
    """Cancels one random wait after the other until told to stop."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._tokens: list[CancellationToken] = [CancellationToken()] * THREADS
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._rage)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _rage(self) -> None:
        while not self._over.wait(0.0005):
            self._random.choice(self._tokens).cancel()

    def token(self, slot: int) -> CancellationToken:
        """A new token for the next wait of this thread; the storm may hit it at any moment."""
        self._tokens[slot] = token = CancellationToken()
        return token


def insist(storm, slot, wait, hits):
    """Wait again and again until no cancel comes in between."""
    while True:
        try:
            return wait(token=storm.token(slot))
        except Cancelled:
            hits.append(slot)


@pytest.mark.parametrize("kind", [sync.Lock, sync.RLock, sync.Semaphore, sync.BoundedSemaphore, sync.Condition])
def test_a_lock_is_held_by_one(kind):
    """Never two inside, and at the end it is free: no permit was lost or made."""
    it, inside, hits, count = kind(), [], [], [0]

    def work(slot):
        for _ in range(ROUNDS):
            if kind is sync.Condition:
                insist(storm, slot, it._lock.acquire, hits)
            else:
                insist(storm, slot, it.acquire, hits)
            inside.append(slot)
            assert inside == [slot]
            count[0] += 1
            inside.remove(slot)
            it.release()

    with Storm(1) as storm:
        for waiting in [Waiting(lambda slot=slot: work(slot)) for slot in range(THREADS)]:
            waiting.end()
    assert count[0] == THREADS * ROUNDS
    assert it.acquire(blocking=False)
    it.release()


@pytest.mark.parametrize(
    "make",
    [sync.Queue, lambda: sync.Queue(2), sync.LifoQueue, lambda: sync.PriorityQueue(3), sync.SimpleQueue],
    ids=["Queue", "Queue(2)", "LifoQueue", "PriorityQueue(3)", "SimpleQueue"],
)
def test_each_item_arrives_once(make):
    """Producers and consumers under a storm of cancels: all items arrive, none twice."""
    it, got, hits = make(), queue.SimpleQueue(), []
    half = THREADS // 2

    def produce(slot):
        for number in range(ROUNDS):
            item = slot * ROUNDS + number
            if isinstance(it, sync.SimpleQueue):
                it.put(item)
            else:
                insist(storm, slot, lambda item=item, **token: it.put(item, **token), hits)

    def consume(slot):
        for _ in range(ROUNDS):
            got.put(insist(storm, slot, it.get, hits))

    with Storm(2) as storm:
        producers = [Waiting(lambda slot=slot: produce(slot)) for slot in range(half)]
        consumers = [Waiting(lambda slot=slot: consume(slot)) for slot in range(half, THREADS)]
        for waiting in producers + consumers:
            waiting.end()
    assert sorted(got.get() for _ in range(half * ROUNDS)) == list(range(half * ROUNDS))
    assert it.empty()


def test_no_notification_is_lost():
    """As many waits of a condition succeed as notifications were given, whoever is cancelled meanwhile."""
    it, hits, tickets, served = sync.Condition(), [], [0], []

    def wait(slot):
        for _ in range(ROUNDS // 5):
            while True:
                try:
                    with it:
                        it.wait_for(lambda: tickets[0], token=storm.token(slot))
                        tickets[0] -= 1
                        served.append(slot)
                        break
                except Cancelled:
                    hits.append(slot)

    with Storm(3) as storm:
        waitings = [Waiting(lambda slot=slot: wait(slot)) for slot in range(THREADS)]
        for _ in range(THREADS * (ROUNDS // 5)):
            with it:
                tickets[0] += 1
                it.notify()
        for waiting in waitings:
            waiting.end()
    assert len(served) == THREADS * (ROUNDS // 5)
    assert tickets == [0]
