"""Stories of `tokenscope.sync` for the scheduler: a turn and a cancel (or a time limit) in the same moment."""

from __future__ import annotations

import queue

from tokenscope import CancellationToken, Cancelled, sync, use_token


class Cancellable:
    """A function that runs under a token which another actor cancels; it remembers what came of it."""

    def __init__(self, fn):
        self.token = CancellationToken()
        self.fn = fn
        self.outcome = None

    def __call__(self):
        try:
            with use_token(self.token):
                self.outcome = self.fn()
        except Cancelled as error:
            assert error.reason is self.token.reason  # noqa: PT017 - an actor has no `raises` around it
            self.outcome = "cancelled"

    def cancel(self):
        self.token.cancel()


def lock_passed_to_a_cancelled_waiter():
    """The lock is let go while one of two waiters is cancelled: the other one always gets it."""
    lock = sync.Lock()
    lock.acquire()

    def use():
        with lock:
            assert lock.locked()

    waiter = Cancellable(use)
    return [lock.release, waiter, waiter.cancel, use], lambda: _is_free(lock)


def _is_free(lock):
    assert lock.acquire(blocking=False)


def rlock_in_three_threads():
    """One holder at a time, however deep, with a cancel in between."""
    lock, inside = sync.RLock(), []

    def use():
        with lock, lock:
            inside.append(1)
            assert len(inside) == 1
            inside.clear()

    waiter = Cancellable(use)
    return [use, waiter, waiter.cancel, use], lambda: _is_free(lock)


def permits_and_a_cancel():
    """Two permits come for three waiters, of whom one is cancelled: two are served, or one is left over."""
    permits, got = sync.Semaphore(0), []

    def take():
        permits.acquire()
        got.append(1)

    waiter = Cancellable(take)

    def check():
        assert len(got) + permits._value == 2

    return [lambda: permits.release(2), waiter, waiter.cancel, take], check


def item_for_a_cancelled_getter(make=sync.Queue):
    """An item that was about to go to a cancelled getter goes to the other one."""
    items, got = make(), []

    def get():
        got.append(items.get())

    waiter = Cancellable(get)

    def put():
        items.put(1)
        items.put(2)

    def check():
        left = [items.get_nowait() for _ in range(items.qsize())]
        assert sorted(got + left) == [1, 2]

    return [put, waiter, waiter.cancel, get], check


def item_of_a_simple_queue():
    """The same where `put` takes no lock."""
    return item_for_a_cancelled_getter(sync.SimpleQueue)


def place_for_a_cancelled_putter():
    """A place in a full queue that was about to go to a cancelled putter goes to the other one."""
    items = sync.Queue(1)
    items.put(0)
    waiter = Cancellable(lambda: items.put(1))
    got = []

    def check():
        got.extend(items.get_nowait() for _ in range(items.qsize()))
        assert sorted(got) == ([0, 2] if waiter.outcome == "cancelled" else [0, 1, 2])

    def get():
        got.append(items.get())
        if waiter.outcome != "cancelled":
            got.append(items.get())  # the other one's, or the waiter's before or after its cancel

    return [get, waiter, waiter.cancel, lambda: items.put(2)], check


def shutdown_and_wait():
    """Whoever waits for an item or for the end of the work is told of a shutdown."""
    items, told = sync.Queue(), []

    def get():
        try:
            items.get()
        except sync.ShutDown:
            told.append(1)

    def check():
        assert len(told) == 2

    return [items.shutdown, get, get, items.join], check


def notification_for_a_cancelled_waiter():
    """A notification that reaches a waiter in the moment of its cancel goes on to the other."""
    condition, items, got = sync.Condition(), [], []

    def take():
        with condition:
            condition.wait_for(lambda: items)
            got.append(items.pop())

    waiter = Cancellable(take)

    def give():
        with condition:
            items.append(1)
            condition.notify()
        if not waiter.token.cancelled:
            with condition:
                items.append(2)
                condition.notify()

    def cancel():
        waiter.cancel()
        with condition:
            items.append(3)  # so that there is one for the other in any case
            condition.notify()

    def check():
        assert len(got) == (1 if waiter.outcome == "cancelled" else 2)
        assert _is_free(condition) is None

    return [give, waiter, cancel, take], check


def time_up_and_release():
    """A wait whose time is up in the moment in which its turn comes has the lock or has not, and says which."""
    lock = sync.Lock()
    lock.acquire()
    answers = []

    def try_it():
        answers.append(lock.acquire(timeout=1.0))

    def check():
        assert lock.acquire(blocking=False) != answers[0]

    return [try_it, lock.release], check


def time_up_and_put():
    """The same for an item."""
    items, answers = sync.Queue(), []

    def try_it():
        try:
            answers.append(items.get(timeout=1.0))
        except queue.Empty:
            answers.append(None)

    def check():
        assert items.qsize() == (0 if answers == [1] else 1)

    return [try_it, lambda: items.put(1)], check


#: All of them.
ALL = [
    lock_passed_to_a_cancelled_waiter,
    rlock_in_three_threads,
    permits_and_a_cancel,
    item_for_a_cancelled_getter,
    item_of_a_simple_queue,
    place_for_a_cancelled_putter,
    shutdown_and_wait,
    notification_for_a_cancelled_waiter,
    time_up_and_release,
    time_up_and_put,
]
