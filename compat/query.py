"""The story of a database driver, in numbered steps, told to a real server.

A request runs a query that never ends. It is cancelled. Then everything that the library promises must be seen
to happen, at the server too: a second connection, without tokenscope, looks at what the first one's is doing.

Run by `run.py` in the environment of a cell: `python -m compat.query TODO.json DONE.json`.
"""

from __future__ import annotations

import functools
import importlib
import json
import random
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenscope
from compat.app import versions
from compat.scenario import PROMPT, Step, Steps
from compat.stage import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

#: How often each call is cut.
ROUNDS = 5

#: How many requests take turns on one connection.
TURNS = 200

STEPS = Steps()
step = STEPS.step


class Request(threading.Thread):
    """Work under a token of its own, on a thread, and how it ended."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.token = tokenscope.CancellationToken()
        self.error: BaseException | None = None
        self.ended = 0.0
        self._work = work
        self.start()

    def run(self) -> None:
        try:
            with tokenscope.use_token(self.token):
                self._work()
        except BaseException as error:
            self.error = error
        self.ended = time.monotonic()

    def answered(self, what: str) -> None:
        """Wait for its end, which has to be a good one; `what` it was, for the complaint."""
        self.join(PATIENCE)
        assert not self.is_alive(), f"{what} is still blocked after {PATIENCE:g} s"
        assert self.error is None, f"{what} got {self.error!r}"

    def cancel(self) -> float:
        """Cancel it, wait for its end, and return when it was cancelled."""
        at = time.monotonic()
        self.token.cancel("the reader left")
        self.join(PATIENCE)
        assert not self.is_alive(), f"still blocked {PATIENCE:g} s after the cancel"
        return at


class Story:
    """The story while it is told to one driver. `peer` is its module in `compat.peers`, `server` what it makes."""

    def __init__(self, peer: ModuleType) -> None:
        self._peer = peer
        self.server: Any = peer.Server()
        self._seen: list[tuple[float, float]] = []

    @step("connect", "the driver connects with the built wheel, and gets an answer")
    def connect(self) -> None:
        where = Path(tokenscope.__file__)
        assert where.is_relative_to(sys.prefix), f"this is not the wheel: {where}"
        with self.server.connection() as connection:
            assert self.server.scalar(connection, "SELECT 1") == 1

    @step("cut", "every way to block in the driver is cut, and the driver's error is the cause")
    def cut(self) -> float:
        self._seen = [self._cut(name) for name in self._peer.CALLS for _ in range(ROUNDS)]
        return prompt(statistics.median(woken for woken, _idle in self._seen))

    @step("server", "the server has stopped working on it")
    def idle(self) -> float:
        assert self._seen, "nothing was cut"
        return prompt(statistics.median(idle for _woken, idle in self._seen))

    @step("rolled back", "what was written before is not there, and nobody can commit it any more")
    def rolled_back(self) -> None:
        with self.server.connection() as connection:

            def work() -> None:
                self.server.write(connection, "half")
                self._peer.CALLS["execute"](connection)

            request = Request(work)
            self.server.await_running(connection)
            request.cancel()
            self._was_cancelled(request)
            assert not self.server.closed(connection), "a plain statement cost the connection"
            self.server.write(connection, "next")
            connection.commit()
        assert self.server.notes() == ["next"], self.server.notes()

    @step("deadline", "a deadline cuts it as well")
    def deadline(self) -> float:
        with self.server.connection() as connection:
            began = time.monotonic()
            try:
                with tokenscope.fail_after(0.1):
                    self._peer.CALLS["execute"](connection)
            except tokenscope.DeadlineExceeded:
                return prompt(time.monotonic() - began - 0.1)
        raise AssertionError("the query ended before its deadline")

    @step("commit", "a cancel that comes between COMMIT and its answer changes nothing")
    def commit(self) -> None:
        self.server.clear()
        with self.server.connection() as connection, self.server.slow_commits() as let_go:
            self.server.write(connection, "slow")
            request = Request(connection.commit)
            self.server.await_running(connection)
            request.token.cancel("too late")
            time.sleep(0.05)  # so that a cancel could arrive, if one were sent
            let_go()
            request.answered("the commit")
        assert self.server.notes() == ["slow"], self.server.notes()

    @step("neighbour", "cancels at any moment never touch the next request on the connection")
    def neighbour(self) -> None:
        chance = random.Random(7)
        cut = 0
        connection = self.server.connect()
        for number in range(TURNS):
            request = Request(functools.partial(self.server.brief, connection))
            time.sleep(chance.random() * 0.006)
            request.cancel()
            if request.error is not None:
                self._was_cancelled(request)
                cut += 1
            if self.server.closed(connection):
                connection = self.server.connect()
            else:
                connection.rollback()
            innocent = Request(functools.partial(self.server.brief, connection))
            innocent.answered(f"the innocent request of turn {number}")
            connection.rollback()
        connection.close()
        assert 0 < cut < TURNS, f"{cut} of {TURNS} were cut: this says nothing"

    @step("deaf server", "a server that does not obey loses its client within a second or so")
    def deaf(self) -> float:
        with self.server.connection() as connection:
            request = Request(lambda: self._peer.CALLS["execute"](connection))
            self.server.await_running(connection)
            with self.server.frozen(connection):
                at = request.cancel()
            self._was_cancelled(request)
            assert self.server.closed(connection), "the connection is still open"
        seconds = request.ended - at
        assert seconds < 2 * PROMPT, f"it took {seconds:.1f} s"
        return seconds

    @step("nothing left", "no connection is left at the server, and no thread")
    def nothing_left(self) -> None:
        nothing_left(self.server.connections)

    def _cut(self, name: str) -> tuple[float, float]:
        """Cut one call; seconds until it was woken, and until the server was seen to be idle."""
        with self.server.connection() as connection:
            request = Request(lambda: self._peer.CALLS[name](connection))
            who = self.server.await_running(connection)
            at = request.cancel()
            idle = self.server.await_idle(who)
            self._was_cancelled(request, name)
            return request.ended - at, idle - at

    def _was_cancelled(self, request: Request, name: str = "") -> None:
        was_cancelled(request, self._peer.Error, name)


def was_cancelled(request: Request, causes: Any, name: str = "") -> None:
    """It ended because of its token, and whatever the driver said of that is told as the cause."""
    error = request.error
    assert isinstance(error, tokenscope.Cancelled), f"{name} ended with {error!r}"
    assert error.reason is request.token.reason
    cause = error.__cause__ or error.__context__
    assert isinstance(cause, (causes, tokenscope.Cancelled)) or cause is None, f"{name}: {cause!r}"


def nothing_left(connections: Callable[[], list[str]], before: frozenset[threading.Thread] = frozenset()) -> None:
    """Wait until there are no connections at the server, and no threads but the library's parked ones."""
    end = time.monotonic() + PATIENCE
    while left := connections() + [
        thread.name
        for thread in set(threading.enumerate()) - before - {threading.current_thread()}
        if not thread.name.startswith("tokenscope-")
    ]:
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.02)


def prompt(seconds: float) -> float:
    """Return the seconds, if they are few enough to have been "at once"."""
    assert seconds < PROMPT, f"it took {seconds:.1f} s"
    return seconds


def tell(steps: Steps, story: object, limits: Mapping[str, str]) -> list[dict[str, Any]]:
    """Tell the whole story; a record for each step. `limits`: why some steps cannot be told to this peer."""
    records = []
    for told in steps:
        record: dict[str, Any] = {"step": told.name}
        if told.name in limits:
            record |= {"status": "not applicable", "reason": limits[told.name]}
        else:
            record |= _try(told, story)
        records.append(record)
    return records


def _try(told: Step, story: object) -> dict[str, Any]:
    try:
        seconds = told.tell(story)
    except Exception as error:
        traceback.print_exc()
        return {"status": "fail", "reason": " ".join(f"{error}".split()) or repr(error)}
    return {"status": "pass"} if seconds is None else {"status": "pass", "seconds": round(seconds, 6)}


def perform(steps: Steps, story: type, todo: str, done: str) -> None:
    """Read what to do from one file, tell the story to that driver, write what was seen into another file."""
    task = json.loads(Path(todo).read_text())
    told = story(importlib.import_module(f"compat.peers.{task['driver'][0]}"))
    try:
        records = tell(steps, told, task["limits"])
    finally:
        told.server.close()
    Path(done).write_text(json.dumps({"steps": records, "ran": versions()}))


if __name__ == "__main__":
    perform(STEPS, Story, *sys.argv[1:])
