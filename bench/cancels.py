"""Rows about cancelling a blocked HTTP call: until it raises, and until its server has seen the end.

Ours are threads that wait in a call, cancelled by another thread. The peers are asyncio tasks, cancelled within their
own loop; one is also cancelled by another thread, as ours are. All of them take turns, a few trials at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenscope
from bench._peers import Peers
from bench._rounds import percentile
from bench._table import Bar, Contest, Row, Size
from bench._upstream import Upstream, upstream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

SETTLE = 0.003  # seconds from "the server has read the request" until its client surely waits for the answer
BLOCK = 20  # trials of one contender before it is the next one's turn
PATHS = {"head": "/silent", "body": "/half"}  # what is waited for -> what to ask for


class Trial(NamedTuple):
    """What one cancel took, in milliseconds."""

    raised: float
    seen: float  # by the server


@contextlib.contextmanager
def cancel(size: Size, *, phase: str) -> Iterator[Contest]:
    """A call waits for the rest of an answer, and is cancelled."""
    trials = size.of(200, 2)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(upstream())
        missing: dict[str, str] = {}
        contenders = _threads(stack, server, phase, missing) | _tasks(stack, server, phase, missing)

        def play() -> dict[str, float]:
            return _values(_alternating(contenders, trials))

        yield Contest(play, missing)


def _alternating(contenders: dict[str, Callable[[], Trial]], trials: int) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {name: [] for name in contenders}
    order = list(contenders)
    for done in range(0, trials, BLOCK):
        order.append(order.pop(0))
        for name in order:
            found[name] += [contenders[name]() for _ in range(min(BLOCK, trials - done))]
    return found


def _values(found: dict[str, list[Trial]]) -> dict[str, float]:
    values = {}
    for name, trials in found.items():
        for what, times in zip(("", " close"), zip(*trials, strict=True), strict=True):
            values[f"{name}{what}"] = percentile(times, 0.5)
            values[f"{name}{what} p99"] = percentile(times, 0.99)
    return values


# --- threads --------------------------------------------------------------------------------------------------------


def _threads(
    stack: contextlib.ExitStack, server: Upstream, phase: str, missing: dict[str, str]
) -> dict[str, Callable[[], Trial]]:
    contenders = {}
    for name in CLIENTS[phase]:
        try:
            ask = OURS[name](stack, server.url(PATHS[phase]))
        except ImportError as error:  # an optional client
            missing.update(dict.fromkeys(_quantities(name), str(error)))
        else:
            contenders[name] = partial(_cancelled_thread, server, ask)
    return contenders


def _requests(stack: contextlib.ExitStack, url: str) -> Callable[[], object]:
    from tokenscope.integrations.requests import Session

    session = stack.enter_context(Session())
    return lambda: session.get(url)


def _httpx(stack: contextlib.ExitStack, url: str) -> Callable[[], object]:
    from tokenscope.integrations.httpx import Client

    client = stack.enter_context(Client(timeout=None))
    return lambda: client.get(url)


def _openai(stack: contextlib.ExitStack, url: str) -> Callable[[], object]:
    from tokenscope.integrations.openai import cancellable, openai

    plain = stack.enter_context(openai.OpenAI(api_key="none", base_url=url))
    client = stack.enter_context(cancellable(plain))
    return client.models.list


def _anthropic(stack: contextlib.ExitStack, url: str) -> Callable[[], object]:
    from tokenscope.integrations.anthropic import anthropic, cancellable

    plain = stack.enter_context(anthropic.Anthropic(api_key="none", base_url=url))
    client = stack.enter_context(cancellable(plain))
    return client.models.list


OURS = {"requests": _requests, "httpx": _httpx, "openai": _openai, "anthropic": _anthropic}
CLIENTS = {"head": tuple(OURS), "body": ("requests", "httpx")}


def _cancelled_thread(server: Upstream, ask: Callable[[], object]) -> Trial:
    raised: list[float] = []

    def call() -> None:
        try:
            ask()
        except tokenscope.Cancelled:
            raised.append(time.time())
            raise

    with tokenscope.ThreadScope() as scope:
        scope.spawn(call)
        server.expect("hanging")
        time.sleep(SETTLE)
        start = time.time()
        scope.cancel()
    return _trial(start, raised[0], server.expect("gone"))


def _trial(start: float, raised: float, seen: str) -> Trial:
    return Trial((raised - start) * 1e3, (float(seen) - start) * 1e3)


# --- tasks ----------------------------------------------------------------------------------------------------------


def _tasks(
    stack: contextlib.ExitStack, server: Upstream, phase: str, missing: dict[str, str]
) -> dict[str, Callable[[], Trial]]:
    peers = Peers(httpx="AsyncClient", aiohttp="aiohttp")
    for peer, why in peers.missing.items():
        missing.update(dict.fromkeys(_quantities(peer), why))
    runner = stack.enter_context(asyncio.Runner())
    url = server.url(PATHS[phase])
    contenders: dict[str, Callable[[], Trial]] = {}
    if peers.httpx:
        asking = partial(_ask_httpx, _opened(stack, runner, partial(peers.httpx.AsyncClient, timeout=None)), url)
        contenders["AsyncClient"] = _running(runner, server, asking, far=False)
        contenders["AsyncClient from a thread"] = _running(runner, server, asking, far=True)
    if peers.aiohttp:
        asking = partial(_ask_aiohttp, _opened(stack, runner, peers.aiohttp.ClientSession), url)
        contenders["aiohttp"] = _running(runner, server, asking, far=False)
    return contenders


def _opened(stack: contextlib.ExitStack, runner: asyncio.Runner, make: Callable[[], Any]) -> Any:
    """What ``make`` makes within the loop; left when the stack is."""

    async def enter() -> Any:
        return await make().__aenter__()

    async def leave() -> None:
        await client.__aexit__(None, None, None)

    client = runner.run(enter())
    stack.callback(lambda: runner.run(leave()))
    return client


async def _ask_httpx(client: Any, url: str) -> None:
    await client.get(url)


async def _ask_aiohttp(session: Any, url: str) -> None:
    async with session.get(url) as answer:
        await answer.read()


def _running(
    runner: asyncio.Runner, server: Upstream, asking: Callable[[], Awaitable[None]], *, far: bool
) -> Callable[[], Trial]:
    return lambda: runner.run(_cancelled_task(server, asking, far=far))


async def _cancelled_task(server: Upstream, asking: Callable[[], Awaitable[None]], *, far: bool) -> Trial:
    raised: list[float] = []

    async def call() -> None:
        try:
            await asking()
        except asyncio.CancelledError:
            raised.append(time.time())
            raise

    loop = asyncio.get_running_loop()
    task = asyncio.create_task(call())
    await loop.run_in_executor(None, server.expect, "hanging")
    await asyncio.sleep(SETTLE)
    start = time.time()
    if far:
        start = await loop.run_in_executor(None, _cancel_from_here, loop, task)
    else:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    # Within the loop: some of these clients close in its next turn.
    return _trial(start, raised[0], await loop.run_in_executor(None, server.expect, "gone"))


def _cancel_from_here(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> float:
    start = time.time()
    loop.call_soon_threadsafe(task.cancel)
    return start


# --- rows -----------------------------------------------------------------------------------------------------------


def _quantities(contender: str) -> tuple[str, ...]:
    return tuple(f"{contender}{what}{share}" for what in ("", " close") for share in ("", " p99"))


def _rows(phase: str) -> Iterator[Row]:
    contest = partial(cancel, phase=phase)
    infix = "" if phase == "head" else f"-{phase}"
    for client in CLIENTS[phase]:
        where = f"{client} waiting for the {phase}"
        for name, what, close in (
            ("cancel", f"{where}: cancel -> exception", ""),
            ("close", f"{where}: cancel -> the server has seen the end", " close"),
        ):
            beside = tuple(f"{peer}{close}" for peer in ("aiohttp", "AsyncClient from a thread"))
            yield Row(
                f"{name}{infix}-{client}",
                f"{what}, p50",
                "ms",
                Bar("<=", 1.0),
                contest,
                ours=f"{client}{close}",
                peer=f"AsyncClient{close}",
                also=beside,
            )
            yield Row(
                f"{name}{infix}-{client}-p99",
                f"{what}, p99",
                "ms",
                Bar("<", 10, "ms"),
                contest,
                ours=f"{client}{close} p99",
                peer=f"AsyncClient{close} p99",
                also=tuple(f"{peer} p99" for peer in beside),
            )


ROWS = tuple(row for phase in PATHS for row in _rows(phase))
