r"""A lexical owner of threads: nothing that was started in it outlives it unnoticed.

States::

    new --enter--> open --leave--> joining --(nothing lives)--> cleaning --> ended
                                      \--(gave up waiting)-------/

How a scope is left, in order: children stopped if the body failed -> children joined -> outcome fixed -> cleanups,
newest first -> report -> outcome raised. ``crew.py`` holds the children, ``cleanup.py`` the cleanups, ``outcome.py``
the rules.

Invariants
    1. Spawning is possible until nothing lives any more; that moment and the end of spawning are one locked step
       (`Crew.close_if_idle`).
    2. Each step of leaving looks at what is left to do, so it may be cut off by an interrupt and done again: the first
       one (a KeyboardInterrupt, or whatever a signal handler raises) cancels with ``interrupted`` and goes on joining,
       the second one abandons the children.
    3. Waiting in `__exit__` is not a checkpoint: a cancelled scope still joins its children.
    4. What was ambient before is put back only where it is still ours, on whichever thread the scope is left.

Lock order: none of its own; see ``crew.py`` and ``tree.py``. No lock is held while it waits, cancels, or runs user
code. After a fork the crew is empty: the child leaves an inherited scope without joining anything. At interpreter exit
nothing is waited for that ``with`` has not been left for.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Literal, NoReturn, ParamSpec, Self, TypeVar

from tokenscope._core import _primitives, ambient, clock, events, workers
from tokenscope._core.cleanup import CleanupStack
from tokenscope._core.crew import Crew
from tokenscope._core.current import check, current_token, effective_token
from tokenscope._core.errors import ScopeClosed, StragglersLeft
from tokenscope._core.mapping import ScopeMap
from tokenscope._core.outcome import INTERRUPTS, Ending, Failure, Verdict, decide, foresee
from tokenscope._core.reasons import CancelKind
from tokenscope._core.report import ScopeReport, ScopeSnapshot, TaskSnapshot
from tokenscope._core.strike import beat_after, strike
from tokenscope._core.task import Task, refuse_as_work
from tokenscope._core.token import (
    CancellationToken,
    attach,
    boundary_below,
    cancel_because_of,
    cut_short,
    detach,
    expire_if_due,
    is_cut_of,
    iterator_of,
    retire,
)
from tokenscope._core.window import hold_here

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable
    from contextlib import AbstractContextManager
    from types import TracebackType

    from tokenscope._core.reasons import CancelReason
    from tokenscope._core.window import Window

__all__ = ["ThreadScope", "adopt"]

P = ParamSpec("P")
T = TypeVar("T")
OnError = Literal["cancel", "collect"]
OnStraggler = Literal["wait", "abandon", "interrupt"]
_numbers = itertools.count(1)
MOST_CUT_OFFS = 8  # errors in leaving (not Ctrl-C) after which it is a defect of ours: better told than tried for ever
_ending_interpreter = sys.is_finalizing  # kept: at that time the names of modules are gone
_making = _primitives.Room()  # for what a scope makes when first needed; a leaf, but for factories of upper floors


class ThreadScope:
    """``with ThreadScope() as scope: scope.spawn(fn)``: what was spawned is joined, cleaned up and told as one outcome.

    Its methods are thread-safe; it is entered and left once. A cancel of the current token (or of ``token``) reaches
    the body and every child.

    Args:
        name: For logs, errors and the report.
        token: Cancels this scope too; it is added to the current token, never put in its place.
        timeout: Seconds the scope may take, from entering it.
        max_threads: How many children run at a time; the others wait in the queue. None: all.
        on_error: ``"cancel"``: a failing child cancels its siblings and the body, a failing body the children.
            ``"collect"``: all run on, and failures are told at the end.
        cleanup_timeout: Seconds for all cleanups together.
        grace: Seconds after a cancel before a child counts as a straggler and is told with its stack.
        on_straggler: ``"wait"`` for ever, telling again at each doubling; ``"abandon"`` it after ``grace`` and
            raise `StragglersLeft`; or ``"interrupt"``: after ``grace`` have `Cancelled` raised in it, wherever its
            Python code is, and wait. Meant for functions that compute; docs/guide/cpu-loop.md says what it may break.

    Raises:
        ValueError, TypeError: A bad argument, named with its value.
    """

    # Most scopes of a busy server live for microseconds and never spawn, defer or fail: what only the others need is
    # made when it is needed.
    _token: CancellationToken | None = None  # set on entering
    _crew: Crew | None = None  # the children; made with the first one, under `_making`
    _cleanups: CleanupStack | None = None  # made with the first one, under `_making`
    _extensions: dict[Hashable, Any] | None = None  # made with the first one, under `_making`
    _before: tuple[object, object] = (None, None)  # what was ambient
    _opened = 0.0  # monotonic
    _ended = 0.0  # monotonic
    _ending: Ending | None = None  # set when leaving begins
    _closed = False  # no child lives, and none can be spawned; set under `_making` or by the crew
    _word: str | None = None  # the outcome, when it has ended
    _stragglers: dict[str, str] | None = None  # those seen, with their stacks
    _cut_offs = 0  # how often an error cut leaving off
    _looks = 0  # how often stragglers were looked at
    _held: Window | None = None  # of the thread that leaves it
    _strikes = 0  # how often it was tried to interrupt them
    _report: ScopeReport | None = None  # made when it is asked for
    #: Whether the scope's own ``cancel()`` cut its work short and ended here.
    cancelled_caught = False

    def __init__(
        self,
        *,
        name: str | None = None,
        token: CancellationToken | None = None,
        timeout: float | None = None,
        max_threads: int | None = None,
        on_error: OnError = "cancel",
        cleanup_timeout: float | None = 30.0,
        grace: float = 5.0,
        on_straggler: OnStraggler = "wait",
    ) -> None:
        _check_settings(name, token, max_threads, on_error, on_straggler)
        self.name = name if name is not None else f"scope-{next(_numbers)}"
        self._explicit = token
        self._timeout = timeout if timeout is None else clock.validate_timeout(timeout)
        self._max_threads = max_threads
        self._on_error = on_error
        self._cleanup_timeout = clock.validate_timeout(cleanup_timeout, "cleanup_timeout")
        self._grace = _validate_grace(grace)
        self._on_straggler = on_straggler
        self._pid = os.getpid()
        # Weakly: a map that its user dropped cancels what it has in flight, and needs nothing more.
        self._maps: list[weakref.ref[ScopeMap[Any]]] = []

    # --- entering -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._token is not None:
            raise RuntimeError(f"scope {self.name!r} was entered before; a scope is used once, make a new ThreadScope")
        token = boundary_below(effective_token(self._explicit), self._timeout, self.name)
        self._token = token
        self._opened = clock.now()
        self._before = ambient.token_var.get(), ambient.owner_var.get()
        ambient.token_var.set(token)
        ambient.owner_var.set(self)
        if events.wants(events.ScopeOpened):
            events.emit(events.ScopeOpened(self.name))
        return self

    @property
    def token(self) -> CancellationToken:
        """The scope's token: the parent of its tasks' tokens.

        Raises:
            RuntimeError: The scope has not been entered.
        """
        if self._token is None:
            raise RuntimeError(f"scope {self.name!r} has no token before it is entered: `with ThreadScope() as scope:`")
        return self._token

    @property
    def scope(self) -> Self:
        """Itself: what `current_scope` gives in its body."""
        return self

    def _children(self) -> Crew:
        crew = self._crew
        if crew is None:
            with _making.enter(): self._make_crew_locked()
            crew = self._crew
            assert crew is not None
        return crew

    def _make_crew_locked(self) -> None:
        if self._token is None:
            raise RuntimeError(f"scope {self.name!r} is not open: use `with ThreadScope() as scope:`")
        if self._crew is None:
            on_failure = _failing_child_cancels(self)
            crew = Crew(
                self,
                self.name,
                self._token,
                self._max_threads,
                self._cleanup_timeout,
                on_failure,
                interruptible=self._on_straggler == "interrupt",
            )
            crew.closed = self._closed
            self._crew = crew

    def _cleaner(self) -> CleanupStack:
        with _making.enter(): self._make_cleanups_locked()
        assert self._cleanups is not None
        return self._cleanups

    def _make_cleanups_locked(self) -> None:
        if self._cleanups is None:
            self._cleanups = CleanupStack(self.name)

    # --- working ------------------------------------------------------------------------------------------------

    def spawn(
        self, fn: Callable[..., T], /, *args: Any, name: str | None = None, kind: str | None = None, **kwargs: Any
    ) -> Task[T]:
        """Run ``fn(*args, **kwargs)`` in a thread of this scope, in a copy of this context. A checkpoint.

        Args:
            name: Of the task and of its thread while it runs.
            kind: A word of your own for logs.

        Raises:
            Cancelled: The caller is cancelled.
            ScopeClosed: The scope has ended, or is cancelled and the caller is not of its tree.
            TypeError: ``fn`` is not callable, or ``async``; or ``name`` or ``kind`` is no str.
            RuntimeError: The scope was not entered, or no thread could be started; then nothing is left behind.
        """
        crew = self._children()
        refuse_as_work("spawn()", fn)
        check()
        cut = crew.token._cut
        if cut is not None:
            self._refuse(crew, cut.reason)
        task = Task(crew, fn, args, kwargs, name, kind)
        crew.admit(task)
        return task

    def _refuse(self, crew: Crew, reason: CancelReason) -> NoReturn:
        check()  # the cancel may have come since the caller was looked at: then it is the caller's own
        crew.note_late("spawns")
        raise ScopeClosed(f"scope {self.name!r} is cancelled and takes no more work", reason)

    def map(
        self, fn: Callable[[Any], T], items: Iterable[Any], *, limit: int | None = None, ordered: bool = True
    ) -> ScopeMap[T]:
        """Results of ``fn(item)``, computed by at most ``limit`` tasks at a time, pulled lazily.

        Args:
            limit: None means ``min(32, cpus + 4)``.
            ordered: In the order of the items; False: as they are done.

        Raises:
            ValueError, TypeError: A bad ``limit``, or ``items`` is not iterable.
        """
        if limit is None:
            limit = min(32, (os.cpu_count() or 1) + 4)
        _check_positive("limit", limit)
        refuse_as_work("map()", fn)
        self._refuse_if_ended("map() in")
        source = iterator_of("map()", items)
        mapping = ScopeMap(functools.partial(self.spawn, fn, kind="map"), source, limit=limit, ordered=ordered)
        self._maps = [link for link in self._maps if link() is not None]
        self._maps.append(weakref.ref(mapping))
        return mapping

    def join(self, timeout: float | None = None) -> bool:
        """Wait until no child lives, for at most ``timeout`` seconds; True if none does. A checkpoint.

        Raises:
            Cancelled: The caller is, or was meanwhile, cancelled.
            RuntimeError: The caller is one of the children.
            ValueError, TypeError: A bad ``timeout``.
        """
        seconds = clock.validate_timeout(timeout)
        end = clock.deadline_after(seconds)
        crew = self._children()
        crew.refuse_own_child("join()")
        caller = current_token()
        while True:
            caller.check()
            if crew.idle():
                return True
            if end is not None and clock.now() >= end:
                return False
            _wait_for_idle(crew, caller, _earliest(end, caller.deadline))
            expire_if_due(caller)

    def defer(self, fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Have ``fn(*args, **kwargs)`` called when the scope ends, after all children, newest first.

        It runs out of reach of cancels, within the scope's ``cleanup_timeout``.

        Raises:
            TypeError: ``fn`` is not callable.
            ScopeClosed: The scope has ended.
        """
        self._refuse_if_ended("defer() into")
        self._cleaner().push(fn, args, kwargs)

    def enter_context(self, manager: AbstractContextManager[T]) -> T:
        """Enter ``manager`` now and leave it with the cleanups; it receives the scope's outcome as its exception.

        So a transaction rolls back when only a child failed. It cannot suppress the outcome.

        Raises:
            TypeError: It is no context manager.
            ScopeClosed: The scope has ended.
        """
        self._refuse_if_ended("enter_context() into")
        value: T = self._cleaner().enter(manager)
        return value

    def _refuse_if_ended(self, what: str) -> None:
        if self._token is None:
            raise RuntimeError(f"scope {self.name!r} is not open: use `with ThreadScope() as scope:`")
        if self._word is not None:
            raise ScopeClosed(f"{what} scope {self.name!r}, which has ended")

    def cancel(
        self,
        message: str = "",
        *,
        kind: str = CancelKind.MANUAL,
        tag: str | None = None,
        cause: BaseException | None = None,
    ) -> bool:
        """Cancel body and children; the scope absorbs it on leaving. See `CancellationToken.cancel`."""
        return self.token.cancel(message, kind=kind, tag=tag, cause=cause)

    def extension(self, key: Hashable, factory: Callable[[], T]) -> T:
        """What an upper floor keeps with this scope under ``key``; made by ``factory()`` the first time.

        Raises:
            TypeError: ``factory`` is not callable.
        """
        if not callable(factory):
            raise TypeError(f"factory must be callable, not {factory!r}")
        with _making.enter():
            if self._extensions is None:
                self._extensions = {}
            if key not in self._extensions:
                self._extensions[key] = factory()
            value: T = self._extensions[key]
            return value

    # --- leaving ------------------------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        verdict: Verdict | None = None
        interrupt: BaseException | None = None
        while verdict is None:
            try:
                self._held = self._held or hold_here(self)  # a child is not interrupted while it leaves a scope
                verdict = self._leave(error, interrupt)
            except BaseException as caught:  # KeyboardInterrupt, or whatever else a signal handler raises
                interrupt = caught
                self._cut_offs += not isinstance(caught, INTERRUPTS)
                if self._cut_offs > MOST_CUT_OFFS:
                    raise
        if self._held is not None:
            self._held.let_go(self)
        if verdict.error is None or verdict.error is error:
            return verdict.absorbed
        raise verdict.error

    def _misuse(self, *, again: bool) -> str | None:
        """Why it cannot be left now, if it cannot."""
        if self._token is None:
            return f"scope {self.name!r} was left without having been entered"
        if self._word is not None and not again:
            return f"scope {self.name!r} was left before; a scope is used once"
        return None

    def _leave(self, error: BaseException | None, interrupt: BaseException | None) -> Verdict:
        """All steps; each does what is left of it. ``interrupt`` is what cut the last attempt off."""
        misuse = self._misuse(again=interrupt is not None)
        if misuse is not None:
            return Verdict("misused", RuntimeError(misuse))
        if self._ending is None:
            self._ending = Ending(self.name, body=error)
        ending = self._ending
        if interrupt is not None:
            self._interrupted(interrupt, ending)
        if ending.body is not None or self._maps:
            self._stop_children(ending.body)
        if not self._never_had_children():
            self._join_children(self._children(), ending)
        self._fix(ending)
        if self._cleanups is not None:
            self._clean_up(self._cleanups, ending)
        verdict = decide(ending)
        self._end(ending, verdict)
        return verdict

    def _never_had_children(self) -> bool:
        """Whether nothing was ever spawned; then nothing can be any more."""
        if self._crew is None:
            with _making.enter(): self._close_locked()
        return self._crew is None

    def _close_locked(self) -> None:
        if self._crew is None:
            self._closed = True

    def _stop_children(self, error: BaseException | None) -> None:
        for mapping in self._open_maps():
            mapping.cut_off()
        if error is None or is_cut_of(error, self.token._cut):
            return
        if isinstance(error, KeyboardInterrupt):
            self.token.cancel("interrupted by the user", kind=CancelKind.INTERRUPTED)
        elif isinstance(error, GeneratorExit):
            self.token.cancel("the generator around the scope was closed", kind=CancelKind.SCOPE_ENDED)
        elif self._on_error == "cancel" or isinstance(error, INTERRUPTS):
            self.token.cancel("the body failed", kind=CancelKind.BODY_FAILED, cause=error)

    def _join_children(self, crew: Crew, ending: Ending) -> None:
        while not crew.close_if_idle():
            _wait_for_idle(crew, self.token, _earliest(self._next_look(), self._next_strike()))
            expire_if_due(self.token)
            if _is_due(self._next_look()) and not crew.idle():
                self._look_at_stragglers(crew, ending)
            if _is_due(self._next_strike()):
                self._strike(crew)
        for mapping in self._open_maps():
            self._cleaner().push(mapping.close_source, (), {})  # idempotent; it runs users' code, and may fail

    def _open_maps(self) -> list[ScopeMap[Any]]:
        return [mapping for link in self._maps if (mapping := link()) is not None]

    def _next_look(self) -> float | None:
        """When to look at stragglers: at the grace after the cancel, and at each doubling."""
        cut = self.token._cut
        return None if cut is None else cut.when + self._grace * 2**self._looks

    def _next_strike(self) -> float | None:
        """When to interrupt stragglers: at the grace after the cancel, and again and again after that."""
        cut = self.token._cut
        if cut is None or self._on_straggler != "interrupt":
            return None
        return float(cut.when + self._grace + beat_after(self._strikes))

    def _strike(self, crew: Crew) -> None:
        while _is_due(self._next_strike()):
            self._strikes += 1
        for task in crew.lingering():
            if task._window is not None:
                strike(task._window, task.token._cut)

    def _look_at_stragglers(self, crew: Crew, ending: Ending) -> None:
        while _is_due(self._next_look()):  # the cancel may be long ago: once for all the time that has passed
            self._looks += 1
        cut = self.token._cut
        waited = clock.now() - cut.when if cut is not None else 0.0
        self._stragglers = self._stragglers or {}
        for task in crew.lingering():
            label = crew.label(task)
            self._stragglers[label] = task.stack()
            events.emit(events.StragglerSeen(self.name, label, waited, self._stragglers[label]))
        if self._on_straggler == "abandon":
            self._abandon(crew, ending)

    def _abandon(self, crew: Crew, ending: Ending) -> None:
        stacks = crew.abandon()
        if not stacks or any(isinstance(failure.error, StragglersLeft) for failure in ending.failures):
            return
        which = ", ".join(stacks)
        left = StragglersLeft(f"scope {self.name!r} gave up waiting for {len(stacks)} of its children: {which}", stacks)
        ending.failures.append(Failure("stragglers", left))
        events.emit(events.Orphaned(self.name, stacks))

    def _interrupted(self, interrupt: BaseException, ending: Ending) -> None:
        """Ctrl-C while leaving: the first one cancels and leaving goes on, a second one gives the children up."""
        if ending.interrupt is None and not isinstance(ending.body, KeyboardInterrupt):
            ending.interrupt = interrupt
            by = "the user" if isinstance(interrupt, KeyboardInterrupt) else type(interrupt).__name__
            self.token.cancel(f"interrupted by {by}", kind=CancelKind.INTERRUPTED)
        else:
            ending.interrupt = ending.interrupt or interrupt
            self._abandon(self._children(), ending)

    def _fix(self, ending: Ending) -> None:
        """What is known now decides what the cleanups are told."""
        cut = self.token._cut
        ending.cut = cut
        ending.own = cut is not None and cut.origin() is self.token
        ending.cut_short = cut is not None and (cut_short(self.token) or is_cut_of(ending.body, cut))
        if self._crew is not None:
            known = {id(failure) for failure in ending.failures}
            ending.failures[:0] = [failure for failure in self._crew.failures if id(failure) not in known]

    def _clean_up(self, cleanups: CleanupStack, ending: Ending) -> None:
        errors = cleanups.run(_outcome_for_cleanups(ending), self._cleanup_timeout)
        known = {id(failure.error) for failure in ending.failures}
        for error in errors:
            if isinstance(error, INTERRUPTS):
                ending.interrupt = ending.interrupt or error
            elif id(error) not in known:
                ending.failures.append(Failure("cleanup", error))

    def _end(self, ending: Ending, verdict: Verdict) -> None:
        self._ended = clock.now()
        self._word = verdict.word
        self.cancelled_caught = verdict.absorbed
        if self._crew is not None and self._crew.orphans:
            self._report = self._make_report(ending, self._crew, verdict.word)  # now: they may end later
        retire(self.token)
        ambient.put_back(ambient.token_var, self._token, self._before[0])
        ambient.put_back(ambient.owner_var, self, self._before[1])
        self._before = None, None
        if events.wants(events.ScopeEnded):
            events.emit(events.ScopeEnded(self.name, self.report))

    # --- telling ------------------------------------------------------------------------------------------------

    @property
    def report(self) -> ScopeReport:
        """What happened; final when the scope has been left, of the moment before that."""
        if self._report is not None:
            return self._report
        word = self._word  # read once: the scope may end meanwhile
        report = self._make_report(self._ending or Ending(self.name), self._children(), word or "running")
        if word is not None:
            self._report = report
        return report

    def _make_report(self, ending: Ending, crew: Crew, word: str) -> ScopeReport:
        cut = self.token._cut
        errors = [failure.error for failure in ending.failures or crew.failures]
        if ending.body is not None and not is_cut_of(ending.body, cut):
            errors.insert(0, ending.body)
        return ScopeReport(
            name=self.name,
            outcome=word,
            reason=self.token.reason,
            tasks=crew.task_counts(),
            errors=tuple({id(error): error for error in errors}.values()),
            stragglers=dict(self._stragglers or {}),
            orphans=tuple(crew.given_up),
            interrupted=tuple(crew.interrupted),
            late_events=dict(crew.late_events),
            duration=(self._ended or clock.now()) - self._opened,
            stop_duration=None if cut is None else max(0.0, crew.last_end - cut.when),
            post_cancel_work=crew.late_work,
        )

    def snapshot(self) -> ScopeSnapshot:
        """Who lives in the scope at this moment."""
        now = clock.now()
        tasks = tuple(
            TaskSnapshot(task.name, task.kind, task.state, None if task._started is None else now - task._started)
            for task in self._children().lingering()
        )
        return ScopeSnapshot(self.name, self._state(), self.token.reason, self.token.remaining(), tasks)

    def _state(self) -> str:
        if self._token is None:
            return "new"
        if self._word is not None:
            return "ended"
        return "open" if self._ending is None else "leaving"

    def __repr__(self) -> str:
        return f"<ThreadScope {self.name}, {self._state()}>"

    def __del__(self) -> None:
        # Entered, never left (an interrupt can fall between the body and __exit__): its children must not run on
        # unnoticed.
        token = self._token
        if token is None or self._word is not None or _ending_interpreter() or self._pid != os.getpid():
            return
        message = f"{self!r} was dropped without being left; its children are cancelled"
        warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
        cancel = functools.partial(token.cancel, "the scope was dropped", kind=CancelKind.SCOPE_ENDED)
        workers.submit_from_finalizer(cancel)


def adopt(scope: ThreadScope, fn: Callable[[], T], name: str | None, kind: str) -> Task[T] | None:
    """A child that is not run by a thread of ours: whoever asked calls its ``work``, or its ``end_unstarted``.

    It does not count for ``max_threads``. None if the scope has ended.
    """
    crew = scope._children()
    task: Task[T] = Task(crew, fn, (), {}, name, kind)
    if not crew.adopt(task):
        return None
    if events.wants(events.TaskSpawned):
        events.emit(events.TaskSpawned(scope.name, task.name))
    return task


# --- the steps ----------------------------------------------------------------------------------------------------


def _failing_child_cancels(scope: ThreadScope) -> Callable[[Task[Any], BaseException], object]:
    """What a scope does when a child fails; holds the settings, not the scope."""
    on_error = scope._on_error

    def on_failure(task: Task[Any], error: BaseException) -> None:
        if on_error == "cancel":
            message = f"task {task.name} failed"
            cancel_because_of(task._crew.token, task.name, message, kind=CancelKind.SIBLING_FAILED, cause=error)

    return on_failure


def _wait_for_idle(crew: Crew, token: CancellationToken, until: float | None) -> None:
    """Block until nothing lives, ``token`` is cancelled (if it is not yet), or the monotonic time ``until``."""
    waiter = _primitives.Waiter()
    crew.add_joiner(waiter)
    watching = not token.cancelled
    try:
        if watching and not attach(token, waiter):
            return
        if not crew.idle():
            waiter.wait(None if until is None else until - clock.now())
    finally:
        if watching:
            detach(token, waiter)
        crew.remove_joiner(waiter)


def _outcome_for_cleanups(ending: Ending) -> BaseException | None:
    """What context managers get to see: also a cancel that the scope will absorb."""
    verdict = foresee(ending)
    if verdict.absorbed and ending.cut is not None:
        return ending.body if is_cut_of(ending.body, ending.cut) else ending.cut.as_error()
    return verdict.error


def _is_due(moment: float | None) -> bool:
    return moment is not None and clock.now() >= moment


def _earliest(*moments: float | None) -> float | None:
    return min((moment for moment in moments if moment is not None), default=None)


def _validate_grace(grace: object) -> float:
    seconds = clock.validate_timeout(grace, "grace")
    if not seconds:
        raise ValueError(f"grace must be more than 0 seconds and finite, not {grace!r}")
    return seconds


def _check_positive(name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an int or None, not {number!r}")
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, not {number!r}")


def _check_settings(name: object, token: object, max_threads: object, on_error: object, on_straggler: object) -> None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a str or None, not {name!r}")
    if token is not None and not isinstance(token, CancellationToken):
        raise TypeError(f"token must be a CancellationToken or None, not {token!r}")
    if max_threads is not None:
        _check_positive("max_threads", max_threads)
    if on_error not in ("cancel", "collect"):
        raise ValueError(f"on_error must be 'cancel' or 'collect', not {on_error!r}")
    if on_straggler not in ("wait", "abandon", "interrupt"):
        raise ValueError(f"on_straggler must be 'wait', 'abandon' or 'interrupt', not {on_straggler!r}")
