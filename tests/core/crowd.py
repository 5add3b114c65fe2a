"""Threads for tests: started together, joined with a limit, their first error raised in the test."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from actors import WAIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Runner(threading.Thread):
    """A thread that keeps what its function returned or raised, a `BaseException` too."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name="test-runner")
        self.fn = fn
        self.value: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.fn()
        except BaseException as error:
            self.error = error

    def result(self, timeout: float = WAIT) -> Any:
        self.join(timeout)
        assert not self.is_alive(), f"{self.fn} does not end"
        if self.error is not None:
            raise self.error
        return self.value


def on_thread(fn: Callable[[], Any]) -> Any:
    """Call it on a thread of its own; what it returns or raises."""
    return Runner(fn).result()


@contextmanager
def crowd(*fns: Callable[[], Any]) -> Iterator[list[Runner]]:
    """Run the functions, each on a thread, beside the block; join them and raise the first error after it."""
    runners = [Runner(fn) for fn in fns]
    yield runners
    for runner in runners:
        runner.result()
