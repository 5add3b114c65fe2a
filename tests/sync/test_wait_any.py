"""`wait_any`: the first of several things, level-triggered, and nothing is taken."""

from __future__ import annotations

import signal
import socket
import threading
from pathlib import Path

import pytest
from waits import WAIT, Waiting, until

from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    ThreadScope,
    fail_after,
    sync,
    use_token,
    wait_any,
)
from tokenscope._core.current import uninterruptible
from tokenscope.sync._line import Desk


class Thing:
    """Something to wait for, and how to make it ready."""

    def __init__(self, thing, make_ready, close=lambda: None):
        self.thing, self.make_ready, self.close = thing, make_ready, close


def token():
    it = CancellationToken()
    return Thing(it, it.cancel)


def task():
    scope, gate = ThreadScope(), threading.Event()
    scope.__enter__()

    def close():
        gate.set()
        scope.__exit__(None, None, None)

    return Thing(scope.spawn(gate.wait), gate.set, close)


def event():
    it = sync.Event()
    return Thing(it, it.set)


def a_queue(kind=sync.Queue):
    it = kind()
    return Thing(it, lambda: it.put("an item"))


def bounded_queue():
    return a_queue(lambda: sync.Queue(1))


def simple_queue():
    return a_queue(sync.SimpleQueue)


def shut_down_queue():
    it = sync.Queue()
    return Thing(it, it.shutdown)


def a_socket():
    ours, theirs = socket.socketpair()

    def close():
        ours.close()
        theirs.close()

    return Thing(ours, lambda: theirs.send(b"!"), close)


def hung_up_socket():
    thing = a_socket()
    ours, theirs = socket.socketpair()

    def close():
        thing.close()
        ours.close()
        theirs.close()

    return Thing(ours, theirs.close, close)


@pytest.fixture(
    params=[token, task, event, a_queue, bounded_queue, simple_queue, shut_down_queue, a_socket, hung_up_socket]
)
def thing(request):
    made = request.param()
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["alone", "beside a socket"])
def others(request):
    """What never becomes ready: without a socket the wait is of another kind than with one."""
    pair = socket.socketpair()
    yield [sync.Event(), sync.Queue(), CancellationToken(), *([pair[0]] if request.param else [])]
    for end in pair:
        end.close()


def watchers(others):
    return others[0]._line.watchers


def test_it_wakes_when_one_is_ready(thing, others):
    """Whatever becomes ready ends the wait, and is what is returned."""
    waiting = Waiting(lambda: wait_any(*others, thing.thing))
    until(lambda: watchers(others))
    assert waiting.waits()
    thing.make_ready()
    assert waiting.end() == [thing.thing]
    assert not watchers(others)


def test_what_is_ready_stays_ready(thing, others):
    """It is a level, not an edge: nothing is taken by looking."""
    thing.make_ready()
    for _ in range(2):
        assert wait_any(thing.thing, *others, timeout=WAIT) == [thing.thing]
    if isinstance(thing.thing, sync.Queue | sync.SimpleQueue) and not thing.thing.empty():
        assert thing.thing.get_nowait() == "an item"


def test_a_cancel_ends_the_wait(thing, others):
    """The caller's own token raises, and leaves nothing behind in what was waited for."""
    waiting = Waiting(lambda: wait_any(*others, thing.thing))
    until(lambda: watchers(others))
    waiting.token.cancel("enough")
    with pytest.raises(Cancelled, match="enough"):
        waiting.end()
    assert not watchers(others)


def test_an_explicit_token_counts_too(others):
    """`token=` is added to the current one."""
    explicit = CancellationToken()
    waiting = Waiting(lambda: wait_any(*others, token=explicit))
    until(lambda: watchers(others))
    explicit.cancel()
    with pytest.raises(Cancelled):
        waiting.end()


def test_it_is_a_checkpoint_even_if_something_is_ready(others):
    """A cancelled thread gets no answer."""
    cancelled, ready = CancellationToken(), sync.Event()
    cancelled.cancel()
    ready.set()
    with use_token(cancelled), pytest.raises(Cancelled):
        wait_any(ready, *others)
    with use_token(cancelled), uninterruptible():
        assert wait_any(ready, *others) == [ready]


def test_the_time_is_up(others):
    """An empty list says that nothing was ready in time; 0 seconds only look."""
    for timeout in (0, 0.01):
        assert wait_any(*others, timeout=timeout) == []


def test_deadlines_end_it(others):
    """The caller's deadline raises; that of a token which is waited for makes it ready."""
    with pytest.raises(DeadlineExceeded), fail_after(0.01):
        wait_any(*others)
    short = CancellationToken(timeout=0.01)
    assert wait_any(short, *others) == [short]


def test_all_ready_ones_in_the_order_given(others):
    """The answer has everything that is ready."""
    first, second = sync.Event(), sync.Queue()
    first.set()
    second.put(1)
    assert wait_any(second, *others, first) == [second, first]


def test_a_promised_item_is_not_announced(others, monkeypatch):
    """An item that belongs to a thread which waits in `get` is nobody else's."""
    woken, go_on, sleep = threading.Event(), threading.Event(), Desk.sleep

    def sleep_and_dawdle(*arguments):
        sleep(*arguments)
        woken.set()
        go_on.wait(WAIT)

    monkeypatch.setattr(Desk, "sleep", sleep_and_dawdle)
    items = sync.Queue()
    getting = Waiting(items.get)
    until(lambda: items._getters.turns)
    items.put("an item")
    assert woken.wait(WAIT)
    assert wait_any(items, *others, timeout=0) == []
    go_on.set()
    assert getting.end() == "an item"


def test_bytes_that_tls_has_read_already_count():
    """A socket whose `pending()` says so is readable, although the wire is silent."""

    class Buffered(socket.socket):
        def pending(self):
            return 3

    with Buffered() as it:
        it.bind(("127.0.0.1", 0))
        it.listen()
        assert wait_any(it, timeout=WAIT) == [it]


def test_bad_arguments():
    """Nothing to wait for, something that cannot be waited for, a closed socket, a bad time."""
    with pytest.raises(TypeError, match="something to wait for"):
        wait_any()
    with pytest.raises(TypeError, match=r"not <.*Event"):
        wait_any(threading.Event())
    closed = socket.socket()
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        wait_any(closed)
    with pytest.raises(ValueError, match="timeout"):
        wait_any(sync.Event(), timeout=-1)


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_it_leaves_no_descriptor_behind(others):
    """A thousand waits cost no descriptor."""
    before = descriptors()
    for _ in range(1000):
        wait_any(*others, timeout=0)
    assert descriptors() == before


def test_a_signal_handler_may_make_it_ready(others):
    """An event that is set by a handler of the waiting thread ends its wait."""
    event = sync.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: event.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        assert wait_any(*others, event, timeout=WAIT) == [event]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_each_item_arrives_once_through_wait_any(others):
    """Threads that wait for two queues at once, and take without waiting, miss nothing."""
    queues, got, total = [sync.Queue(), sync.SimpleQueue()], sync.SimpleQueue(), 400
    over = sync.Event()

    def consume():
        while over not in (ready := wait_any(*queues, over, *others)):
            for each in ready:
                try:
                    got.put(each.get_nowait())
                except sync.Empty:
                    continue  # another thread was faster

    consumers = [Waiting(consume) for _ in range(4)]
    for number in range(total):
        queues[number % 2].put(number)
    assert sorted(got.get(timeout=WAIT) for _ in range(total)) == list(range(total))
    over.set()
    for consumer in consumers:
        consumer.end()
