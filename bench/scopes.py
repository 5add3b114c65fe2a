"""Rows about scopes and their threads: spawning, failing, waking, deadlines."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import tokenscope
from bench._peers import Peers
from bench._rounds import in_turn, per_loop
from bench._table import Bar, Contest, Row, Size
from tokenscope import CancellationToken, ThreadScope, process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 30.0


def nothing() -> None:
    """The least that a task can do."""


@contextlib.contextmanager
def spawn(size: Size) -> Iterator[Contest]:
    """Start and join a thousand tasks that do nothing, milliseconds."""
    count = size.of(1_000, 50)
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        barrier = threading.Barrier(32)
        concurrent.futures.wait([pool.submit(barrier.wait, PATIENCE) for _ in range(32)])  # now it is warm

        def ours() -> float:
            start = time.perf_counter()
            with ThreadScope() as scope:
                for _ in range(count):
                    scope.spawn(nothing)
            return _milliseconds_since(start)

        def executor() -> float:
            start = time.perf_counter()
            for future in [pool.submit(nothing) for _ in range(count)]:
                future.result()
            return _milliseconds_since(start)

        ours()
        yield Contest(in_turn(ours=ours, executor=executor))


@contextlib.contextmanager
def failing(size: Size) -> Iterator[Contest]:
    """Ten children asleep and one that fails: from its error to the scope's, milliseconds."""
    trials = size.of(30, 2)

    def once() -> float:
        asleep = Countdown(10)
        failed_at: list[float] = []

        def fail() -> None:
            asleep.wait()
            time.sleep(0.002)  # the last of them is on its way into the sleep
            failed_at.append(time.perf_counter())
            raise LookupError

        try:
            with ThreadScope() as scope:
                for _ in range(10):
                    scope.spawn(_sleep_until_cancelled, asleep)
                scope.spawn(fail)
        except ExceptionGroup:
            return _milliseconds_since(failed_at[0])
        raise AssertionError("the scope did not raise")

    yield Contest(lambda: {"ours": statistics.median(once() for _ in range(trials))})


@contextlib.contextmanager
def sleepers(size: Size) -> Iterator[Contest]:
    """A thousand children asleep, from the cancel until all are joined, milliseconds."""
    count = size.of(1_000, 50)

    def ours() -> float:
        asleep = Countdown(count)
        with ThreadScope() as scope:
            for _ in range(count):
                scope.spawn(_sleep_until_cancelled, asleep)
            asleep.wait_and_settle()
            start = time.perf_counter()
            scope.cancel()
        return _milliseconds_since(start)

    def bare_threads() -> float:
        asleep, wake = Countdown(count), threading.Event()

        def sleep() -> None:
            asleep.one_less()
            wake.wait(PATIENCE)

        threads = [threading.Thread(target=sleep, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        asleep.wait_and_settle()
        start = time.perf_counter()
        wake.set()
        for thread in threads:
            thread.join()
        return _milliseconds_since(start)

    yield Contest(in_turn(ours=ours, bare_threads=bare_threads))


@contextlib.contextmanager
def slow_callback(size: Size) -> Iterator[Contest]:
    """One token's callback is slow; how much later another token's deadline is, milliseconds."""
    peers = Peers(cancelscope="cancelscope")
    slow = 0.2 if size.quick else 2.0

    def ours() -> float:
        first, second = CancellationToken(timeout=0.05), CancellationToken(timeout=0.1)
        return _delay_of_second(first.on_cancel, second.on_cancel, slow)

    def cancelscope() -> float:
        with (
            peers.cancelscope.CancelScope(timeout=0.05) as first,
            peers.cancelscope.CancelScope(timeout=0.1) as second,
        ):
            return _delay_of_second(
                lambda fn: first.on_cancel(lambda _: fn()), lambda fn: second.on_cancel(lambda _: fn()), slow
            )

    play = in_turn(ours=ours, cancelscope=cancelscope if peers.cancelscope else None)
    yield Contest(play, peers.missing, rounds=3)


def _delay_of_second(
    on_first: Callable[[Callable[[], object]], object],
    on_second: Callable[[Callable[[], object]], object],
    slow: float,
) -> float:
    due = time.monotonic() + 0.1
    done, rang = threading.Event(), threading.Event()
    at: list[float] = []

    def slowly() -> None:
        time.sleep(slow)
        done.set()

    def stamp() -> None:
        at.append(time.monotonic())
        rang.set()

    on_first(slowly)
    on_second(stamp)
    assert rang.wait(PATIENCE), "the second deadline never rang"
    assert done.wait(PATIENCE), "the slow callback never ran"
    return (at[0] - due) * 1e3


class Countdown:
    """Lets one thread wait until so many others have come by."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()
        self._none_left = threading.Event()

    def one_less(self) -> None:
        """Come by."""
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._none_left.set()

    def wait(self) -> None:
        """Wait for all."""
        assert self._none_left.wait(PATIENCE), f"{self._left} threads did not start"

    def wait_and_settle(self) -> None:
        """Wait for all, and until the last of them has gone from here into its sleep."""
        self.wait()
        time.sleep(0.1)


def _sleep_until_cancelled(asleep: Countdown) -> Any:
    asleep.one_less()
    tokenscope.sleep(PATIENCE)


def _milliseconds_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


@contextlib.contextmanager
def offloaded(size: Size) -> Iterator[Contest]:
    """A call of a function that does nothing, in another process that is warm, milliseconds."""
    count = size.of(200, 5)
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(nothing).result()
        process.offload(nothing)

        def ours(turns: int) -> None:
            for _ in range(turns):
                process.offload(nothing)

        def executor(turns: int) -> None:
            for _ in range(turns):
                pool.submit(nothing).result()

        milliseconds = 1e3
        yield Contest(
            in_turn(ours=per_loop(ours, count, milliseconds), executor=per_loop(executor, count, milliseconds))
        )


ROWS = (
    Row("spawn", "spawn and join 1,000 trivial tasks", "ms", Bar("<=", 0.8), spawn, peer="executor"),
    Row("failing-child", "one fails, 10 sleep: the scope raises, p50", "ms", Bar("<=", 2, "ms"), failing),
    Row("sleepers", "1,000 asleep: cancel to all joined", "ms", Bar("<=", 1.3), sleepers, peer="bare threads"),
    Row(
        "slow-callback",
        "a 2 s callback delays another deadline",
        "ms",
        Bar("<", 50, "ms"),
        slow_callback,
        also=("cancelscope",),
    ),
    Row("offload", "a warm call in another process", "ms", Bar("<", 5, "ms"), offloaded, also=("executor",)),
)
