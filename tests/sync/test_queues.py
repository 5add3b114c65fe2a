"""Queues: what `queue` promises, on every version of Python, and what a cancel leaves behind."""

from __future__ import annotations

import queue

import pytest
from waits import Waiting, until

from tokenscope import CancellationToken, Cancelled, sync, use_token


@pytest.fixture
def cancelled():
    token = CancellationToken()
    token.cancel()
    return token


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        (sync.Queue, [2, 3, 1]),
        (sync.LifoQueue, [1, 3, 2]),
        (sync.PriorityQueue, [1, 2, 3]),
        (sync.SimpleQueue, [2, 3, 1]),
    ],
)
def test_the_order_of_items(kind, order):
    """First, last or smallest, as the name says."""
    it = kind()
    for item in (2, 3, 1):
        it.put(item)
    assert it.qsize() == 3
    assert [it.get() for _ in range(3)] == order
    assert it.empty()


def test_it_is_a_queue():
    """Libraries that ask for a `queue.Queue` get one, and its errors are those of `queue`."""
    assert issubclass(sync.LifoQueue, queue.LifoQueue)
    assert issubclass(sync.PriorityQueue, queue.PriorityQueue)
    it = sync.Queue(1)
    assert isinstance(it, queue.Queue)
    it.put_nowait(1)
    assert it.full()
    with pytest.raises(queue.Full):
        it.put_nowait(2)
    assert it.get_nowait() == 1
    with pytest.raises(queue.Empty):
        it.get_nowait()
    with pytest.raises(ValueError, match="non-negative"):
        it.get(timeout=-1)


def test_a_cancelled_get_takes_no_item(cancelled):
    """The item stays for somebody who can use it."""
    it = sync.Queue()
    it.put("an item")
    with use_token(cancelled), pytest.raises(Cancelled):
        it.get()
    assert it.get() == "an item"


def test_what_cannot_wait_is_no_checkpoint(cancelled):
    """A cancelled thread may give back what it has, and look without waiting."""
    it = sync.Queue()
    with use_token(cancelled):
        it.put("an item")
        assert it.get_nowait() == "an item"
        it.task_done()


def test_join_waits_for_the_work_and_ends_with_its_token():
    """`join` returns when each item has been dealt with, or when its thread is cancelled."""
    it = sync.Queue()
    it.put("an item")
    first, second = Waiting(it.join), Waiting(it.join)
    until(lambda: len(it._joiners.turns) == 2)
    first.token.cancel()
    with pytest.raises(Cancelled):
        first.end()
    assert second.waits()
    it.get()
    it.task_done()
    second.end()
    with pytest.raises(ValueError, match="too many"):
        it.task_done()


def test_shutdown_lets_the_rest_be_taken():
    """After `shutdown` nothing goes in, what is there comes out, and then everybody is told."""
    it = sync.Queue(1)
    it.put(1)
    putting = Waiting(lambda: it.put(2))
    until(lambda: it._putters.turns)
    it.shutdown()
    with pytest.raises(sync.ShutDown):
        putting.end()
    with pytest.raises(sync.ShutDown):
        it.put(3)
    assert it.get() == 1
    with pytest.raises(sync.ShutDown):
        it.get()


def test_an_immediate_shutdown_wakes_everybody():
    """Those who wait for an item or for the end are told at once, and what was in it is dropped."""
    it = sync.Queue()
    getting = [Waiting(it.get) for _ in range(3)]
    until(lambda: len(it._getters.turns) == 3)
    it.shutdown(immediate=True)
    for waiting in getting:
        with pytest.raises(sync.ShutDown):
            waiting.end()
    other = sync.Queue()
    other.put(1)
    joining = Waiting(other.join)
    until(lambda: other._joiners.turns)
    other.shutdown(immediate=True)
    joining.end()
    assert other.empty()


def test_shut_down_is_the_standard_one_where_there_is_one():
    """`except queue.ShutDown` works from Python 3.13 on."""
    assert getattr(queue, "ShutDown", sync.ShutDown) is sync.ShutDown


def test_a_queue_of_ones_own():
    """It is made special in the way `queue.Queue` is: by `_init`, `_qsize`, `_put` and `_get`."""

    class Distinct(sync.Queue):
        def _init(self, maxsize):
            self.queue = {}

        def _put(self, item):
            self.queue[item] = None

        def _get(self):
            return self.queue.popitem()[0]

    it = Distinct()
    it.put("a")
    it.put("a")
    assert it.qsize() == 1
    assert it.get() == "a"
