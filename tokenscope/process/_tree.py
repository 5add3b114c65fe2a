r"""A process that leads a session of its own, and what it started: found, signalled, reaped, ended.

Stages, only ever forwards; whoever waits (`advance`) does what is due::

    RUNNING --(it ended, others of its group have not)--> LINGERING --\
        |  \--------------(`end`: a cancel, an error)--> TERMINATING --(grace)--> KILLING --\
        \----(it ended, and nobody is left)------------------------------------------------> GONE

What belongs to it: every process of its session or group, and their descendants (`/proc`). What began a session of its
own *and* lost its parent has left for good, as a daemon does on purpose (docs/decisions/0012-process-trees.md).

Invariants
    1. A number is signalled only while it is ours. The group's is, as long as its leader is not reaped or a member is
       known to live; a member is known by its pidfd, opened and then looked at again.
    2. `returncode` is set once, under the lock, by the one who reaps. From then on somebody (a worker) drives on to
       GONE without a pause, so a group that became empty is not mistaken for a new one of the same number.
    3. ``GONE`` means: reaped, and nobody known lives; or given up, and told (`Orphaned`).

Lock order: a leaf; only system calls are made under it. It is re-entrant for signal handlers, and each step of
`_advance_locked` may be repeated. Fork: in another process nothing is reaped and nothing signalled.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
from typing import TYPE_CHECKING, NamedTuple

from tokenscope._core import _primitives, clock, events, workers
from tokenscope.process._waiting import Descriptor, open_pidfd, wait_ready, watch_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["LINGER", "ProcessTree", "Stage"]

#: Seconds for what a command left running in its group (a ``tee`` behind it) to end by itself.
LINGER = 0.5
#: Seconds after a KILL in which the system should have done it; then it is stuck in the kernel, or not ours to kill.
PATIENCE = 5.0
_PROC = "/proc"


class Stage(enum.IntEnum):
    """How far the end has come."""

    RUNNING = 0
    LINGERING = 1
    TERMINATING = 2
    KILLING = 3
    GONE = 4


_SIGNALS = {Stage.TERMINATING: signal.SIGTERM, Stage.KILLING: signal.SIGKILL}


class _Entry(NamedTuple):
    """A line of the system's list of processes."""

    pid: int
    parent: int
    group: int
    session: int
    started: str


class _Member(NamedTuple):
    entry: _Entry
    pidfd: Descriptor


class ProcessTree:
    """See the module's head. Made right after the start; ``pid`` must be our child and lead a session.

    ``on_gone()`` is called once, with no lock held. ``name`` is for events. ``driven``: its owner calls `advance`
    whenever something happens, so no thread is needed for invariant 2.
    """

    def __init__(self, pid: int, name: str, on_gone: Callable[[], object], *, driven: bool = False) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.cut = False  # it was still running when a cancel ended it
        self._name = name
        self._owner = _primitives.getpid()
        self._lock = _primitives.RLock()
        self._stage = Stage.RUNNING
        self._due: float | None = None  # when the next stage begins, monotonic
        self._grace = 0.0
        self._members: dict[int, _Member] = {}
        self._left: str | None = None  # who survived the KILL
        self._on_gone = [on_gone]
        self._driven = driven
        self._watch = watch_exit(pid)

    # --- asking -------------------------------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """Whether nothing of it is left, as far as was seen."""
        return self._stage is Stage.GONE

    @property
    def due(self) -> float | None:
        """When `advance` has something to do although nothing happened."""
        return self._due

    def watches(self) -> list[Descriptor]:
        """What becomes ready when something has happened to it; none if it is gone. Hold them while you wait."""
        with self._lock: return self._watches_locked()  # fmt: skip

    def _watches_locked(self) -> list[Descriptor]:
        if self._stage is Stage.GONE:
            return []
        leader = [] if self._watch is None else [self._watch]
        return leader + [member.pidfd for member in self._members.values()]

    # --- ending -------------------------------------------------------------------------------------------------

    def poll(self) -> int | None:
        """Look whether it has ended, and reap it then. Never blocks."""
        self.advance()
        return self.returncode

    def end(self, grace: float, *, cut: bool = False) -> None:
        """Begin to end it: TERM, after ``grace`` seconds KILL. Never blocks; later calls can only shorten the grace.

        Args:
            grace: Seconds; 0 kills at once.
            cut: It is ended because of a cancel.
        """
        self.advance()
        if not self.gone:
            with self._lock: self._end_locked(grace, cut=cut)  # fmt: skip
            self.advance()

    def _end_locked(self, grace: float, *, cut: bool) -> None:
        if self.returncode is None and cut:
            self.cut = True
        if self._stage < Stage.TERMINATING:
            self._grace = grace
            self._enter_locked(Stage.TERMINATING)
        elif self._stage is Stage.TERMINATING:
            self._due = min(self._due or 0.0, clock.now() + grace)

    def advance(self) -> None:
        """Reap, look who lives, signal, go to the next stage: whatever is due. Never blocks."""
        if self._owner != _primitives.getpid():
            self._disown()
            return
        before = self._stage
        with self._lock: self._advance_locked()  # fmt: skip
        if self._stage is Stage.GONE:
            self._tell_gone()
        elif before is Stage.RUNNING and self._stage is Stage.LINGERING and not self._driven:
            self._drive_elsewhere()

    def _disown(self) -> None:
        """In a forked process it is no child of ours: as good as gone. No lock, it may have been copied while held."""
        if self.returncode is None:
            self.returncode = 0  # what `subprocess` says there
        self._stage, self._due = Stage.GONE, None

    def _tell_gone(self) -> None:
        try:
            tell = self._on_gone.pop()
        except IndexError:
            return  # told already
        if self._left is not None:
            events.emit(events.Orphaned(f"process {self._name}", {f"pid {self._left}": "still there after SIGKILL"}))
        tell()

    def drive(self) -> None:
        """Block until it is gone. No checkpoint; it ends only if it ends by itself, or `end` was called."""
        self.advance()
        while watches := self.watches():
            wait_ready({watch.fd: select.POLLIN for watch in watches}, self._due)
            self.advance()

    def _drive_elsewhere(self) -> None:
        try:
            workers.submit(self.drive)
        except RuntimeError as error:  # then whoever waits for it drives
            events.emit(events.ThreadFailed(self._name, error))

    def _advance_locked(self) -> None:
        self._reap_locked()
        if self._stage is Stage.GONE or (self._stage is Stage.RUNNING and self.returncode is None):
            return
        if not self._look_locked():
            self._stage, self._due = Stage.GONE, None
        elif self._stage is Stage.RUNNING:
            self._enter_locked(Stage.LINGERING)
        elif self._due is not None and clock.now() >= self._due:
            self._enter_locked(Stage(self._stage + 1))

    def _enter_locked(self, stage: Stage) -> None:
        if stage is Stage.TERMINATING and self._grace <= 0:
            stage = Stage.KILLING
        if stage is Stage.GONE:
            self._give_up_locked()
            return
        self._stage = stage
        self._due = clock.now() + {Stage.LINGERING: LINGER, Stage.TERMINATING: self._grace}.get(stage, PATIENCE)
        if stage in _SIGNALS:
            self._find_locked()
            self._signal_locked(_SIGNALS[stage])

    def _give_up_locked(self) -> None:
        leader = [self.pid] if self.returncode is None else []
        self._left = ", ".join(str(pid) for pid in [*leader, *self._members])
        self._stage, self._due = Stage.GONE, None

    # --- reaping ------------------------------------------------------------------------------------------------

    def _reap_locked(self) -> None:
        if self.returncode is not None:
            return
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, 0  # somebody else reaped it (SIGCHLD is ignored ...): as `subprocess` has it
        if pid == self.pid:
            self.returncode = os.waitstatus_to_exitcode(status)
            self._watch = None

    # --- who is there -------------------------------------------------------------------------------------------

    def _look_locked(self) -> bool:
        """Whether anybody lives. Newcomers get the signal of the stage."""
        for pid, member in tuple(self._members.items()):
            if member.pidfd.is_ready():
                del self._members[pid]
        if self._members or self.returncode is None:
            return True
        if not self._group_exists():
            return False
        self._find_locked()
        if self._stage in _SIGNALS:
            # Also where nobody can be seen (no /proc, no pidfd): then this is the last that we can do.
            self._signal_locked(_SIGNALS[self._stage] if self._members else signal.SIGKILL)
        return bool(self._members)

    def _group_exists(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def _find_locked(self) -> None:
        for entry in _belonging_to(self.pid):
            if entry.pid == self.pid or entry.pid in self._members:
                continue
            pidfd = open_pidfd(entry.pid)
            if pidfd is not None and _same(entry):
                self._members[entry.pid] = _Member(entry, pidfd)

    # --- signals ------------------------------------------------------------------------------------------------

    def signal_leader(self, number: int) -> None:
        """Send a signal to the process itself, if it has not ended."""
        self.advance()
        if not self.gone:
            with self._lock: self._signal_leader_locked(number)  # fmt: skip

    def signal_group(self, number: int) -> None:
        """Send a signal to the process and its group, if anybody is there."""
        self.advance()
        if not self.gone:
            with self._lock: self._signal_group_locked(number)  # fmt: skip

    def _signal_leader_locked(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def _signal_locked(self, number: int) -> None:
        self._signal_group_locked(number)
        for member in self._members.values():
            if member.entry.group != self.pid:
                with contextlib.suppress(OSError):  # it has ended, or became somebody else's (sudo)
                    signal.pidfd_send_signal(member.pidfd.fd, number)

    def _signal_group_locked(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # as above
            os.killpg(self.pid, number)
        if number == signal.SIGTERM:  # a stopped process hears TERM only when it goes on
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGCONT)


def _belonging_to(root: int) -> list[_Entry]:
    """The living processes of the session or group ``root``, and their descendants."""
    everybody = list(_everybody())
    found = {e.pid: e for e in everybody if root in (e.pid, e.group, e.session)}
    grown = bool(found)
    while grown:
        more = {e.pid: e for e in everybody if e.parent in found and e.pid not in found}
        found |= more
        grown = bool(more)
    return list(found.values())


def _everybody() -> Iterator[_Entry]:
    try:
        names = os.listdir(_PROC)  # noqa: PTH208  # names are all that is needed, a few hundred of them
    except OSError:
        return  # not Linux: only the group can be reached
    for name in names:
        if name.isdecimal():
            entry = _read(int(name))
            if entry is not None:
                yield entry


def _read(pid: int) -> _Entry | None:
    """What the system says of a process; None if it has ended."""
    try:
        with open(f"{_PROC}/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123  # as above
            # The second field is the program's name, in brackets; it may contain brackets and spaces.
            state, parent, group, session, *rest = file.read().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else _Entry(pid, int(parent), int(group), int(session), rest[15])


def _same(entry: _Entry) -> bool:
    """Whether it is still the process that was listed, and not another one of the same number."""
    again = _read(entry.pid)
    return again is not None and again.started == entry.started
