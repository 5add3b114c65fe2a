"""Rows about HTTP clients: what it costs that their calls can be cancelled, and what cancels leave behind."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import tokenscope
from bench._rounds import woven
from bench._table import Bar, Contest, Row, Size
from bench._upstream import upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def keep_alive(size: Size, *, client: str) -> Iterator[Contest]:
    """One request after the other on one kept-alive connection, requests a second."""
    block, blocks = size.of(25, 5), size.of(16, 2)
    plain_kind, our_kind = _CLIENTS[client]()
    with upstream() as server, plain_kind() as plain, our_kind() as ours, tokenscope.ThreadScope():
        url = server.url("/quick")

        def asking(client: Any) -> Callable[[], int]:
            def ask() -> int:
                for _ in range(block):
                    client.get(url)
                return block

            return ask

        contenders = {"ours": asking(ours), "plain": asking(plain)}
        for ask in contenders.values():
            ask()
        yield Contest(woven(blocks, **contenders))


def _requests() -> tuple[Any, Any]:
    import requests

    from tokenscope.integrations.requests import Session

    return requests.Session, Session


def _httpx() -> tuple[Any, Any]:
    import httpx

    from tokenscope.integrations.httpx import Client

    return httpx.Client, Client


_CLIENTS = {"requests": _requests, "httpx": _httpx}


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


ROWS = tuple(
    Row(
        f"keep-alive-{client}",
        f"keep-alive requests through our {client}",
        "req/s",
        Bar(">=", 0.95),
        partial(keep_alive, client=client),
        peer="plain",
    )
    for client in _CLIENTS
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
