"""What the tests of waits play with: threads that are known to be blocked, and ways to be it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenscope import CancellationToken, bind, sync

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds after which something that should have happened is given up. Only a failure ever waits them out.
WAIT = 10.0


def until(seen: Callable[[], object], what: str = "it") -> None:
    """Wait for something that tells nobody when it happens."""
    end = time.monotonic() + WAIT
    pause = threading.Event()
    while not seen():
        assert time.monotonic() < end, f"{what} never happened"
        pause.wait(0.001)


class Waiting:
    """A call on a thread of its own, under a token of its own."""

    def __init__(self, call: Callable[[], Any], token: CancellationToken | None = None) -> None:
        self.token = token or CancellationToken(name="the waiter's")
        self.answer: Any = None
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=bind(self._run, self.token), daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.answer = self._call()
        except BaseException as error:
            self.error = error

    def end(self) -> Any:
        """Wait for its end; what it returned. Raises what it raised."""
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "it still waits"
        if self.error is not None:
            raise self.error
        return self.answer

    def waits(self) -> bool:
        return self._thread.is_alive()


@dataclass
class Way:
    """One way to be blocked, how to count those who are, and how to let one of them go."""

    wait: Callable[..., Any]  # takes `timeout` and `token`
    blocked: Callable[[], int]
    release: Callable[[], Any]
    timed_out: object  # the answer, or the error, when the time is up

    def start(self, current: CancellationToken | None = None, *, listening_to: Any = None) -> Waiting:
        """Start a thread that waits, and return once it is in line."""
        before = self.blocked()
        waiting = Waiting(lambda: self.wait(token=listening_to), current)
        until(lambda: self.blocked() > before, "the wait")
        return waiting


def in_line(line: Any) -> Callable[[], int]:
    return lambda: len(line.turns)


def event() -> Way:
    it = sync.Event()
    return Way(it.wait, in_line(it._line), it.set, False)


def lock(kind: Any = sync.Lock) -> Way:  # not for RLock, whose owner alone lets it go
    it = kind()
    it.acquire()
    return Way(it.acquire, in_line(it._line), it.release, False)


def semaphore() -> Way:
    it = sync.Semaphore(0)
    return Way(it.acquire, in_line(it._line), it.release, False)


def bounded_semaphore() -> Way:
    return lock(sync.BoundedSemaphore)


def condition() -> Way:
    it = sync.Condition()

    def wait(**kwargs: Any) -> bool:
        with it:
            return it.wait(**kwargs)

    def release() -> None:
        with it:
            it.notify()

    return Way(wait, in_line(it._line), release, False)


def get(kind: Any = sync.Queue) -> Way:
    it = kind()
    line = it._line if kind is sync.SimpleQueue else it._getters
    return Way(it.get, in_line(line), lambda: it.put("an item"), sync.Empty)


def get_lifo() -> Way:
    return get(sync.LifoQueue)


def get_priority() -> Way:
    return get(sync.PriorityQueue)


def get_simple() -> Way:
    return get(sync.SimpleQueue)


def put() -> Way:
    it = sync.Queue(1)
    it.put("an item")
    return Way(lambda **kwargs: it.put("another", **kwargs), in_line(it._putters), it.get, sync.Full)


WAYS = [
    event,
    lock,
    semaphore,
    bounded_semaphore,
    condition,
    get,
    get_lifo,
    get_priority,
    get_simple,
    put,
]
