"""What the tests of scopes play with: gates that ask no token, ears for events, and programs of their own."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import tokenscope
from tokenscope._core import events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Seconds after which something that should have happened is given up. Only a failure ever waits them out.
WAIT = 10.0


class Gate:
    """A door for one child: it says that it arrived, and stands there, deaf to cancels, until it opens."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.opened = threading.Event()

    def hold(self, value: Any = None) -> Any:
        self.arrived.set()
        assert self.opened.wait(WAIT), "nobody opened the gate"
        return value

    def fail(self, error: BaseException) -> None:
        self.hold()
        raise error

    def await_arrival(self) -> None:
        assert self.arrived.wait(WAIT), "nobody arrived at the gate"

    def open(self) -> None:
        self.opened.set()


class Sleeper:
    """Children that block where a cancel reaches them, and remember how they left."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.kinds: queue.SimpleQueue[str] = queue.SimpleQueue()

    def sleep(self) -> None:
        self.arrived.release()
        try:
            tokenscope.sleep(WAIT)
        except tokenscope.Cancelled as cancelled:
            self.kinds.put(str(cancelled.reason.kind))
            raise

    def await_arrival(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=WAIT), "a child never started"

    def left(self, count: int = 1) -> list[str]:
        """Say for what reasons so many of them left."""
        return [self.kinds.get(timeout=WAIT) for _ in range(count)]


def fail(error: BaseException) -> None:
    raise error


def fail_when_cancelled(started: threading.Event, error: BaseException) -> None:
    """Block, and turn the cancel into a failure of its own: one that began after the cancel."""
    started.set()
    try:
        tokenscope.sleep(WAIT)
    finally:
        raise error


def spawn_from_outside(scope: tokenscope.ThreadScope) -> BaseException | None:
    """Spawn into the scope on a thread that is not of its tree; what that raised."""
    caught: list[BaseException] = []

    def spawn() -> None:
        try:
            scope.spawn(str)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=spawn)
    thread.start()
    thread.join(WAIT)
    return caught[0] if caught else None


def until(seen: Callable[[], object], what: str = "it") -> None:
    """Wait for something that tells nobody when it happens."""
    end = time.monotonic() + WAIT
    pause = threading.Event()
    while not seen():
        assert time.monotonic() < end, f"{what} never happened"
        pause.wait(0.001)


@contextmanager
def hearing(*kinds: type[events.Event]) -> Iterator[queue.Queue[Any]]:
    """Collect events of these kinds."""
    heard: queue.Queue[Any] = queue.Queue()
    unsubscribe = events.subscribe(heard.put, *kinds)
    try:
        yield heard
    finally:
        unsubscribe()


def interrupt_main(noticed: Callable[[], object]) -> None:
    """Press Ctrl-C, also where the main thread is blocked in a lock.

    Once more if nothing happens: CPython notices a signal that falls between its last look and the blocking
    call only when that call returns. Two that are noticed together are one.
    """
    pause = threading.Event()
    for _ in range(20):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        for _ in range(50):
            if noticed():
                return
            pause.wait(0.01)
    raise AssertionError("nobody noticed Ctrl-C")


class Program:
    """A Python program in a process of its own, spoken to by lines and signals."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def expect(self, line: str) -> None:
        assert self.process.stdout is not None
        said = self.process.stdout.readline().strip()
        assert said == line, f"{said!r}; {self.process.communicate(timeout=WAIT)}"

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end; its status, and what it printed meanwhile."""
        out, err = self.process.communicate(timeout=WAIT)
        return self.process.returncode, out, err


def run_program(code: str) -> str:
    """Run a program that must succeed; what it printed."""
    with Program(code) as program:
        status, out, err = program.finish()
    assert status == 0, err
    return out.strip()
