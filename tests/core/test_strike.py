"""Interrupting stragglers: `on_straggler="interrupt"`, by each way that this interpreter has."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from peers.attempts import Attempt, wait_until

from tokenscope import Cancelled, DeadlineExceeded, ThreadScope, check, observe, shield, sleep
from tokenscope._core import injection, monitoring, strike
from tokenscope._core.current import uninterruptible
from tokenscope._core.token import CancellationToken
from tokenscope._core.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenscope._core.task import Task

#: How many races are run against the end of a function; 5,000 in a long run.
RACES = int(os.environ.get("TOKENSCOPE_RACES", "200"))
GRACE = 0.01


@pytest.fixture(params=["monitoring", "injection"])
def way(request, monkeypatch):
    """Interrupt by one way only."""
    if request.param == "monitoring" and not monitoring.available():
        pytest.skip("sys.monitoring is of Python 3.12")
    if request.param == "injection":
        monkeypatch.setattr(monitoring, "available", lambda: False)
    return request.param


def interruptible(**settings: Any) -> ThreadScope:
    """A scope that interrupts soon."""
    return ThreadScope(on_straggler="interrupt", grace=GRACE, **settings)


@contextmanager
def seen(kind: type[observe.Event]) -> Iterator[list[Any]]:
    """The events of a kind that come by."""
    found: list[Any] = []
    end = observe.subscribe(found.append, kind)
    try:
        yield found
    finally:
        end()


def cancel_while_it_runs(scope: ThreadScope, fn: Callable[..., Any], *args: Any, name: str | None = None) -> Task[Any]:
    """Spawn, wait for the start of the function, cancel the scope."""
    started = threading.Event()
    task = scope.spawn(lambda: (started.set(), fn(*args))[1], name=name)
    assert started.wait(10)
    scope.cancel()
    return task


def spin(rounds: int = 10_000) -> None:
    """Compute for about a millisecond."""
    for _ in range(rounds):
        pass


# --- what computes for ever -----------------------------------------------------------------------------------------


def jumps_back() -> None:
    """An empty loop: one instruction."""
    while True:
        pass


def calls_itself(number: int = 80) -> int:
    """No loop at all; it would end in a few hundred years."""
    return number if number < 2 else calls_itself(number - 1) + calls_itself(number - 2)


def _numbers() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def draws_from_a_generator() -> None:
    """Two frames that take turns."""
    for _ in _numbers():
        pass


def sums_in_c() -> int:
    """The loop is in C, and calls Python code again and again."""
    return sum(number for number in _numbers())


def moves_on() -> None:
    """Where it stands when it is looked at, it does not stay."""
    for _ in range(50):
        spin(1000)
    jumps_back()


def catches_what_it_may() -> None:
    """As careless code does: it goes on whatever happens."""
    while True:
        with contextlib.suppress(Exception):
            spin(100)


_LONG: dict[str, Any] = {}
exec("def has_a_long_loop():\n    x = 0\n    while True:\n" + "        x += 1\n" * 5000, _LONG)


@pytest.mark.parametrize(
    "compute",
    [
        jumps_back,
        calls_itself,
        draws_from_a_generator,
        sums_in_c,
        moves_on,
        catches_what_it_may,
        _LONG["has_a_long_loop"],  # the jump's distance takes more than one byte
    ],
    ids=lambda compute: compute.__name__,
)
def test_what_computes_for_ever_is_interrupted_once(way, compute):
    """Its `finally` runs, the scope absorbs its own cancel, and report and event tell of it."""
    started, cleaned = threading.Event(), []

    def child() -> None:
        try:
            started.set()
            compute()
        finally:
            cleaned.append(1)

    with seen(observe.TaskInterrupted) as told, interruptible(name="s") as scope:
        task = scope.spawn(child, name="deaf")
        started.wait(10)
        scope.cancel()
    assert cleaned == [1]
    assert task.cancelled()
    assert scope.cancelled_caught
    assert scope.report.outcome == "cancelled"
    assert scope.report.interrupted == ("deaf",)
    assert scope.report.as_dict()["interrupted"] == ["deaf"]
    assert "deaf" in scope.report.stragglers
    assert told == [observe.TaskInterrupted("s", "deaf", 0)]


def test_a_deadline_interrupts_as_well(way):
    """The scope's own time is up: `DeadlineExceeded`, and the exception in the child tells of the deadline."""
    met = []

    def child() -> None:
        try:
            jumps_back()
        except Cancelled as error:
            met.append(error)
            raise

    with pytest.raises(DeadlineExceeded), interruptible(timeout=0.02) as scope:
        scope.spawn(child)
    assert [error.reason for error in met] == [scope.token.reason]
    assert pickle.loads(pickle.dumps(met[0])).reason.kind == "deadline"  # our own


def test_a_child_that_obeys_is_not_interrupted(way):
    """The ladder's first rung comes first: checkpoints have until the grace is over."""
    with interruptible() as scope:
        cancel_while_it_runs(scope, sleep, 60)
    assert scope.report.interrupted == ()


def test_without_the_setting_nobody_is_interrupted(way):
    """It is asked for, or it does not happen; the scope of a child does not inherit it."""
    stop = threading.Event()
    reports: list[Any] = []

    def child(inside: threading.Event) -> None:
        with ThreadScope(grace=GRACE) as inner:
            inner.defer(lambda: reports.append(inner.report))
            inner.spawn(lambda: (inside.set(), [spin(10) for _ in iter(stop.is_set, True)]), name="grandchild")

    with seen(observe.StragglerSeen) as told, interruptible() as scope:
        inside = threading.Event()
        scope.spawn(child, inside, name="child")
        assert inside.wait(10)
        helper = Attempt(lambda: (wait_until(lambda: len({event.task for event in told}) == 2), stop.set()))
        scope.cancel()
    helper.value()
    assert reports[0].interrupted == ()
    assert reports[0].stragglers.keys() == {"grandchild"}


def test_another_scope_in_the_same_function_goes_on(way):
    """Events are on for the function, not for the thread; only the one that is meant hears them."""
    stop, started = threading.Event(), threading.Barrier(3)

    def both(end: Callable[[], bool]) -> int:
        started.wait(10)
        rounds = 0
        while not end():
            rounds += 1
        return rounds

    with ThreadScope() as innocent:
        other = innocent.spawn(both, stop.is_set)
        with interruptible() as scope:
            scope.spawn(both, bool)
            started.wait(10)
            scope.cancel()
        stop.set()
    assert other.result() > 0
    assert len(scope.report.interrupted) == 1


# --- exactly once, and never outside --------------------------------------------------------------------------------


class Races:
    """One thread runs functions of random length in windows; another one interrupts at random moments."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.interrupted = self.finished = self.failed = 0
        self.stray: list[str] = []
        self._window: Window | None = None
        self._over = False
        root = CancellationToken()
        root.cancel()
        self._cut = root._cut

    def run(self) -> None:
        """All rounds."""
        striker = threading.Thread(target=self._strike)
        striker.start()
        try:
            for number in range(self.rounds):
                self._round(number)
        finally:
            self._over = True
            striker.join()

    def _strike(self) -> None:
        chance = random.Random(1)
        while not self._over:
            spin(chance.randrange(5000))
            window = self._window
            if window is not None:
                strike.strike(window, self._cut)

    def _round(self, number: int) -> None:
        window = Window()
        try:
            self._window = window
            self._outcome(window, number)
            for _ in range(20):  # whatever comes now has strayed
                spin(5)
        except BaseException as error:  # it is what is looked for
            self.stray.append(f"{number}: {error!r}")

    def _outcome(self, window: Window, number: int) -> None:
        try:
            self._call(window, number)
        except Cancelled:
            self.interrupted += 1
            assert window.landed == 1
        except ZeroDivisionError:
            self.failed += 1
            assert window.landed == 0
        else:
            self.finished += 1
            assert window.landed == 0

    def _call(self, window: Window, number: int) -> None:
        chance = random.Random(number)
        window.call(_work, (chance.randrange(20_000), number % 3), {})


def _work(length: int, kind: int) -> None:
    if kind == 0:
        spin(length)
    elif kind == 1:
        try:
            spin(length)
        finally:
            spin(20)
    else:
        spin(length)
        raise ZeroDivisionError


def test_races_against_the_end_of_the_function(way):
    """Each function is interrupted once, or ends as it would have; nothing is raised behind it."""
    races = Races(RACES)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        races.run()
    finally:
        sys.setswitchinterval(interval)
    assert races.stray == []
    assert races.interrupted + races.finished + races.failed == RACES
    assert races.interrupted
    assert races.finished + races.failed
    if RACES > 200:
        print(f"\n{way}: {races.interrupted} interrupted, {races.finished} finished, {races.failed} failed")


def test_what_was_swallowed_comes_again_when_it_is_gone(way):
    """Once does not save you, and none hits a function that still handles the last one."""
    more: list[int] = []

    def handles() -> None:
        try:
            jumps_back()
        except Cancelled:
            before = threading.get_ident(), window().landed
            for _ in range(30):  # some attempts long
                spin()
            more.append(window().landed - before[1])

    def window() -> Window:
        found = task._window
        assert found is not None
        return found

    def child() -> None:
        for _ in range(3):
            handles()
        jumps_back()

    with seen(observe.TaskInterrupted) as told, interruptible() as scope:
        task = cancel_while_it_runs(scope, child)
    assert more == [0, 0, 0]
    assert [event.swallowed for event in told] == [3]
    assert task.cancelled()


def test_a_child_that_swallows_and_returns_is_told(way):
    """A cancelled thing never looks like success: the cancel counts as one that cut work short."""

    def child() -> str:
        with contextlib.suppress(BaseException):
            jumps_back()
        return "as if nothing had happened"

    with seen(observe.TaskInterrupted) as told, interruptible() as scope:
        task = cancel_while_it_runs(scope, child)
    assert task.result() == "as if nothing had happened"
    assert [event.swallowed for event in told] == [1]
    assert scope.report.outcome == "cancelled"
    assert scope.report.interrupted == (task.name,)


# --- never there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protect", [shield, uninterruptible])
def test_a_shield_is_left_before_anything_is_raised(way, protect):
    """What it protects is done in full; the interrupt that was put off comes right behind it."""
    log, inside, go_on = [], threading.Event(), threading.Event()

    def child() -> None:
        with protect(None):
            inside.set()
            while not go_on.is_set():
                spin(10)
            log.append("done")
        jumps_back()
        log.append("never")

    with interruptible() as scope:
        task = scope.spawn(child)
        helper = Attempt(lambda: (wait_until(lambda: task._window and task._window._cut), spin(), go_on.set()))
        inside.wait(10)
        scope.cancel()
    helper.value()
    assert log == ["done"]
    assert task.cancelled()


def test_nested_shields_hold_until_the_last_is_left(way):
    """Leaving the inner one is not leaving the outer one."""
    log, inside, go_on = [], threading.Event(), threading.Event()

    def child() -> None:
        with shield(None):
            with uninterruptible():
                inside.set()
                while not go_on.is_set():
                    spin(10)
            spin()
            log.append("done")
        jumps_back()

    with interruptible() as scope:
        task = scope.spawn(child)
        helper = Attempt(lambda: (wait_until(lambda: task._window and task._window._cut), go_on.set()))
        inside.wait(10)
        scope.cancel()
    helper.value()
    assert log == ["done"]


def test_commits_are_never_cut(way):
    """A child that commits all the time is interrupted between two commits, whenever the attempts come."""
    begun, committed = [], []
    rounds = max(5, RACES // 20)

    def child() -> None:
        begun.append(0)
        committed.append(0)
        while True:
            with uninterruptible():
                begun[-1] += 1
                spin(50)
                committed[-1] += 1
            spin(5)

    for _ in range(rounds):
        with interruptible() as scope:
            cancel_while_it_runs(scope, child)
    assert begun == committed
    assert len(begun) <= rounds


def test_a_child_that_leaves_a_scope_of_its_own_is_let_through(way):
    """A join that is cut off would leave its threads behind."""
    gate, joining = threading.Event(), threading.Event()
    words = []

    def child() -> None:
        with ThreadScope(name="inner") as inner:
            inner.spawn(lambda: (joining.set(), gate.wait(10)))
        words.append(inner.report.outcome)
        jumps_back()

    with interruptible() as scope:
        task = scope.spawn(child)
        joining.wait(10)
        helper = Attempt(lambda: (wait_until(lambda: task._window and task._window._cut), gate.set()))
        scope.cancel()
    helper.value()
    assert words in ([], ["cancelled"])  # an interrupt may come when the inner scope has ended
    assert task.cancelled()
    assert scope.report.interrupted == (task.name,)


def test_cleanups_of_the_task_are_not_interrupted(way):
    """They belong to the time after its function, and have a limit of their own."""
    log = []

    def slow() -> None:
        for _ in range(30):
            spin()
        log.append("cleaned")

    def child() -> None:
        from tokenscope import defer

        defer(slow)
        jumps_back()

    with interruptible() as scope:
        cancel_while_it_runs(scope, child)
    assert log == ["cleaned"]


class Finalized:
    """Its finalizer is Python code that takes its time."""

    def __del__(self) -> None:
        """Compute."""
        spin(200)
        _finished.append(1)


_finished: list[int] = []


def test_finalizers_are_spared(way, monkeypatch):
    """A loop that finalizes half of its time ends all the same, and with monitoring no finalizer is cut."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: unraisable.append(told.exc_type))  # keeps no exception
    made = []
    _finished.clear()

    def child() -> None:
        while True:
            made.append(1)
            spin(200)
            Finalized()

    with interruptible() as scope:
        cancel_while_it_runs(scope, child)
    assert len(scope.report.interrupted) == 1
    if way == "monitoring":
        assert unraisable == []
        assert len(made) - len(_finished) <= 1


class Section:
    """A context manager in Python that counts."""

    entered = left = 0

    def __enter__(self) -> None:
        """Compute."""
        spin(200)
        self.entered += 1

    def __exit__(self, *_: object) -> None:
        """Compute."""
        spin(200)
        self.left += 1


def test_context_managers_are_entered_and_left_in_one_piece():
    """With monitoring; an injected exception has no such manners, and docs/limits.md says so."""
    if not monitoring.available():
        pytest.skip("sys.monitoring is of Python 3.12")
    for _ in range(10):
        section = Section()

        def child(section: Section = section) -> None:
            while True:
                with section:
                    pass

        with interruptible() as scope:
            cancel_while_it_runs(scope, child)
        assert section.entered == section.left


def test_a_callback_that_the_child_runs_is_not_cut():
    """With monitoring: what a cancel callback raises would be logged and forgotten."""
    if not monitoring.available():
        pytest.skip("sys.monitoring is of Python 3.12")
    ran = []

    def callback() -> None:
        for _ in range(20):
            spin(1000)
        ran.append(1)

    def child() -> None:
        while True:
            token = CancellationToken()
            with token.on_cancel(callback):
                token.cancel()

    with seen(observe.CallbackFailed) as failed, interruptible() as scope:
        cancel_while_it_runs(scope, child)
    assert failed == []
    assert len(scope.report.interrupted) == 1


def test_what_is_blocked_in_c_is_interrupted_when_it_comes_back(way):
    """No exception gets into C. It waits for the thread."""
    gate = threading.Lock()
    gate.acquire()

    def child() -> None:
        gate.acquire()
        jumps_back()

    with interruptible() as scope:
        task = cancel_while_it_runs(scope, child)
        helper = Attempt(lambda: (wait_until(lambda: task._window and task._window._cut), spin(), gate.release()))
    helper.value()
    assert task.cancelled()
    assert scope.report.interrupted == (task.name,)


# --- which way ------------------------------------------------------------------------------------------------------


def test_where_there_is_no_way_it_is_said_once_and_waited(monkeypatch):
    """An interpreter that offers none: the child is a straggler as any other."""
    monkeypatch.setattr(monitoring, "available", lambda: False)
    monkeypatch.setattr(injection, "available", lambda: False)
    monkeypatch.setattr(strike, "_told", set())
    with seen(observe.FallbackUsed) as told, seen(observe.StragglerSeen) as late, interruptible() as scope:
        cancel_while_it_runs(scope, lambda: [spin(10) for _ in iter(lambda: len(late) > 2, True)])
    assert [event.what for event in told] == ["on_straggler='interrupt'"]
    assert scope.report.interrupted == ()


def test_where_all_tool_numbers_are_taken_it_is_injected(monkeypatch):
    """And said once."""
    if not monitoring.available():
        pytest.skip("sys.monitoring is of Python 3.12")
    monkeypatch.setattr(strike, "_told", set())
    for number in (3, 4):
        sys.monitoring.use_tool_id(number, "somebody")
    try:
        with seen(observe.FallbackUsed) as told, interruptible() as scope:
            cancel_while_it_runs(scope, jumps_back)
    finally:
        for number in (3, 4):
            sys.monitoring.free_tool_id(number)
    assert [event.what for event in told] == ["sys.monitoring"]
    assert len(scope.report.interrupted) == 1


def test_one_free_number_is_enough(monkeypatch):
    """Another tool has the first one that we would take."""
    if not monitoring.available():
        pytest.skip("sys.monitoring is of Python 3.12")
    monkeypatch.setattr(injection, "available", lambda: False)
    sys.monitoring.use_tool_id(4, "somebody")
    try:
        with interruptible() as scope:
            cancel_while_it_runs(scope, jumps_back)
    finally:
        sys.monitoring.free_tool_id(4)
    assert len(scope.report.interrupted) == 1


def test_monitoring_is_on_until_the_last_window_is_through():
    """The end of one task's window leaves the others watched."""
    if not monitoring.available():
        pytest.skip("sys.monitoring is of Python 3.12")
    monitor, first, second = monitoring.Monitor(), Window(), Window()
    assert monitor.send(first, again=False)
    assert monitor.send(second, again=False)
    monitor.withdraw(first, pending=True)
    assert monitor.codes
    assert sys.monitoring.get_tool(monitor.number) == "tokenscope"
    monitor.withdraw(second, pending=True)
    assert not monitor.codes
    assert monitor.number is None


def test_monitoring_is_off_afterwards():
    """The number is free again, and no event is left on: whoever takes the number next hears nothing of ours."""
    if not monitoring.available():
        pytest.skip("sys.monitoring is of Python 3.12")
    started = threading.Event()
    with interruptible() as scope:
        scope.spawn(lambda: (started.set(), calls_itself()))
        assert started.wait(10)
        cancel_while_it_runs(scope, moves_on)
    assert len(scope.report.interrupted) == 2
    for number in (3, 4):
        assert sys.monitoring.get_tool(number) is None
        sys.monitoring.use_tool_id(number, "next")
        for function in (moves_on, spin, jumps_back, calls_itself):
            assert sys.monitoring.get_local_events(number, function.__code__) == 0
        sys.monitoring.free_tool_id(number)


def test_a_bad_moment_for_ctrl_c_leaves_the_window_usable():
    """An error out of sending an interrupt (Ctrl-C) counts as not sent."""

    class Broken:
        def send(self, _window: Window, *, again: bool) -> bool:
            assert not again
            raise KeyboardInterrupt

        def withdraw(self, _window: Window, *, pending: bool) -> None:
            assert not pending

    root = CancellationToken()
    root.cancel()
    window = Window()

    def work() -> None:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                window.interrupt(root._cut, Broken())
        check()

    window.call(work, (), {})
    assert window.landed == 0


def test_pauses_double():
    """1 ms, 3 ms, 7 ms ... after the first attempt."""
    assert [round(strike.beat_after(count) * 1000) for count in range(5)] == [0, 1, 3, 7, 15]
    assert time.monotonic() + strike.beat_after(10) > time.monotonic()
