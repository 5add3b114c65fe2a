"""How a cancel travels: the tree behind the tokens, and the journey of one cancel through it.

::

    token.cancel()
        |  Tree.begin_locked     under the tree's lock: first reason wins; from here on the cancel cannot be lost
        v
    Cut.mark                     tree by tree, one lock at a time: set the flag of every descendant, and collect
        |                        what they have registered. No user code.
        v
    Cut.wake_all                 waiters and guards of the library: blocked calls come back. No lock held.
        |
        v
    Cut.call_all                 the users' callbacks, newest first, each at most once, all even if some raise;
                                 on the canceller's own thread, or on a worker if the canceller is a library thread

Parts: a `Tree` is one lock and what it guards, shared by a root and all its plain descendants. A linked token
is the root of a tree of its own and a structural child of each parent. A `Cut` is one cancel: its reason, and
what of it is still to do. A `Registration` is one callback.

States of a token: *live* (``_cut is None``) -> *cut* (``_cut`` set, for ever).
States of a registration: *armed* (in its token's ``regs``) -> *staged* (in ``cut.calls``) -> *called*;
from the first two also -> *closed*. The step to *called* or *closed* is one atomic ``dict.pop`` on ``once``.

Invariants
    1. ``_cut`` changes once, from None, under the lock of the token's tree. Reading it takes no lock.
    2. If a token is cut, all its descendants are cut or lie (or have an ancestor that lies) on the ``work``
       pile of a Cut which its tree lists in ``unfinished``.
    3. Children are linked weakly (parents strongly). A token with a registration is kept by ``tree.pinned``; a tree
       with pins is kept by the timer alarms of its tokens (``keeper``) and, if its root is linked, by the pins
       of the parents' trees.
    4. The ``work`` pile of a Cut is touched by the holder of the lock of the tree that its top belongs to, so
       that many may mark at a time; ``wakes`` and ``calls`` are added to on the way, and once ``work`` is empty
       touched by the holder of the ``baton`` only. Whoever finds an unfinished Cut with a free baton (its
       canceller was cut off by a KeyboardInterrupt) finishes it.
    5. Each step takes its work from a pile only after it is done, and may be done twice without harm. So an
       interrupt between any two lines loses nothing.

Lock order: baton > one tree lock > timer's or worker's lock (both leaves). Never two trees at a time: the walk
crosses trees by the ``work`` pile. Registrations' gates are taken with no lock held. No user code runs under
any of them but the gate and the baton, and nobody *waits* for a baton; waiting for a gate is
`Registration.close`, which does not wait where this thread itself runs a callback or is inside a locked
section. Hence no cycle of waiting threads.

Re-entry: an operation that arrives while this thread is inside the same tree's lock (a signal handler, a user's
finalizer) is put in ``inbox`` and done by the interrupted operation before it returns. So it is if this thread
is inside of any other section, and the tree's lock is held: then its holder does it (`Tree.busy_here` says why
that ends every circle). Whoever leaves a section looks into the inbox. Our own finalizers are C functions that
append to a list.

Fork: the child gets a fresh lock; registrations, waiters and callbacks of the parent process are dropped, flags stay.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from operator import attrgetter
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from tokenscope._core import _primitives, clock, events, timer, workers
from tokenscope._core._typing import override
from tokenscope._core.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import CodeType

    from tokenscope._core.reasons import CancelReason
    from tokenscope._core.token import CancellationToken

__all__ = ["Cut", "Extras", "Flock", "Registration", "Tree", "Wakeup"]


T = TypeVar("T")
_ref = weakref.ref  # each child makes one


class Wakeup(Protocol):
    """Something the library blocks on. Held weakly by its token; called by whoever cancels."""

    def wake(self) -> None:
        """Unblock the owner: quick, never blocking, never raising, taking leaf locks only."""


class Flock(Generic[T]):
    """Some objects, weakly: a token's children, or what is blocked on it. Under the tree's lock, but for the dead.

    Who dies takes itself out, at any time and on any thread: by ``set.discard``, one step in C, which takes no lock
    and runs no code of ours. Hence who wants to look at all of them looks at a copy (one step in C as well).

    Not a ``weakref.WeakSet``: that costs 1,100 bytes and runs Python code in finalizers.
    """

    __slots__ = ("bury", "refs")

    def __init__(self) -> None:
        self.refs: set[weakref.ref[T]] = set()
        self.bury = self.refs.discard

    def add_locked(self, member: T) -> None:
        self.refs.add(_ref(member, self.bury))

    def discard_locked(self, member: T) -> None:
        self.refs.discard(_ref(member))


class Extras:
    """What few tokens have: made with the first registration, waiter, deadline or boundary."""

    __slots__ = ("alarm", "caught", "entered", "hit", "own_deadline", "pid", "regs", "wakes")

    def __init__(self) -> None:
        self.pid = _primitives.getpid()
        self.regs: dict[int, Registration] = {}  # under the tree's lock
        self.wakes: Flock[Wakeup] | None = None  # under the tree's lock
        self.own_deadline: float | None = None  # set before the token is published
        self.alarm: timer.Alarm | None = None  # set before the token is published
        self.hit = False  # one-way: a Cancelled was raised at or below this token by the cut that it has
        self.caught = False  # one-way: as a boundary, the token absorbed its own cancel
        self.entered: list[tuple[int, object, object]] = []  # boundaries entered: thread, token set, token before


class Tree(_primitives.Room):
    """One lock, and what it guards beside the flags of its tokens."""

    __slots__ = ("__weakref__", "keeper", "links", "pinned", "unfinished")

    def __init__(self) -> None:
        super().__init__()
        self.unfinished: list[Cut] = []  # cancels that began in this tree and are not done
        self.pinned: set[CancellationToken] = set()  # tokens with registrations, and linked roots with pins below
        self.keeper: list[Tree] = []  # holds this tree while `pinned` is not empty; held by the alarms of its tokens
        self.links: tuple[weakref.ref[CancellationToken], ...] = ()  # the root, if it is linked: its parents pin it

    # --- what was put off ---------------------------------------------------------------------------------------

    @override
    def busy_here(self) -> bool:
        """Whether this thread must not wait for the lock: it is inside; or in another section, and the lock is held.

        The latter is a signal handler or a finalizer of the user's. If each of two threads waited for the lock
        that the other's interrupted section holds, they would wait for ever. The lock may be taken by another
        thread right after this look; a circle still cannot form: who holds a lock of the circle looked at the
        next one after it had got its own, so the last one to look has found it held. (`CancellationToken.child`
        does not look; a circle of nothing but finalizers that make children can.)
        """
        return super().busy_here() or (
            _primitives.is_held(self.lock) and self.pid == _primitives.getpid() and _inside_a_section()
        )

    @override
    def has_leftovers(self) -> bool:
        return bool(self.inbox or self.unfinished)

    @override
    def settle(self) -> None:
        """Do what re-entrant operations left, and finish what an interrupt cut off."""
        while True:
            super().settle()
            for cut in tuple(self.unfinished):
                if cut.baton.acquire(blocking=False): cut.finish_for_another()
            if self.unfinished and not self.busy_here():
                with self.enter(): self._sweep_locked()
            if self.busy_here() or not (self.inbox or any(cut.can_go_on() for cut in self.unfinished)):
                return  # else somebody came in the middle, or was in the way when this thread could not wait

    def _sweep_locked(self) -> None:
        self.unfinished[:] = [cut for cut in self.unfinished if not cut.finished]

    # --- operations ---------------------------------------------------------------------------------------------

    def begin_locked(self, token: CancellationToken, cut: Cut) -> None:
        """Cancel ``token`` unless it is cancelled already: the point where exactly one reason wins."""
        if token._cut is not None:
            return
        if cut not in self.unfinished:
            self.unfinished.append(cut)
        token._cut = cut

    def link_locked(self, parent: CancellationToken, token: CancellationToken) -> Callable[[], object] | None:
        """Make ``token`` a child of ``parent``; it is born cancelled if the parent is."""
        if parent._cut is None:
            if parent._down is None:
                parent._down = Flock()
            parent._down.add_locked(token)
        elif token._tree is not self:  # a linked token: its flag is under its own lock, so this comes after ours
            return functools.partial(parent._cut.bring_to, token)
        elif token._more is None and token._down is None:
            token._cut = token._cut or parent._cut
        else:  # its link was put off, and it has callbacks or children meanwhile: our `settle` tells them
            self.begin_locked(token, parent._cut.echo(token))
        return None

    def attach_locked(self, token: CancellationToken, wakeup: Wakeup) -> None:
        """Have ``wakeup`` woken by a cancel, unless the token is cut already."""
        if token._cut is None:
            extras = self.extras_locked(token)
            if extras.wakes is None:
                extras.wakes = Flock()
            extras.wakes.add_locked(wakeup)

    def become_boundary_locked(self, token: CancellationToken) -> None:
        """Make sure that the token has extras: as a boundary it must be able to learn that work was cut short."""
        self.extras_locked(token)

    def enter_locked(self, token: CancellationToken, entry: tuple[int, object, object]) -> None:
        """Remember that a thread entered the token as a boundary."""
        self.extras_locked(token).entered.append(entry)

    def detach_locked(self, token: CancellationToken, wakeup: Wakeup) -> None:
        """Forget a wake-up."""
        extras = token._more
        if extras is not None and extras.wakes is not None:
            extras.wakes.discard_locked(wakeup)

    def arm_locked(self, token: CancellationToken, registration: Registration) -> Callable[[], object] | None:
        """Register a callback; if the token is cut already, call it when the lock is free."""
        if token._cut is not None:
            return registration.run_late
        registration.armed = True  # first this, then look: a close that comes in between finds one or the other
        if registration.once:
            self.extras_locked(token).regs[registration.seq] = registration
            self.pin_locked(token)
        return None

    def disarm_locked(self, token: CancellationToken, registration: Registration) -> None:
        """Forget a callback."""
        extras = token._more
        if extras is not None:
            extras.regs.pop(registration.seq, None)
            if not extras.regs:
                self.unpin_locked(token)

    def extras_locked(self, token: CancellationToken) -> Extras:
        """The token's extras, emptied if they come from a parent process."""
        extras = token._more
        if extras is None:
            extras = token._more = Extras()
        elif extras.pid != self.pid:
            extras.regs.clear()
            extras.wakes = None
            extras.pid = self.pid
        return extras

    # --- the pins -----------------------------------------------------------------------------------------------

    def pin_locked(self, token: CancellationToken) -> None:
        """Keep ``token`` as long as any token of this tree is kept."""
        self.pinned.add(token)
        self.keeper[:] = (self,)

    def unpin_locked(self, token: CancellationToken) -> None:
        """The opposite of `pin_locked`."""
        self.pinned.discard(token)
        if not self.pinned:
            self.keeper.clear()

    def pass_pins_on(self) -> None:
        """Have the trees above a linked root keep it while it has pins, and not longer. No lock is held.

        Called after every change between some pins and none. Two changes at a time both call; whoever comes last to
        a parent's tree reads a state no older than both.
        """
        pass_pins_on([self])

    def sync_pin_locked(self, root: CancellationToken, pile: list[Tree], seen: set[Tree]) -> None:
        """Pin or unpin a linked child here; put this tree on the ``pile`` if its own parents may have to know."""
        had_pins = bool(self.pinned)
        if root._tree.pinned:
            self.pin_locked(root)
        else:
            self.unpin_locked(root)
        # Without pins also where nothing changed: an unpinning that an interrupt cut off can then be repeated.
        if self.links and (had_pins != bool(self.pinned) or not (self.pinned or self in seen)):
            pile.append(self)
            seen.add(self)

    # --- marking ------------------------------------------------------------------------------------------------

    def mark_locked(self, cut: Cut) -> None:
        """Mark what lies on top of the pile, as far as it belongs to this tree."""
        work = cut.work
        if cut not in self.unfinished:
            self.unfinished.append(cut)  # it came from another tree; here, too, whoever comes next can finish it
        if self.links:
            cut.touched.append(self)  # before it loses its pins: an interrupt must not lose sight of them
        while (top := work[-1:]) and top[0]._tree is self:
            token = top[0]
            if token._cut is None:
                token._cut = cut
            # One assignment takes the token off and puts its children on: an interrupt falls before or after it.
            work[-1:] = self._descend_locked(token, cut) if token._cut is cut and token not in cut.crossed else ()
            if isinstance(token._up, tuple):
                cut.crossed.add(token)  # there may be many ways to a linked token

    def _descend_locked(self, token: CancellationToken, cut: Cut) -> list[CancellationToken]:
        """Stage what the token has registered, mark its plain children, return those that need a visit."""
        if token._more is not None:
            self._stage_locked(token, token._more, cut)
        visits: list[CancellationToken] = []
        if token._down is None:
            return visits
        for link in token._down.refs.copy():
            child = link()
            if child is None:
                continue
            if child._tree is not self:
                visits.append(child)
            elif child._cut is None or child._cut is cut:
                child._cut = cut
                if child._more is not None or child._down is not None:
                    visits.append(child)
        return visits

    def _stage_locked(self, token: CancellationToken, extras: Extras, cut: Cut) -> None:
        if extras.alarm is not None:
            extras.alarm.call_off()
        if extras.pid != self.pid:
            return  # registered in a parent process
        if extras.wakes is not None:
            cut.wakes += extras.wakes.refs.copy()
            extras.wakes = None
        if extras.regs:
            cut.calls += extras.regs.values()  # an interrupt below stages them twice; each still has but one call
            self.unpin_locked(token)
            extras.regs.clear()

    @override
    def _after_fork_locked(self) -> None:
        self.pinned.clear()
        self.keeper.clear()
        for cut in self.unfinished:
            cut.drop_parents_business()


class Cut:
    """One cancel: what was said, where, and what of it is still to be done."""

    __slots__ = (
        "baton",
        "by_library",
        "calls",
        "crossed",
        "finished",
        "origin",
        "origin_name",
        "reason",
        "touched",
        "wakes",
        "when",
        "work",
    )

    def __init__(self, token: CancellationToken, reason: CancelReason, *, by_library: bool) -> None:
        self.reason = reason
        self.origin = weakref.ref(token)
        self.origin_name = token.name
        self.when = clock.now()
        self.by_library = by_library  # a library thread cancels: user callbacks go to a worker
        self.finished = False  # one-way; set by the holder of the baton
        self.baton = _primitives.Lock()
        self.work: list[CancellationToken] = [token]
        self.crossed: set[CancellationToken] = set()  # linked tokens that were visited
        self.touched: list[Tree] = []  # the linked trees it came to, whose pins in the trees above may be void now
        self.wakes: list[weakref.ref[Wakeup]] = []
        self.calls: list[Registration] = []

    def is_same(self, other: Cut | None) -> bool:
        """Whether both tell of the same cancel (one may be the echo of the other)."""
        return other is not None and other.reason is self.reason

    def as_error(self) -> Cancelled:
        """The exception that tells of this cancel."""
        error = Cancelled(self.reason, self.origin_name)
        error._cut = self
        return error

    def echo(self, token: CancellationToken) -> Cut:
        """This cancel as it has to begin once more at ``token``, which became a child of a cancelled token late."""
        echo = Cut(token, self.reason, by_library=self.by_library)
        echo.origin, echo.origin_name, echo.when = self.origin, self.origin_name, self.when
        return echo

    def bring_to(self, token: CancellationToken) -> None:
        """Cancel ``token``, of another tree, with the same words."""
        self.echo(token).start(token)

    def start(self, token: CancellationToken) -> bool:
        """Cancel ``token`` for this reason; True if this one won. Returns when callbacks on this thread have run."""
        tree = token._tree
        try:
            with self.baton: return self._start(token)
        finally:
            if tree.inbox or tree.unfinished:
                tree.settle()

    def _start(self, token: CancellationToken) -> bool:
        tree = token._tree
        if tree.busy_here():
            # A signal handler in the middle of a section of this very tree. The outer operation does it all.
            tree.inbox.append(functools.partial(tree.begin_locked, token, self))
            return False
        with tree.enter(): tree.begin_locked(token, self)
        if token._cut is not self:
            return False
        self.carry_out()
        return True

    def can_go_on(self) -> bool:
        """Whether it is unfinished, nobody is at it, and nothing is in the way of this thread."""
        if self.finished or self.baton.locked():
            return False
        return not any(token._tree.busy_here() for token in self.work[-1:])

    def finish_for_another(self) -> None:
        """Carry out what somebody else could not; the caller has just acquired the baton."""
        try:
            self.carry_out()
        finally:
            self.baton.release()

    def carry_out(self) -> None:
        """Do what is left. An interrupt from outside is kept until the rest is done."""
        interrupt: BaseException | None = None
        for _attempt in range(8):  # bounded, or a tracer that always raises would keep us here for ever
            try:
                interrupt = self._advance() or interrupt
                break
            except BaseException as error:  # a KeyboardInterrupt between two lines of ours
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _advance(self) -> BaseException | None:
        if self.finished or not self.mark():
            return None  # not finished: put off; the operation that this thread interrupted will do the rest
        self.wake_all()
        self.release_pins()
        interrupt = self.call_all()
        self.finished = True
        if events.wants(events.TokenCancelled):
            events.emit(events.TokenCancelled(self.origin_name, self.reason))
        return interrupt

    def mark(self) -> bool:
        """Mark all descendants, crossing trees; False if one of them is busy on this very thread. Anybody may help."""
        while top := self.work[-1:]:
            tree = top[0]._tree
            if tree.busy_here():
                tree.inbox.append(functools.partial(self._resume_later, tree))
                if tree.busy_here():
                    return False
            with tree.enter(): tree.mark_locked(self)
            if tree.inbox:
                tree.settle()  # a signal handler came in between; nobody else would look into this tree
        self.crossed.clear()
        return True

    def _resume_later(self, tree: Tree) -> None:
        """In the inbox of a tree that was busy: let its `settle` find this cut."""
        if self not in tree.unfinished:
            tree.unfinished.append(self)

    def wake_all(self) -> None:
        """Wake the library's own waiters and guards."""
        wakes = self.wakes
        while wakes:
            _wake(wakes[-1])
            wakes.pop()

    def release_pins(self) -> None:
        """Have the trees above the linked ones let go of what has no callbacks any more."""
        pass_pins_on(self.touched)
        self.touched.clear()

    def call_all(self) -> BaseException | None:
        """Run the users' callbacks, newest first, or have a worker run them. Returns an interrupt to re-raise."""
        if not self.calls:
            return None
        self.calls.sort(key=attrgetter("seq"))
        if self.by_library and self._hand_over():
            return None
        return run_newest_first(self.calls)

    def _hand_over(self) -> bool:
        try:
            # A copy: an interrupt below hands them over twice, and two workers must not share one pile.
            workers.submit(functools.partial(run_newest_first, list(self.calls)))
        except RuntimeError as error:
            # Late is better than never: the library's thread runs them itself.
            events.emit(events.ThreadFailed("cancel callbacks", error))
            return False
        self.calls = []
        return True

    def drop_parents_business(self) -> None:
        """In a forked child: keep marking, forget waiters and callbacks of the parent process."""
        self.baton = _primitives.Lock()
        self.wakes.clear()
        self.calls.clear()


class Registration:
    """One callback on one token. A context manager: leaving it closes it.

    Thread-safe. Get one from `CancellationToken.on_cancel`.
    """

    __slots__ = ("armed", "blocking", "gate", "name", "once", "pid", "seq", "token")

    def __init__(self, token: CancellationToken, call: Callable[[], object], name: str, *, blocking: bool) -> None:
        self.token = token
        self.seq = next(_sequence)
        self.name = name
        self.blocking = blocking
        self.armed = False
        self.pid = _primitives.getpid()
        self.gate = _primitives.Lock()  # held while the callback runs; nothing else
        # Who pops the call, calls it or closes it: exactly one does (`dict.pop` is atomic).
        self.once: dict[None, Callable[[], object]] = {None: call}

    def __repr__(self) -> str:
        state = "waiting" if self.once else "running" if self.gate.locked() else "ended"
        return f"<Registration of {self.name} on {self.token.name}, {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, wait: bool = True) -> bool:
        """End the registration: when this returns, the callback is not running and will not run.

        If it is running on another thread, this waits for it, however long that takes; pass ``wait=False``
        where the caller holds a lock that the callback may want. It never waits where that could be for ever:
        on a thread that itself runs a cancel callback, or in a signal handler that interrupted the library.

        Returns:
            True if the callback has not run and never will; False if it was called (or is running now).
        """
        in_time = self.once.pop(None, None) is not None
        if self.armed:
            self._forget()
        if not in_time and wait and self._runs_elsewhere():
            with self.gate: pass
        return in_time

    def _runs_elsewhere(self) -> bool:
        """Whether the callback runs on a thread that can be waited for (a fork leaves such threads behind)."""
        return self.gate.locked() and self.pid == _primitives.getpid() and not _must_not_wait()

    def _forget(self) -> None:
        tree = self.token._tree
        tree.run(tree.disarm_locked, self.token, self)
        if tree.links and not tree.pinned:
            tree.pass_pins_on()
        self.armed = False  # only now: a close that an interrupt cut off can be repeated

    def run(self) -> BaseException | None:
        """Call it, unless it was called or closed. Errors are told, interrupts are returned."""
        if not self.once:
            return None  # and no waiting at the gate for one that runs elsewhere
        if self.blocking:
            return self._run_on_worker()
        return self.run_here()

    def run_late(self) -> None:
        """Call it because the token was cancelled before it came."""
        interrupt = self.run()
        if interrupt is not None:
            raise interrupt

    def _run_on_worker(self) -> BaseException | None:
        try:
            workers.submit(self.run_here)
        except RuntimeError as error:
            events.emit(events.ThreadFailed(f"cancel callback {self.name}", error))
            return self.run_here()
        return None

    def run_here(self) -> BaseException | None:
        """Call it on this thread."""
        try:
            with self.gate: self.once.pop(None, _nothing)()
        except (KeyboardInterrupt, SystemExit) as error:
            if self.once:
                raise  # it struck before the call: whoever runs the batch will try again
            return error
        except BaseException as error:  # never raised into the canceller
            events.emit(events.CallbackFailed(f"cancel callback {self.name} of {self.token.name}", error))
        return None


_sequence = itertools.count()  # orders callbacks; two equal numbers would do no harm


def run_newest_first(calls: list[Registration]) -> BaseException | None:
    """Run the callbacks from the end of the list; each is taken off when it is done."""
    interrupt: BaseException | None = None
    while calls:
        interrupt = calls[-1].run() or interrupt
        calls.pop()
    return interrupt


def _nothing() -> None:
    """In place of a callback that was called or closed already."""


def _wake(link: weakref.ref[Wakeup]) -> None:
    wakeup = link()
    if wakeup is not None:
        try:
            wakeup.wake()
        except Exception as error:  # a defect of ours, but the others must still be woken
            events.emit(events.CallbackFailed(f"wake-up of {wakeup!r}", error))


def pass_pins_on(pile: list[Tree]) -> None:
    """Pin or unpin the linked roots of these trees in their parents' trees, and so on upwards. No lock is held."""
    seen: set[Tree] = set()
    for tree in pile:  # it grows on the way
        for root in _alive(tree.links):
            for parent in root._parents():
                parent._tree.run(parent._tree.sync_pin_locked, root, pile, seen)


def _alive(links: Iterable[weakref.ref[CancellationToken]]) -> list[CancellationToken]:
    return [token for link in links if (token := link()) is not None]


_RUNS_CALLBACKS: CodeType = Registration.run_here.__code__


def _must_not_wait() -> bool:
    """Whether this thread runs a cancel callback or is inside a locked section."""
    return any(frame.f_code is _RUNS_CALLBACKS or _primitives.is_section(frame) for frame in _primitives.stack_here())


def _inside_a_section() -> bool:
    return any(_primitives.is_section(frame) for frame in _primitives.stack_here())
