"""A deterministic scheduler: the core's locks, queues, threads and clock, with every switch of threads decided here.

Each actor is a real thread, but only one runs at a time: it hands a baton on, and only at a *pause*: before a lock is
taken, after it was released, at a queue, when a thread starts, and on request at every line of the core. Which actor
goes on is a strategy's choice, so a run is a list of choices, and can be repeated:

* `Exhaustive` tries all schedules with at most so many preemptions, depth first;
* `Random` flips seeded coins.

Time is virtual. It passes when nobody can run, or when the strategy lets a waiting actor's time run out. A schedule in
which the test's own actors can never go on is reported as a `Deadlock`. ``inject`` runs something in the middle of an
actor, as a signal handler or a finalizer would, or raises a KeyboardInterrupt there.
"""

from __future__ import annotations

import gc
import queue
import random
import sys
import threading
import traceback
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tokenscope._core import _primitives, clock, timer, workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CORE = str(Path(_primitives.__file__).parent)
#: Where a run with ``lines`` pauses at every line.
LINES = (CORE, str(Path(CORE).parent / "sync"))
#: Real seconds for one schedule; only a defect of the scheduler, or a real lock that got in, waits so long.
PATIENCE = 20.0
#: Waiting for longer than this (virtual) is idling: nobody lets that time run out on purpose.
IDLING = 5.0


class Deadlock(AssertionError):
    """Nobody can go on, and not everybody has ended."""


class Stop(BaseException):
    """Ends the actors that are left when a run is over."""


@dataclass(eq=False)
class Actor:
    """A thread that runs when it holds the baton."""

    name: str
    fn: Callable[[], Any]
    ours: bool  # a thread of the test, not one that the library started
    baton: Any = field(default_factory=threading.Lock)
    ready: Callable[[], bool] | None = None  # what it waits for; None: nothing
    until: float | None = None  # how long it waits at most
    done: bool = False
    error: BaseException | None = None
    pauses: int = 0
    thread: Any = None

    def can_run(self) -> bool:
        return not self.done and (self.ready is None or self.ready())

    def stack(self) -> str:
        frame = sys._current_frames().get(self.thread.ident)
        return f"--- {self.name}\n" + "".join(traceback.format_stack(frame)[-8:] if frame else [])


# --- strategies ----------------------------------------------------------------------------------------------------


class Replay:
    """Makes given choices, then always the first."""

    def __init__(self, choices: list[int] | None = None) -> None:
        self.given = choices or []
        self.choices: list[int] = []
        self.fresh = True

    def begin(self) -> bool:
        """Get ready for one more run; False if there are no more schedules."""
        fresh, self.fresh = self.fresh, False
        self.choices = []
        return fresh

    def choose(self, options: int, *, preempts: bool) -> int:
        at = len(self.choices)
        self.choices.append(min(self.pick(at, options, preempts), options - 1))
        return self.choices[-1]

    def pick(self, at: int, options: int, preempts: bool) -> int:
        return self.given[at] if at < len(self.given) else 0


class Random(Replay):
    """So many runs, in which an actor is preempted with a seeded probability."""

    def __init__(self, runs: int, *, seed: int = 1, preempt: float = 0.2) -> None:
        super().__init__()
        self.seeds = iter(range(seed, seed + runs))
        self.preempt = preempt

    def begin(self) -> bool:
        self.choices = []
        seed = next(self.seeds, None)
        self.coins = random.Random(seed)
        return seed is not None

    def pick(self, at: int, options: int, preempts: bool) -> int:
        if preempts and self.coins.random() > self.preempt:
            return 0
        return self.coins.randrange(options)


class Exhaustive(Replay):
    """Every schedule with at most ``bound`` preemptions, but no more than ``limit`` of them."""

    def __init__(self, bound: int = 2, limit: int = 3_000) -> None:
        super().__init__()
        self.bound, self.limit = bound, limit
        self.runs = 0
        self.path: list[tuple[int, int]] = []  # the choice made, and how many there were

    def begin(self) -> bool:
        self.choices, self.left = [], self.bound
        if self.runs:
            while self.path and self.path[-1][0] + 1 >= self.path[-1][1]:
                self.path.pop()
            if not self.path or self.runs >= self.limit:
                return False
            self.path[-1] = (self.path[-1][0] + 1, self.path[-1][1])
        self.runs += 1
        return True

    def pick(self, at: int, options: int, preempts: bool) -> int:
        if at == len(self.path):
            self.path.append((0, options if self.left or not preempts else 1))
        choice = self.path[at][0]
        if preempts and choice:
            self.left -= 1
        return choice


# --- one run -------------------------------------------------------------------------------------------------------


class Scheduler:
    """One run of some actors under one strategy."""

    def __init__(self, strategy: Replay, *, lines: bool = False, inject: Sequence[Inject] = ()) -> None:
        self.strategy = strategy
        self.lines = lines
        self.inject = inject
        self.time = 1_000.0
        self.actors: list[Actor] = []
        self.here = threading.local()
        self.over = threading.Event()
        self.stopping = False
        self.failure: BaseException | None = None

    def now(self) -> float:
        return self.time

    # The baton.

    def me(self) -> Actor | None:
        return getattr(self.here, "actor", None)

    def pause(self) -> None:
        """A point where another actor may go on, or something be injected."""
        me = self.me()
        if me is None:
            return
        self.stop_if_over()
        me.pauses += 1
        for injection in self.inject:
            injection.at_pause(me)
        self.hand_over(me)

    def block(self, ready: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until ``ready()``; False if the time was up first."""
        me = self.me()
        if ready():
            return True
        if me is None:
            raise Deadlock("still held when all actors have ended")
        me.ready = ready
        me.until = None if timeout is None else self.time + timeout
        self.hand_over(me)
        me.ready = me.until = None
        return ready()

    def hand_over(self, me: Actor) -> None:
        after = self.next_actor(me)
        if after is me:
            return
        if after is None:
            self.over.set()
        else:
            after.baton.release()
        if not me.done:
            me.baton.acquire()
            self.stop_if_over()

    def stop_if_over(self) -> None:
        if self.stopping:
            raise Stop

    def next_actor(self, me: Actor) -> Actor | None:
        """Who goes on; None if the run is over."""
        able = [a for a in self.actors if a.can_run()]
        waiting = [a for a in self.actors if not a.done and a not in able and a.until is not None]
        options = [a for a in able if a is me] + [a for a in able if a is not me]
        options += [a for a in waiting if a.until is not None and a.until - self.time <= IDLING]
        if not options:
            if all(a.done for a in self.actors if a.ours):
                return None
            options = sorted(waiting, key=lambda a: a.until or 0.0)[:1]
        if not options:
            self.failure = Deadlock("".join(a.stack() for a in self.actors if not a.done))
            return None
        choice = 0 if len(options) == 1 else self.strategy.choose(len(options), preempts=options[0] is me)
        chosen = options[choice]
        if chosen not in able:
            self.time = max(self.time, chosen.until or 0.0)
        return chosen

    # The actors.

    def start(self, fn: Callable[[], Any], name: str, *, ours: bool = False) -> Actor:
        actor = Actor(name, fn, ours)
        actor.baton.acquire()
        actor.thread = threading.Thread(target=self.live, args=(actor,), name=name, daemon=True)
        self.actors.append(actor)
        actor.thread.start()
        return actor

    def live(self, me: Actor) -> None:
        self.here.actor = me
        me.baton.acquire()
        try:
            if self.lines and not self.stopping:
                sys.settrace(self.trace)
            me.fn()
        except Stop:
            pass
        except BaseException as error:
            me.error = error
        finally:
            sys.settrace(None)
            me.done = True
            if not self.stopping:
                self.hand_over(me)

    def trace(self, frame: Any, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(LINES):
            return None
        if event == "line":
            self.pause()
        return self.trace

    def run(self, *fns: Callable[[], Any]) -> None:
        """Run the functions as actors, to the end of them and of what they have set off."""
        for number, fn in enumerate(fns):
            self.start(fn, f"actor {number}", ours=True)
        starter = Actor("starter", int, ours=False, done=True)
        self.hand_over(starter)
        if not self.over.wait(PATIENCE):
            raise RuntimeError("a real lock? " + "".join(a.stack() for a in self.actors if not a.done))
        self.stop_all()
        for actor in self.actors:
            if actor.error is not None and (actor.ours or not self.failure):
                raise actor.error
        if self.failure is not None:
            raise self.failure

    def stop_all(self) -> None:
        self.stopping = True
        for actor in self.actors:
            if not actor.done:
                actor.baton.release()
            actor.thread.join(PATIENCE)
            assert not actor.thread.is_alive(), actor.stack()

    # The world.

    @contextmanager
    def world(self) -> Iterator[None]:
        """The core, with this scheduler's primitives in place of the real ones."""

        def start_thread(target: Callable[[], object], name: str) -> Any:
            actor = self.start(target, name)
            self.pause()
            return actor.thread

        def is_held(lock: Any) -> bool:
            return lock.locked()

        def start_raw_thread(target: Callable[[Any], object], argument: object) -> None:
            start_thread(lambda: target(argument), "raw")

        patches = {"Lock": lambda: Lock(self), "RLock": lambda: RLock(self), "SimpleQueue": lambda: SimpleQueue(self)}
        patches |= {"is_held": is_held, "start_thread": start_thread, "start_raw_thread": start_raw_thread}
        with mock.patch.multiple(_primitives, **patches), still_gc():
            crew = workers.Workers()
            with (
                mock.patch.object(clock, "now", self.now),
                mock.patch.object(timer, "timer", timer.Timer()),
                mock.patch.multiple(workers, workers=crew, submit=crew.submit),
                fresh_rooms(),
            ):
                yield


@contextmanager
def fresh_rooms() -> Iterator[None]:
    """Make the rooms anew that modules of the core hold for the whole process."""
    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            for attribute, value in list(vars(module).items()) if name.startswith("tokenscope._core.") else ():
                if type(value) is _primitives.Room:
                    patches.enter_context(mock.patch.object(module, attribute, _primitives.Room()))
        yield


@contextmanager
def still_gc() -> Iterator[None]:
    """No collection comes in between and makes a run unrepeatable."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass
class Inject:
    """Do ``action()`` at the n-th pause of an actor, in its thread; it may raise."""

    actor: str
    at: int
    action: Callable[[], object]
    done: bool = False

    def at_pause(self, me: Actor) -> None:
        if me.name == self.actor and me.pauses >= self.at and not self.done:
            self.done = True
            self.action()


# --- the primitives ------------------------------------------------------------------------------------------------


class Lock:
    """In place of ``threading.Lock``."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.owner: object | None = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self.scheduler.pause()
        limit = 0.0 if not blocking else None if timeout < 0 else timeout
        if self.owner is not None and (limit == 0.0 or not self.scheduler.block(lambda: self.owner is None, limit)):
            return False
        self.owner = self.scheduler.me() or self
        return True

    def release(self) -> None:
        if self.owner is None:
            raise RuntimeError("release unlocked lock")
        self.owner = None
        if not self.scheduler.stopping:
            self.scheduler.pause()

    def locked(self) -> bool:
        return self.owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RLock(Lock):
    """In place of ``threading.RLock``."""

    count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not self._is_owned() and not super().acquire(blocking, timeout):
            return False
        self.count += 1
        return True

    def release(self) -> None:
        if not self._is_owned():
            raise RuntimeError("cannot release un-acquired lock")
        self.count -= 1
        if not self.count:
            super().release()

    def _is_owned(self) -> bool:
        return self.owner is not None and self.owner is (self.scheduler.me() or self)


class SimpleQueue:
    """In place of ``queue.SimpleQueue``."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self.items.append(item)
        self.scheduler.pause()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self.scheduler.pause()
        if not self.items and not (block and self.scheduler.block(lambda: bool(self.items), timeout)):
            raise queue.Empty
        return self.items.popleft()

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self.items

    def qsize(self) -> int:
        return len(self.items)


# --- many runs -----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of trying many schedules."""

    runs: int
    error: BaseException | None = None
    choices: list[int] = field(default_factory=list)


def explore(
    scenario: Callable[[], tuple[list[Callable[[], Any]], Callable[[], object]]],
    strategy: Replay,
    *,
    lines: bool = False,
    inject: Callable[[], Sequence[Inject]] = tuple,
) -> Outcome:
    """Run a scenario (it makes the actors' functions, and the check) until a schedule fails or none is left."""
    runs = 0
    while strategy.begin():
        runs += 1
        scheduler = Scheduler(strategy, lines=lines, inject=inject())
        try:
            with scheduler.world():
                fns, check = scenario()
                scheduler.run(*fns)
                check()
        except Exception as error:
            return Outcome(runs, error, list(strategy.choices))
    return Outcome(runs)


def assert_safe(scenario: Any, strategy: Replay, **how: Any) -> int:
    """No schedule fails; how many there were."""
    outcome = explore(scenario, strategy, **how)
    if outcome.error is not None:
        outcome.error.add_note(f"schedule {outcome.runs}, to be repeated with Replay({outcome.choices})")
        raise outcome.error
    return outcome.runs
