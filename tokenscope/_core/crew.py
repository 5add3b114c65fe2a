r"""The children of one scope: who is queued, who lives, how they ended. Knows nothing of bodies and outcomes.

::

    admit -> ready --(room under max_threads)--> sent to a worker -> ... -> ended
                \--(cancelled while queued)----> dying ------------------> ended

Invariants
    1. A task is in ``live`` from `admit` to `ended`; in ``ready`` until a worker has been asked to run it. At most
       ``max_threads`` are in ``sent``.
    2. ``closed`` is set under the lock together with the observation that nothing is live or ready: no task can
       slip in after the scope has ended.
    3. In `ended`: the outcome is recorded, then the owner is told (it may cancel siblings), then ``live`` shrinks, then
       joiners wake. So whoever was joined sees all of it.
    4. Finished tasks are not kept: the crew has counts, errors and times only.
    5. Every step may be repeated: what an interrupt cut off is done by the next `join`, `admit` or `reap`.

Lock order: crew > workers (a leaf). Tokens are cancelled, futures published and hooks run with no lock held.
After a fork the child's crew is empty: leaving an inherited scope joins nothing.
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from os import getpid
from typing import TYPE_CHECKING, Any, cast

from tokenscope._core import _primitives, ambient, clock, events, workers
from tokenscope._core._typing import override
from tokenscope._core.errors import ScopeClosed
from tokenscope._core.outcome import Failure
from tokenscope._core.report import TaskCounts
from tokenscope._core.task import CANCELLED, FAILED, NEVER_STARTED, SUCCEEDED, Task

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.token import CancellationToken

__all__ = ["Crew"]


class Crew(_primitives.Room):
    """See the module's head.

    ``on_failure(task, error)`` is called on the failing child's thread, before it counts as ended.
    """

    __slots__ = (
        "__weakref__",
        "_scope",
        "cleanup_timeout",
        "closed",
        "counts",
        "dying",
        "failures",
        "gave_up",
        "given_up",
        "interrupted",
        "interruptible",
        "joiners",
        "labels",
        "last_end",
        "late_events",
        "late_work",
        "live",
        "max_threads",
        "name",
        "on_failure",
        "orphans",
        "ready",
        "sent",
        "token",
    )

    def __init__(
        self,
        scope: object,
        name: str,
        token: CancellationToken,
        max_threads: int | None,
        cleanup_timeout: float | None,
        on_failure: Callable[[Task[Any], BaseException], object],
        *,
        interruptible: bool = False,
    ) -> None:
        super().__init__()
        # Weakly: a scope that is dropped without being left must be noticed although its children still run.
        self._scope = weakref.ref(scope)
        self.name = name
        self.token = token
        self.max_threads = max_threads
        self.cleanup_timeout = cleanup_timeout
        self.on_failure = on_failure
        self.interruptible = interruptible
        # All below changes under the lock.
        self.live: set[Task[Any]] = set()
        self.ready: OrderedDict[Task[Any], None] = OrderedDict()  # first come, first served; any can leave at once
        self.sent: set[Task[Any]] = set()
        self.dying: dict[Task[Any], None] = {}
        self.orphans: set[Task[Any]] = set()  # given up, and still running
        self.labels: set[str] = set()  # of those that had to be named
        self.given_up: list[str] = []  # the names of all that were
        self.interrupted: list[str] = []  # the names of those that were, once they have ended
        self.gave_up = 0.0  # monotonic
        self.joiners: list[_primitives.Waiter] = []
        self.failures: list[Failure] = []
        self.counts = dict.fromkeys((SUCCEEDED, FAILED, CANCELLED, NEVER_STARTED), 0)
        self.late_events: Counter[str] = Counter()
        self.late_work = 0.0  # seconds of the children's own code after the cancel
        self.last_end = 0.0  # monotonic
        self.closed = False

    @property
    def scope(self) -> Any:
        """The scope whose children these are; None if it was dropped."""
        return self._scope()

    # --- taking work in -----------------------------------------------------------------------------------------

    def admit(self, task: Task[Any]) -> None:
        """Take a task and start it as soon as there is room.

        Raises:
            ScopeClosed: The scope has ended.
            RuntimeError: No thread could be started; the task is forgotten.
        """
        if self.pid != getpid() or self.owned():
            self.run(self._admit_locked, task)
        else:
            with self.lock: self._admit_locked(task)
        if self.max_threads is None:
            self._send(task)
        else:
            self.run(self._dispatch_locked, task)
            if task in self.ready:  # it has to wait: then a cancel must be able to end it there
                task._queued = task.token.on_cancel(self.reap, task)
                if task.done():  # meanwhile; then `ended` could not close it
                    task._queued.close(wait=False)
        if events.wants(events.TaskSpawned):
            events.emit(events.TaskSpawned(self.name, task.name))

    def _admit_locked(self, task: Task[Any]) -> None:
        if self.closed:
            raise ScopeClosed(f"scope {self.name!r} has ended and takes no more work", self.token.reason)
        self.live.add(task); self.ready[task] = None  # on one line: `idle` sends what an interrupt left here

    def adopt(self, task: Task[Any]) -> bool:
        """Take a task that a thread of somebody else's will `work`, or end unstarted; False if the scope has ended."""
        self.run(self._adopt_locked, task)
        return task in self.live

    def _adopt_locked(self, task: Task[Any]) -> None:
        if not self.closed:
            self.live.add(task)

    def _send(self, task: Task[Any]) -> None:
        """Ask a worker to run it; there is no limit. No lock is held, for a thread may have to be started."""
        try:
            workers.submit(task.work)
        except RuntimeError:
            self.run(self._forget_locked, task)
            raise
        self.ready.pop(task, None)  # an interrupt above sends it twice; its second run does nothing

    def _dispatch_locked(self, newest: Task[Any] | None = None) -> None:
        """Send queued tasks to workers while there is room."""
        limit = self.max_threads or len(self.live)
        while self.ready:
            task = next(iter(self.ready))
            # Cut off by an interrupt below, this comes back to a task that was sent, and may even have ended.
            if task not in self.sent and len(self.sent) >= limit:
                return
            try:
                self.sent.add(task)
                workers.submit(task.work, patient=task is not newest)
            except RuntimeError as error:
                self.sent.discard(task)
                if task is newest:
                    self._forget_locked(task)
                    raise
                events.emit(events.ThreadFailed(self.name, error))  # tried again when the next one ends
                return
            if task not in self.live:
                self.sent.discard(task)
            self.ready.pop(task, None)

    def _forget_locked(self, task: Task[Any]) -> None:
        self.ready.pop(task, None)
        self.live.discard(task)
        self.sent.discard(task)

    # --- letting it go ------------------------------------------------------------------------------------------

    def ended(self, task: Task[Any]) -> None:
        """A task has ended; called by the task. Publish, tell the owner of a failure, let it go: in this order.

        Whatever users' code raises meanwhile (a done-callback, a cancel callback that calls ``sys.exit``), all is done
        before it goes on.
        """
        interrupt: BaseException | None = None
        if task._made is not None:
            interrupt = _kept(task.publish)
        if self.pid != getpid() or self.owned():
            self.run(self._record_locked, task)
        else:
            with self.lock: self._record_locked(task)
        if not task._released:
            interrupt = self._tell_of(task) or interrupt
        if events.wants(events.TaskEnded):
            events.emit(events.TaskEnded(self.name, task.name, (task._end or (NEVER_STARTED, None))[0]))
        if interrupt is not None:
            raise interrupt

    def _tell_of(self, task: Task[Any]) -> BaseException | None:
        """The end of a task of which somebody must be told with no lock held. Returns an interrupt to re-raise."""
        interrupt: BaseException | None = None
        if not task.done():
            interrupt = _kept(task.publish) or interrupt
        if task._watchers:
            task.wake_watchers()
        if task._queued is not None:
            task._queued.close(wait=False)
        word, value = task._end or (NEVER_STARTED, None)
        if word == FAILED:
            interrupt = _kept(self._tell_failure, task, cast("BaseException", value)) or interrupt
        if task in self.live or task in self.orphans:
            self.run(self._release_locked, task)
        return interrupt

    def _tell_failure(self, task: Task[Any], error: BaseException) -> None:
        if task in self.orphans:  # its scope has told its outcome
            task.tell_failure(self.name, error)
        else:
            self.on_failure(task, error)

    def _record_locked(self, task: Task[Any]) -> None:
        """Count it.

        And where nobody needs to be told anything outside of the lock, publish it and let it go in one step.
        """
        if task not in self.live or task._end is None:
            return
        quick = task.publish_locked() or task.done()
        if task._counted:
            return
        task._counted = True
        word, value = task._end
        self.counts[word] += 1
        if word == FAILED:
            self.failures.append(Failure(f"task {task.name}", value, late=self._began_late(task)))
        elif self.token._cut is not None and word == SUCCEEDED:
            self.late_events["results"] += 1
        if task._window is not None and task._window.landed:
            self.interrupted.append(self.label(task))
        cut = task.token._cut
        if cut is not None and task._stopped is not None:
            self.late_work += max(0.0, task._stopped - cut.when)
        if quick and word != FAILED and not task._watchers and self.max_threads is None:
            self._release_locked(task)
            task._released = True

    def _began_late(self, task: Task[Any]) -> bool:
        """Whether the failure of a task began after the cancel; its cleanups may have taken it beyond that."""
        cut = self.token._cut
        return cut is not None and (task._stopped is None or task._stopped >= cut.when)

    def _release_locked(self, task: Task[Any]) -> Callable[[], object] | None:
        if task in self.orphans:
            self.orphans.discard(task)
            late = clock.now() - self.gave_up
            return lambda: events.emit(events.OrphanEnded(self.name, self.label(task), late))
        self.last_end = clock.now()
        self.live.discard(task)
        if self.max_threads is not None:
            self.sent.discard(task)
            if self.ready:
                self._dispatch_locked()
        if self.dying:
            self.dying.pop(task, None)
        if not self.live:
            self._wake_joiners_locked()
        return None

    def _wake_joiners_locked(self) -> None:
        for joiner in self.joiners:
            joiner.wake()

    def reap(self, *tasks: Task[Any]) -> None:
        """End those of the tasks (none: of all) that were cancelled while they were queued."""
        self.run(self._reap_locked, tasks)
        for task in tasks or tuple(self.dying):
            if task in self.dying:
                task.end_unstarted()

    def _reap_locked(self, tasks: tuple[Task[Any], ...]) -> None:
        for task in tasks or tuple(self.ready):
            if task.token._cut is not None and task in self.ready:
                self.dying[task] = None
                self.ready.pop(task, None)

    # --- waiting ------------------------------------------------------------------------------------------------

    def refuse_own_child(self, what: str) -> None:
        """Raise if one of the children is about to wait for all of them.

        Raises:
            RuntimeError: It is.
        """
        owner = ambient.owner_var.get()
        if isinstance(owner, Task) and owner._crew is self:
            raise RuntimeError(f"{what} of scope {self.name!r} by its own child would wait for itself")

    def idle(self) -> bool:
        """Whether nothing lives here now. Also does what an interrupt left undone."""
        if self.has_leftovers():
            self.settle()
        if self.dying or self.ready:
            self.reap()
            self._send_the_rest()
        return self.pid != _primitives.getpid() or not (self.live or self.ready)

    def _send_the_rest(self) -> None:
        if self.max_threads is not None:
            self.run(self._dispatch_locked)
        else:
            for task in tuple(self.ready):
                self._send(task)

    def add_joiner(self, waiter: _primitives.Waiter) -> None:
        """Have ``waiter`` woken when nothing lives any more. Look again after this."""
        self.run(self.joiners.append, waiter)

    def remove_joiner(self, waiter: _primitives.Waiter) -> None:
        """Undo `add_joiner`."""
        self.run(_primitives.discard, self.joiners, waiter)

    def close_if_idle(self) -> bool:
        """Take no more work, unless something lives; True if closed now."""
        self.run(self._close_locked)
        return self.closed

    def _close_locked(self) -> None:
        if not (self.live or self.ready):
            self.closed = True

    def abandon(self) -> dict[str, str]:
        """Give up what still lives: it is counted as orphaned, and nobody waits for it any more. Returns the stacks."""
        self.run(self._abandon_locked)
        return {self.label(task): task.stack() for task in tuple(self.orphans)}

    def _abandon_locked(self) -> None:
        self.gave_up = clock.now()
        self.given_up += [self.label(task) for task in self.live]
        self.orphans |= self.live
        self.live.clear()
        self.ready.clear()
        self.sent.clear()
        self.closed = True

    def label(self, task: Task[Any]) -> str:
        """The task's name; with a number behind it where another one of that name had to be named before."""
        if task._label is None:
            label, number = task.name, 1
            while label in self.labels:
                number += 1
                label = f"{task.name} ({number})"
            self.labels.add(label)
            task._label = label
        return task._label

    def lingering(self) -> list[Task[Any]]:
        """The tasks that live now."""
        found: list[Task[Any]] = []
        self.run(self._copy_live_locked, found)
        return found

    def _copy_live_locked(self, found: list[Task[Any]]) -> None:
        found += self.live

    def note_late(self, what: str) -> None:
        """Something happened after the cancel."""
        self.run(self._note_late_locked, what)
        if events.wants(events.LateEvent):
            events.emit(events.LateEvent(self.name, what))

    def _note_late_locked(self, what: str) -> None:
        self.late_events[what] += 1

    def task_counts(self) -> TaskCounts:
        """How the tasks ended so far."""
        counts = self.counts
        ended = sum(counts.values())
        return TaskCounts(
            spawned=ended + len(self.live) + len(self.given_up),
            finished=counts[SUCCEEDED],
            failed=counts[FAILED],
            cancelled=counts[CANCELLED],
            never_started=counts[NEVER_STARTED],
        )

    @override
    def _after_fork_locked(self) -> None:
        self.live.clear()
        self.ready.clear()
        self.sent.clear()
        self.orphans.clear()
        self.dying.clear()
        self.joiners.clear()


def _kept(step: Callable[..., object], *args: Any) -> BaseException | None:
    """Do a step that runs users' code; what it raised, to be raised when everything else is done."""
    try:
        step(*args)
    except BaseException as error:
        return error
    return None
