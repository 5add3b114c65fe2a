"""Rows about WSGI servers: how soon a hang-up is seen, what the middleware costs, what hang-ups leave."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import statistics
import threading
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from bench._hosts import HOSTS, Client, Host, host
from bench._rounds import percentile, woven
from bench._table import Bar, Contest, Row, Size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETTLE = 0.003  # seconds from "the view begins to wait" until it surely waits


@contextlib.contextmanager
def hang_up(size: Size, *, kind: str, burners: int) -> Iterator[Contest]:
    """A client closes its connection while the view waits: until the token is cancelled, milliseconds."""
    _insist_on(kind)
    trials = size.of(15, 2) if burners else size.of(40, 3)
    with host(kind, burners=burners) as server:

        def play() -> dict[str, float]:
            found = [_one_hang_up(server) for _ in range(trials)]
            cancelled, awake = zip(*found, strict=True)
            return {
                "ours": statistics.median(cancelled),
                "p99": percentile(cancelled, 0.99),
                "view awake": statistics.median(awake),
            }

        yield Contest(play)


def _one_hang_up(server: Host) -> tuple[float, float]:
    client = server.connect()
    client.send("/hang")
    assert server.hear()["what"] == "hanging"
    time.sleep(SETTLE)
    start = time.time()  # the wall clock: the only one that two processes share by contract
    client.socket.close()
    seen = server.hear()
    if seen["at"] is None:
        raise RuntimeError("the hang-up was not seen")
    return (seen["at"] - start) * 1e3, (seen["awake"] - start) * 1e3


@contextlib.contextmanager
def hello(size: Size, *, kind: str, path: str) -> Iterator[Contest]:
    """Four kept-alive connections keep a server busy, requests a second."""
    _insist_on(kind)
    if path == "/flask":
        _insist_on("flask")
    block, blocks = size.of(40, 5), size.of(20, 2)
    with host(kind) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(4)]
        play = woven(
            blocks,
            ours=partial(_ask_all, clients, path, block),
            plain=partial(_ask_all, clients, f"/plain{path}", block),
        )
        play()  # the first request starts the watcher
        yield Contest(play)


def _ask_all(clients: list[Client], path: str, turns: int) -> int:
    for _ in range(turns):
        for client in clients:
            client.send(path)
        for client in clients:
            client.receive()
    return turns * len(clients)


@contextlib.contextmanager
def leaks(size: Size) -> Iterator[Contest]:
    """Requests of which every third client leaves at a random moment; what is left or harmed."""
    _insist_on("gthread")
    count = 24 if size.quick else size.cancels
    with host("gthread") as server:
        yield Contest(lambda: _leak_run(server, count), rounds=1)


def _leak_run(server: Host, count: int) -> dict[str, float]:
    _storm(server, 16)  # all threads of the server have been there
    before = _census(server)
    tally = _storm(server, count)
    left = _difference(server, before)
    return {"ours": sum(left.values()) + tally["harmed"], **left, **{name: tally[name] for name in _TALLIED}}


_TALLIED = ("harmed", "left", "served")


def _storm(server: Host, count: int) -> Counter[str]:
    tally: Counter[str] = Counter()
    counting = threading.Lock()

    def visitor(number: int) -> None:
        chance = random.Random(number)
        for turn in range(max(1, count // 8)):
            what = _visit(server, chance, leaves=turn % 3 == 0)
            with counting:
                tally[what] += 1

    threads = [threading.Thread(target=visitor, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a client of the leak run hangs"
    return tally


def _visit(server: Host, chance: random.Random, *, leaves: bool) -> str:
    with server.connect() as client:
        client.send(f"/work?{chance.uniform(0, 15):.3f}")
        if leaves:
            time.sleep(chance.uniform(0, 0.015))
            return "left"
        try:
            return "served" if client.receive().startswith(b"Hello") else "harmed"
        except (OSError, RuntimeError):
            return "harmed"


def _census(server: Host) -> dict[str, int]:
    with server.connect() as client:
        client.send("/census")
        return dict(json.loads(client.receive()))


def _difference(server: Host, before: dict[str, int]) -> dict[str, int]:
    """What is still there after three seconds at the latest."""
    end = time.monotonic() + 3
    while True:
        now = _census(server)
        left = {what: max(0, now[what] - before[what]) for what in before}
        if not any(left.values()) or time.monotonic() > end:
            return left
        time.sleep(0.1)


def _insist_on(kind: str) -> None:
    library = HOSTS.get(kind, kind)
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(f"{library} is not installed (pip install {library})", name=library)


def _rows(kind: str) -> Iterator[Row]:
    def contest(function: Callable[..., Any], **settings: Any) -> Any:
        return partial(function, kind=kind, **settings)

    beside = ("p99", "view awake")
    what = f"{kind}: hang-up -> token cancelled, p50"
    yield Row(f"hangup-{kind}", what, "ms", Bar("<", 1, "ms"), contest(hang_up, burners=0), also=beside)
    what = f"{kind}, 2 threads computing beside it: until the view runs again, p50"
    yield Row(f"hangup-busy-{kind}", what, "ms", Bar("<", 50, "ms"), contest(hang_up, burners=2), ours="view awake")
    if kind != "werkzeug":  # its server closes the connection after each answer
        what = f"{kind}: the middleware on hello-world, bare WSGI"
        yield Row(f"hello-{kind}", what, "req/s", Bar(">=", 0.95), contest(hello, path="/hello"), peer="plain")
    if kind == "gthread":
        what = f"{kind}: the middleware on hello-world in Flask"
        yield Row("hello-flask", what, "req/s", Bar(">=", 0.95), contest(hello, path="/flask"), peer="plain")


ROWS = tuple(row for kind in HOSTS for row in _rows(kind))
LEAKS = (
    Row(
        "leaks-hangup",
        "random hang-ups on gthread: left or harmed",
        "things",
        Bar("<=", 0, "things"),
        leaks,
        also=("fds", "threads", *_TALLIED),
    ),
)
