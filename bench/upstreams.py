"""Rows about `requests`: how soon a cancel reaches a blocked call, and what the adapter costs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import requests

import tokenscope
from bench._peers import Peers
from bench._rounds import percentile, woven
from bench._table import Bar, Contest, Row, Size
from bench._upstream import Upstream, upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETTLE = 0.003  # seconds from "the server has read the request" until its client surely waits for the answer


@contextlib.contextmanager
def cancel(size: Size) -> Iterator[Contest]:
    """A call waits for headers that never come: from the cancel to the exception in it, milliseconds."""
    peers = Peers(httpx="httpx")
    trials = size.of(60, 3)
    with upstream() as server:

        def play() -> dict[str, float]:
            found = {"ours": _cancelled_threads(server, trials)}
            if peers.httpx:
                found["httpx"] = asyncio.run(_cancelled_tasks(peers.httpx, server, trials, far=False))
                found["httpx from a thread"] = asyncio.run(_cancelled_tasks(peers.httpx, server, trials, far=True))
            values = {}
            for name, latencies in found.items():
                values[name] = percentile(latencies, 0.5)
                values[f"{name} p99"] = percentile(latencies, 0.99)
            return values

        yield Contest(play, peers.missing)


def _cancelled_threads(server: Upstream, trials: int) -> list[float]:
    from tokenscope.integrations.requests import Session

    with Session() as session:
        return [_cancelled_thread(session, server) for _ in range(trials)]


def _cancelled_thread(session: requests.Session, server: Upstream) -> float:
    ended: list[float] = []

    def call() -> None:
        try:
            session.get(server.url("/silent"))
        except tokenscope.Cancelled:
            ended.append(time.perf_counter())
            raise

    with tokenscope.ThreadScope() as scope:
        scope.spawn(call)
        server.news.read(1)
        time.sleep(SETTLE)
        start = time.perf_counter()
        scope.cancel()
    return (ended[0] - start) * 1e3


async def _cancelled_tasks(httpx: Any, server: Upstream, trials: int, *, far: bool) -> list[float]:
    async with httpx.AsyncClient(timeout=None) as client:
        return [await _cancelled_task(client, server, far=far) for _ in range(trials)]


async def _cancelled_task(client: Any, server: Upstream, *, far: bool) -> float:
    ended: list[float] = []

    async def call() -> None:
        try:
            await client.get(server.url("/silent"))
        except asyncio.CancelledError:
            ended.append(time.perf_counter())
            raise

    loop = asyncio.get_running_loop()
    task = asyncio.create_task(call())
    await loop.run_in_executor(None, server.news.read, 1)
    await asyncio.sleep(SETTLE)
    start = time.perf_counter()
    if far:
        start = await loop.run_in_executor(None, _cancel_from_here, loop, task)
    else:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return (ended[0] - start) * 1e3


def _cancel_from_here(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> float:
    start = time.perf_counter()
    loop.call_soon_threadsafe(task.cancel)
    return start


@contextlib.contextmanager
def keep_alive(size: Size) -> Iterator[Contest]:
    """One request after the other on one kept-alive connection, requests a second."""
    from tokenscope.integrations.requests import Session

    block, blocks = size.of(25, 5), size.of(16, 2)
    with upstream() as server, requests.Session() as plain, Session() as ours, tokenscope.ThreadScope():

        def asking(session: requests.Session) -> Callable[[], int]:
            def ask() -> int:
                for _ in range(block):
                    session.get(server.url("/quick"))
                return block

            return ask

        contenders = {"ours": asking(ours), "plain": asking(plain)}
        for ask in contenders.values():
            ask()
        yield Contest(woven(blocks, **contenders))


@contextlib.contextmanager
def leaks(size: Size) -> Iterator[Contest]:
    """Random cancels in eight threads, with three innocents on the same session; what is left or harmed."""
    yield Contest(lambda: _leak_run(24 if size.quick else size.cancels), rounds=1)


def _leak_run(cancels: int) -> dict[str, float]:
    from bench._leaks import Counted, random_cancels

    with upstream() as server:
        with Counted() as counted:
            run = random_cancels(server, cancels, workers=8, innocents=3)
        return {
            "ours": counted.fds + counted.threads + run.harmed + run.odd,
            "fds": counted.fds,
            "threads": counted.threads,
            "harmed": run.harmed,
            "third outcomes": run.odd,
            "cancelled": run.cancelled,
            "finished": run.finished,
            "innocent": run.innocent,
        }


ROWS = (
    Row(
        "cancel-p50",
        "cancel -> exception in a blocked requests call, p50",
        "ms",
        Bar("<=", 1.0),
        cancel,
        peer="httpx",
        also=("httpx from a thread",),
    ),
    Row(
        "cancel-p99",
        "the same, p99",
        "ms",
        Bar("<", 10, "ms"),
        cancel,
        ours="ours p99",
        also=("httpx p99",),
    ),
    Row(
        "keep-alive",
        "keep-alive requests through the adapter",
        "req/s",
        Bar(">=", 0.95),
        keep_alive,
        peer="plain",
    ),
)
LEAKS = (
    Row(
        "leaks-cancel",
        "random cancels: left or harmed",
        "things",
        Bar("<=", 0, "things"),
        leaks,
        also=("fds", "threads", "harmed", "third outcomes", "cancelled", "finished", "innocent"),
    ),
)
