"""What a run has left behind, and a run that cancels at random moments."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import tokenscope

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench._upstream import Upstream

#: Threads that the library parks on purpose.
PARKED = ("tokenscope-idle", "tokenscope-timer", "tokenscope-watch")
GRACE = 3.0  # seconds for what is just ending


class Counted:
    """``with Counted() as counted``: how many more descriptors and threads there are afterwards."""

    def __enter__(self) -> Self:
        self._before = _census()
        return self

    def __exit__(self, *_: object) -> None:
        end = time.monotonic() + GRACE
        while True:
            gc.collect()
            self.fds, self.threads = (max(0, now - before) for now, before in zip(_census(), self._before, strict=True))
            if not (self.fds or self.threads) or time.monotonic() > end:
                return
            time.sleep(0.05)


def _census() -> tuple[int, int]:
    running = [thread for thread in threading.enumerate() if thread.name not in PARKED]
    return sum(1 for _ in Path("/proc/self/fd").iterdir()), len(running)


@dataclass
class Run:
    """What came of the requests."""

    cancelled: int
    finished: int
    innocent: int
    harmed: int  # innocents that got anything but their answer
    odd: int  # neither cancelled nor answered


def random_cancels(server: Upstream, cancels: int, *, workers: int, innocents: int) -> Run:
    """Cancel so many requests, each 0 to 12 ms after its beginning, while others share the session."""
    from tokenscope.integrations.requests import Session

    tally: Counter[str] = Counter()
    counting = threading.Lock()
    over = threading.Event()

    def count(what: str) -> None:
        with counting:
            tally[what] += 1

    def ask(path: str) -> bool:
        return session.get(server.url(path)).text == "hello"

    def one_of_many(chance: random.Random) -> None:
        token = tokenscope.CancellationToken()
        timer = threading.Timer(chance.uniform(0, 0.012), token.cancel)
        timer.start()
        try:
            with tokenscope.use_token(token):
                count("finished" if ask("/slow") else "odd")
        except tokenscope.Cancelled:
            count("cancelled")
        except Exception:
            count("odd")
        finally:
            timer.join()

    def leaver(number: int) -> None:
        chance = random.Random(number)
        for _ in range(cancels // workers):
            one_of_many(chance)

    def innocent() -> None:
        while not over.is_set():
            try:
                count("innocent" if ask("/slow") else "harmed")
            except BaseException:
                count("harmed")

    with Session() as session:
        others = _started(innocents, lambda _: innocent())
        _join(_started(workers, leaver))
        over.set()
        _join(others)
    return Run(*(tally[name] for name in ("cancelled", "finished", "innocent", "harmed", "odd")))


def _started(count: int, target: Callable[[int], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread of the leak run hangs"
