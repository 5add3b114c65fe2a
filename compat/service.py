"""The story of a client that keeps connections to a service of its own protocol, in numbered steps.

A request makes a call that the service does not answer. It is cancelled. Then everything that the library promises
must be seen to happen, at the service too, which is asked past tokenscope whom it still works for.

Run by `run.py` in the environment of a cell: `python -m compat.service TODO.json DONE.json`.
"""

from __future__ import annotations

import functools
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenscope
from compat.query import ROUNDS, TURNS, Request, nothing_left, perform, prompt, was_cancelled
from compat.scenario import Steps
from compat.stage import await_until

if TYPE_CHECKING:
    from types import ModuleType

STEPS = Steps()
step = STEPS.step


class Story:
    """The story while it is told to one client. `peer` is its module in `compat.peers`, `server` what it makes."""

    def __init__(self, peer: ModuleType) -> None:
        self._peer = peer
        self.server: Any = peer.Server()
        self._before = frozenset(threading.enumerate())
        self._seen: list[tuple[float, float]] = []

    @step("connect", "the client connects with the built wheel, and gets an answer")
    def connect(self) -> None:
        where = Path(tokenscope.__file__)
        assert where.is_relative_to(sys.prefix), f"this is not the wheel: {where}"
        with self.server.client() as client:
            assert self._peer.ask(client, "hello") == "hello"

    @step("cut", "every way to block in the client is cut, and the client's error is the cause")
    def cut(self) -> float:
        with self.server.client() as client:
            self._seen = [self._cut(client, name) for name in self._peer.CALLS for _ in range(ROUNDS)]
        return prompt(statistics.median(woken for woken, _let_go in self._seen))

    @step("server", "the service does not work for it any more")
    def let_go(self) -> float:
        assert self._seen, "nothing was cut"
        return prompt(statistics.median(let_go for _woken, let_go in self._seen))

    @step("deadline", "a deadline cuts it as well")
    def deadline(self) -> float:
        call = next(iter(self._peer.CALLS.values()))
        with self.server.client() as client:
            began = time.monotonic()
            try:
                with tokenscope.fail_after(0.1):
                    call(client)
            except tokenscope.DeadlineExceeded:
                return prompt(time.monotonic() - began - 0.1)
        raise AssertionError("the call ended before its deadline")

    @step("neighbour", "a call of another request on the same client, running meanwhile, is answered in full")
    def neighbour(self) -> None:
        with self.server.client() as client:
            call = next(iter(self._peer.CALLS.values()))
            leaver = Request(lambda: call(client))
            await_until(lambda: self.server.working() == 1, "the service never began")
            other = Request(lambda: self._peer.wait_for_gate(client))
            await_until(lambda: self.server.working() == 2, "the service never began with the other")
            leaver.cancel()
            was_cancelled(leaver, self._peer.Error)
            self.server.open_gate()
            other.answered("the other request")

    @step("turns", "cancels at any moment never touch the next request on the client")
    def turns(self) -> None:
        chance = random.Random(7)
        cut = 0
        with self.server.client() as client:
            for number in range(TURNS):
                request = Request(functools.partial(self._peer.brief, client))
                time.sleep(chance.random() * 0.015)  # a call takes 3 ms, and more if it has to connect first
                request.cancel()
                if request.error is not None:
                    was_cancelled(request, self._peer.Error)
                    cut += 1
                assert self._peer.ask(client, f"turn {number}") == f"turn {number}"
        assert 0 < cut < TURNS, f"{cut} of {TURNS} were cut: this says nothing"

    @step("nothing left", "no connection is left at the service, and no thread")
    def nothing_left(self) -> None:
        nothing_left(self.server.connections, self._before)

    def _cut(self, client: Any, name: str) -> tuple[float, float]:
        """Cut one call; seconds until it was woken, and until the service was seen to have let go of it."""
        request = Request(lambda: self._peer.CALLS[name](client))
        await_until(lambda: self.server.working() == 1, f"the service never began with {name}")
        at = request.cancel()
        let_go = await_until(lambda: self.server.working() == 0, f"the service goes on with {name}")
        was_cancelled(request, self._peer.Error, name)
        return request.ended - at, let_go - at


if __name__ == "__main__":
    perform(STEPS, Story, *sys.argv[1:])
