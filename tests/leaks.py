"""What a process holds, before and after a test: threads, file descriptors, and what is current.

Sockets need no list of their own: each is a file descriptor, and its target says `socket:[...]`.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

# Threads that the library keeps on purpose and parks, all daemons: cached workers, the timer, the watcher.
PARKED = ("tokenscope-idle", "tokenscope-timer", "tokenscope-watch")

# The watcher thread owns one of each for the life of the process, and none before it was started.
WATCHER_THREAD = "tokenscope-watch"
WATCHER_FDS = ("anon_inode:[eventpoll]", "anon_inode:[eventfd]")

# Seconds for what is just ending: a thread that has done its work, a peer's socket in its last line.
GRACE = 2.0

# A thread as `threading` knows it, or the bare identifier of one that it does not know.
Runner: TypeAlias = "threading.Thread | int"

_FDS = Path("/proc/self/fd")


@dataclass(frozen=True)
class Descriptor:
    """An open file descriptor, told apart from a later one of the same number by what it refers to."""

    number: int
    device: int
    inode: int
    target: str


@dataclass(frozen=True, eq=False)
class Current:
    """The current token and its owner; a test that leaves one behind puts it under all tests that follow."""

    token: object
    owner: object

    @classmethod
    def take(cls) -> Current:
        """Look at this thread now, without being the first to load the library."""
        ambient = sys.modules.get("tokenscope._core.ambient")
        return cls(ambient.token_var.get(), ambient.owner_var.get()) if ambient else cls(None, None)

    def since(self, before: Current) -> tuple[str, ...]:
        """Return what is current now and was not before."""
        found = []
        if self.token is not before.token:
            found.append(f"the current token {self.token!r}")
        if self.owner is not before.owner:
            found.append(f"the current task or scope {self.owner!r}")
        return tuple(found)


@dataclass(frozen=True)
class Footprint:
    """The threads and descriptors of this process, and what is current in this thread, at one moment."""

    threads: frozenset[Runner]
    descriptors: frozenset[Descriptor]
    current: Current

    @classmethod
    def take(cls) -> Footprint:
        """Look at the process now."""
        return cls(frozenset(running()), frozenset(open_descriptors()), Current.take())


@dataclass(frozen=True)
class Leak:
    """What is there now and was not before."""

    threads: tuple[Runner, ...]
    descriptors: tuple[Descriptor, ...]
    current: tuple[str, ...]

    def __bool__(self) -> bool:
        """Tell whether anything leaked."""
        return bool(self.threads or self.descriptors or self.current)


def running() -> set[Runner]:
    """Return all threads that run Python code, except the parked ones.

    The interpreter is asked rather than `threading`, which does not know threads started through `_thread`.
    The stand-ins that `threading` makes up for those may come at any time: the identifier speaks for them.
    """
    known: dict[int | None, Runner] = {
        thread.ident: thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)
    }
    runners = {known.get(ident, ident) for ident in sys._current_frames()}
    return {runner for runner in runners if not name_of(runner).startswith(PARKED)}


def name_of(runner: Runner) -> str:
    """Return the name of a thread; one that `threading` has never heard of has none."""
    return f"(of _thread, {runner})" if isinstance(runner, int) else runner.name


def can_see_descriptors() -> bool:
    """Tell whether this system shows a process its descriptors (Linux does)."""
    return _FDS.is_dir()


def open_descriptors() -> set[Descriptor]:
    """Return the open descriptors; none where the system does not show them."""
    if not can_see_descriptors():
        return set()
    found = set()
    for name in os.listdir(_FDS):  # noqa: PTH208 - a name is all that is needed
        try:
            facts = os.stat(int(name))  # noqa: PTH116 - of the descriptor, not of a path
            target = os.readlink(_FDS / name)  # noqa: PTH115 - what is no path must stay as it is
        except OSError:  # the listing's own descriptor, or one that another thread just closed
            continue
        found.add(Descriptor(int(name), facts.st_dev, facts.st_ino, target))
    return found


def left_since(before: Footprint) -> Leak:
    """Return what appeared since `before`, without what the library keeps on purpose."""
    threads = running() - before.threads
    descriptors = open_descriptors() - before.descriptors
    return Leak(
        tuple(sorted(threads, key=name_of)),
        tuple(sorted(without_watcher(descriptors), key=lambda d: d.number)),
        Current.take().since(before.current),
    )


def without_watcher(descriptors: set[Descriptor]) -> set[Descriptor]:
    """Leave out one epoll and one eventfd while the watcher thread lives: they are its own."""
    if not any(thread.name == WATCHER_THREAD for thread in threading.enumerate()):
        return descriptors
    counts = Counter(d.target for d in descriptors)
    return {d for d in descriptors if d.target not in WATCHER_FDS or counts[d.target] > 1}


def settle(before: Footprint, grace: float = GRACE) -> Leak:
    """Return what is left after garbage was collected and what was just ending got `grace` seconds to end."""
    left = left_since(before)
    if not left:  # collecting can only make it less: spare every clean test the price
        return left
    gc.collect()
    end = time.monotonic() + grace
    pause = threading.Event()
    while (left := left_since(before)) and time.monotonic() < end:
        pause.wait(0.01)
    return left


def describe(left: Leak) -> str:
    """Return the words for a leak: each thread with its stack, each descriptor with its target."""
    lines = ["this test left something behind:"]
    frames = sys._current_frames()
    for runner in left.threads:
        lines.append(f"  thread {name_of(runner)}")
        frame = frames.get(runner if isinstance(runner, int) else runner.ident or 0)
        lines += [line.rstrip() for line in traceback.format_stack(frame)[-6:]] if frame else []
    lines += [f"  descriptor {d.number} -> {d.target}" for d in left.descriptors]
    lines += [f"  {words}" for words in left.current]
    return "\n".join(lines)
