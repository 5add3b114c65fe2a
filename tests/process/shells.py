"""What the tests of processes play with: commands that hang on cue, and a look at who lives."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

#: Seconds after which something that should have happened is given up. Only a failure ever waits them out.
WAIT = 10.0

#: Says that it runs, and never ends.
SLEEPER = "echo ready; sleep 1000"
#: Forks, ignores TERM in both, says so, and never ends.
DEAF = "trap '' TERM; (trap '' TERM; echo ready; while :; do sleep 1000; done) & while :; do sleep 1000; done"


def living(session: int) -> list[int]:
    """The processes of a session that have not ended; a zombie whose parent does not reap has."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                state, _parent, _group, of, *_ = (path / "stat").read_text().rpartition(")")[2].split()
            except (OSError, ValueError):
                continue
            if int(of) == session and state not in "ZX":
                found.append(int(path.name))
    return found


def is_living(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(seen: Any, what: str = "it") -> None:
    """Wait for something that tells nobody when it happens."""
    end = time.monotonic() + WAIT
    pause = threading.Event()
    while not seen():
        assert time.monotonic() < end, f"{what} never happened"
        pause.wait(0.002)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


class Program:
    """A Python program in a process of its own, spoken to by lines and signals."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(python(code), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def interrupt(self) -> None:
        """Press Ctrl-C once it waits: CPython looks for signals before a wait, and misses one that falls in between."""
        until(self._is_asleep, "the wait of the program")
        self.process.send_signal(signal.SIGINT)

    def interrupt_until_it_ends(self) -> tuple[int, str, str]:
        """Press Ctrl-C at this very moment, and again if that fell between CPython's look for signals and its wait."""
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(WAIT / 4)
        return self.finish()

    def _is_asleep(self) -> bool:
        return (Path("/proc") / str(self.process.pid) / "stat").read_text().rpartition(")")[2].split()[0] == "S"

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end; its status, and what it printed meanwhile."""
        try:
            out, err = self.process.communicate(timeout=WAIT)
        finally:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode, out, err


def children() -> list[int]:
    """The children of this process, living or not waited for, but for the helpers of multiprocessing."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                command = (path / "cmdline").read_bytes()
            except (OSError, ValueError):
                continue
            if parent == os.getpid() and b"multiprocessing" not in command:
                found.append(int(path.name))
    return found


def has_no_children() -> bool:
    return children() == []
