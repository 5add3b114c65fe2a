"""A cache of threads that grows as a chain. It knows callables, not tokens.

A job is put on one shared queue. Who starts threads?

* `Workers.submit` starts one when no worker is idle and none is starting;
* a worker that takes a job, still sees a backlog, and nobody idle or starting, starts the next one *before* it
  runs its own job.

So every queued job has a thread on its way (children that wait for each other never starve), and a burst of
trivial jobs stays on two threads: the first is done before the second has started.

States of a worker: *starting* -> *idle* <-> *busy* -> gone after `IDLE_SECONDS` idle.

Invariants
    1. ``idle`` and ``starting`` change under the lock only. ``starting`` holds a ticket for each start, so that
       one which an interrupt cut off is neither forgotten nor counted twice.
    2. Backlog > 0 implies idle > 0 or starting > 0 or some worker has taken a job and not yet looked at the backlog.
    3. A job's cell is emptied exactly once (``list.pop`` is atomic): by the worker that runs it, or by a
       submitter that takes it back because no thread could be started.
    4. A worker takes its next job only when the last one has returned: a thread is never reused before it ended.

Lock order: the lock is a leaf; jobs, hooks and thread starts run outside of it. Hence no deadlock.
Re-entry: ``SimpleQueue.put`` may be called in the middle of anything; `_hire` does nothing where this thread is already
inside, and the interrupted section looks again.
Fork: a child starts with an empty queue and no workers. Interpreter exit: the threads are daemons, parked in C.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from os import getpid
from typing import TYPE_CHECKING

from tokenscope._core import _primitives, events
from tokenscope._core._typing import override

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["IDLE_NAME", "Workers", "on_thread_release", "release_thread", "submit", "workers"]

IDLE_NAME = "tokenscope-idle"
#: A worker ends after this many seconds without a job.
IDLE_SECONDS = 10.0

Job = list["Callable[[], object]"]  # a cell with one callable, or empty when somebody took it
_LEAVE: Job = []  # asks an idle worker to end


class Workers(_primitives.Room):
    """The queue and its threads. There is one for the process: `workers`."""

    __slots__ = ("_again", "idle", "jobs", "starting", "threads")

    def __init__(self) -> None:
        super().__init__()
        self.jobs: queue.SimpleQueue[Job] = _primitives.SimpleQueue()
        self.idle = 0  # changes under the lock
        self.starting: set[object] = set()  # changes under the lock
        self.threads = 0  # changes under the lock
        self._again = False  # a re-entrant call wants another look

    def submit(self, fn: Callable[[], object], *, patient: bool = False) -> None:
        """Run ``fn`` on a cached thread, soon. Thread-safe, also in signal handlers.

        ``patient``: where no thread can be started, one that is busy now will do.

        Raises:
            RuntimeError: No thread could be started; ``fn`` will not run.
        """
        if self.pid != getpid():
            self.enter()  # a forked child must not put its job on the queue of its parent
        job: Job = [fn]
        self.jobs.put(job)
        # Reading both without the lock is safe after the put: a worker that stops being idle either counts itself
        # out and looks into the queue then, or takes a job, and then looks at the backlog itself.
        if self.idle or self.starting:
            return
        try:
            self._hire()
        except RuntimeError:
            if job and not (patient and self.threads):
                job.clear()
                raise
            # A worker took it after all.

    def _hire(self) -> None:
        """Start a thread if there is a backlog and nobody to see to it."""
        if self.busy_here():
            self._again = True
            return
        self._start_if_needed(object())
        while self._again:
            self._start_if_needed(object())

    def _start_if_needed(self, ticket: object) -> None:
        try:
            with self.enter(): self._claim_locked(ticket)
            if ticket in self.starting:
                _primitives.start_thread(functools.partial(self._work, ticket), IDLE_NAME)
        except BaseException:
            with self.enter(): self._give_up_locked(ticket)
            raise

    def _claim_locked(self, ticket: object) -> None:
        self._again = False
        if not (self.idle or self.starting or self.jobs.empty()):
            self.starting.add(ticket)

    def _give_up_locked(self, ticket: object) -> None:
        self.starting.discard(ticket)

    def _work(self, ticket: object) -> None:
        thread = threading.current_thread()
        with self.enter(): self._arrived_locked(ticket)
        job = self._wait_for_job()
        while job is not None:
            with self.enter(): self._busy_locked()
            while job is not None:
                self._run(job)
                job = self._another_job()
            if thread.name != IDLE_NAME:
                thread.name = IDLE_NAME
            with self.enter(): self._idle_locked()
            job = self._wait_for_job()

    def _arrived_locked(self, ticket: object) -> None:
        self.idle += 1
        self.threads += 1
        self.starting.discard(ticket)

    def _idle_locked(self) -> None:
        self.idle += 1

    def _busy_locked(self) -> None:
        self.idle -= 1

    def _another_job(self) -> Job | None:
        """What is waiting already; a worker that finds something does not become idle."""
        try:
            job = self.jobs.get_nowait()
        except queue.Empty:
            return None
        if job is _LEAVE:  # meant for somebody idle, which this one is about to be
            self.jobs.put(job)
            return None
        return job

    def _wait_for_job(self) -> Job | None:
        """Wait for a job; None when this worker should end."""
        while True:
            try:
                job = self.jobs.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                with self.enter(): ends = self._retire_locked()
                if ends:
                    return None
                continue
            if job is not _LEAVE:
                return job
            with self.enter(): self._leave_locked()
            if not self.idle and not self.jobs.empty():
                self._hire()  # a job may have come in behind the request to leave
            return None

    def _retire_locked(self) -> bool:
        # First this, then look: `submit` reads ``idle`` without the lock, after it has put its job.
        self._leave_locked()
        if self.jobs.empty():
            return True
        self.idle += 1
        self.threads += 1
        return False

    def _leave_locked(self) -> None:
        self.idle -= 1
        self.threads -= 1

    def drain(self) -> None:
        """Ask all idle workers to end now (for leak checks). Returns at once."""
        for _ in range(self.idle):
            self.jobs.put(_LEAVE)

    def _run(self, job: Job) -> None:
        try:
            if not (self.idle or self.starting or self.jobs.empty()):
                self._hire()
        except RuntimeError as error:
            # The backlog waits for the jobs that run now; say so, it may be a deadlock of somebody's.
            events.emit(events.ThreadFailed(IDLE_NAME, error))
        try:
            fn = job.pop()
        except IndexError:
            return  # taken back by its submitter
        try:
            fn()
        except BaseException as error:  # nobody above us could be told; the worker must live
            events.emit(events.ThreadFailed(threading.current_thread().name, error))

    @override
    def _after_fork_locked(self) -> None:
        self.jobs = _primitives.SimpleQueue()
        self.starting.clear()
        self.idle = self.threads = 0


workers = Workers()
submit = workers.submit


def submit_from_finalizer(fn: Callable[[], object]) -> None:
    """Run ``fn`` on a thread, soon; for ``__del__``, which may run in the middle of anything.

    `submit` may have to start a thread, and ``Thread.start`` takes the lock that ``threading.enumerate`` holds:
    a finalizer that runs inside of that would wait for itself. A raw thread takes no lock. At interpreter exit
    nothing is done.
    """
    with contextlib.suppress(RuntimeError):
        _primitives.start_raw_thread(submit, fn)


_hooks_room = _primitives.Room()  # for the replacement of the tuple; readers take no lock
_hooks: tuple[Callable[[], object], ...] = ()


def on_thread_release(hook: Callable[[], object]) -> Callable[[], None]:
    """Call ``hook()`` on a task's thread before the task counts as ended; returns a function that ends it.

    For what a library keeps per thread and must close with the work (Django's database connections).

    Raises:
        TypeError: ``hook`` is not callable.
    """
    if not callable(hook):
        raise TypeError(f"hook must be callable, not {hook!r}")
    entry = functools.partial(hook)  # with an identity of its own: a hook may be registered twice
    _hooks_room.run(_add_hook_locked, entry)

    def unregister() -> None:
        _hooks_room.run(_remove_hook_locked, entry)

    return unregister


def _add_hook_locked(entry: Callable[[], object]) -> None:
    global _hooks
    if entry not in _hooks:
        _hooks = (*_hooks, entry)


def _remove_hook_locked(entry: Callable[[], object]) -> None:
    global _hooks
    _hooks = tuple(other for other in _hooks if other is not entry)


def release_thread() -> None:
    """Run the hooks; one that raises stops no other."""
    for hook in _hooks:
        try:
            hook()
        except BaseException as error:  # the task has ended; its outcome must not change any more
            events.emit(events.CallbackFailed("on_thread_release", error))
