"""Ctrl-C: injected at every line of spawn and of leaving, and pressed for real in processes of their own."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from pathlib import Path
from typing import Self

import pytest
from actors import WAIT, Program, Sleeper, until

import tokenscope
from tokenscope import ScopeClosed, ThreadScope, current_token, sleep
from tokenscope._core.current import standing_back
from tokenscope.testing import drain

LIBRARY = str(Path(tokenscope.__file__).parent)


class InterruptAt:
    """Raises KeyboardInterrupt before the n-th line of the library that this thread runs in its `with`."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.where: str | None = None  # once it has fired

    def __enter__(self) -> Self:
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)  # of whoever measures coverage

    def _call(self, frame, event, arg):
        ours = frame.f_code.co_filename.startswith(LIBRARY)
        # In a finalizer Python itself would eat it.
        return self._line if ours and frame.f_code.co_name != "__del__" else None

    def _line(self, frame, event, arg):
        if event == "line" and self.where is None:
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                raise KeyboardInterrupt(self.where)
        return self._line


class Resource:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.log.append("manager")


class Story:
    """A scope with children and cleanups, and what must be true when it has ended, wherever interrupted."""

    def __init__(self, **settings) -> None:
        self.started: list[int] = []
        self.ended: list[int] = []
        self.cleaned: list[str] = []
        self.outside = current_token()
        self.may_end = threading.Event()
        self.scope = ThreadScope(**settings)

    def child(self, number: int) -> int:
        self.started.append(number)
        try:
            current_token().wait(WAIT) if number % 2 else self.may_end.wait(WAIT)
            sleep(0)
        finally:
            self.ended.append(number)
        return number

    def quick(self, number: int) -> int:
        self.started.append(number)
        self.ended.append(number)
        return number

    def prepare(self) -> None:
        """One cleanup of each kind."""
        self.scope.defer(self.cleaned.append, "function")
        self.scope.enter_context(Resource(self.cleaned))
        self.scope.token.on_cancel(self.may_end.set)

    def check(self, where: str | None) -> None:
        """The invariants, after the scope has been left."""
        assert sorted(self.started) == sorted(self.ended), f"a child was not joined, {where}"
        assert len(set(self.started)) == len(self.started), f"a child ran twice, {where}"
        assert self.cleaned == ["manager", "function"], f"the cleanups are wrong, {where}"
        assert current_token() is self.outside, f"a token is left current, {where}"
        assert not standing_back(), f"this thread still stands back, {where}"
        counts = self.scope.report.tasks
        assert self.scope.snapshot().tasks == (), f"a task is still counted alive, {where}"
        assert counts.spawned == counts.finished + counts.failed + counts.cancelled + counts.never_started
        assert counts.finished + counts.failed + counts.cancelled == len(self.started), f"miscounted, {where}"
        with pytest.raises(ScopeClosed):
            self.scope.spawn(str)


def every_line(play) -> list[str]:
    """Call play(n) for n = 1, 2, ... until there is surely no n-th line any more; where it was interrupted.

    Surely: how many lines there are depends a little on how far the other threads are.
    """
    places: list[str] = []
    missed = number = 0
    while missed < 10:
        number += 1
        where = play(number)
        if where is None:
            missed += 1
        else:
            missed = 0
            places.append(where)
        assert number < 5000, "it never ends"
    return places


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("max_threads", [None, 1])
def test_interrupts_at_every_line_of_spawn_lose_no_task(max_threads, cold):
    """KeyboardInterrupt leaves the body; whatever had been started is joined, and the cleanups ran once."""

    def play(number: int) -> str | None:
        story = Story(max_threads=max_threads)
        interrupt = InterruptAt(number)
        try:
            with story.scope:
                story.prepare()
                story.scope.spawn(story.child, 1)
                until(lambda: story.started)
                if cold:
                    assert drain()
                with interrupt:
                    story.scope.spawn(story.child, 2)
                story.scope.cancel()
        except KeyboardInterrupt:
            assert interrupt.where
        story.check(interrupt.where)
        return interrupt.where

    places = every_line(play)
    assert any("admit" in place for place in places)


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("max_threads", [None, 1])
def test_interrupts_of_spawn_that_the_body_survives_lose_no_task(max_threads, cold):
    """A body that catches KeyboardInterrupt has a working scope: later children run, all are joined."""

    def play(number: int) -> str | None:
        story = Story(max_threads=max_threads)
        interrupt = InterruptAt(number)
        with story.scope:
            story.prepare()
            if cold:
                assert drain()
            with interrupt:
                with contextlib.suppress(KeyboardInterrupt):
                    story.scope.spawn(story.quick, 2)
            assert story.scope.spawn(story.quick, 4).result(WAIT) == 4
        story.check(interrupt.where)
        assert story.scope.report.outcome == "succeeded"
        return interrupt.where

    every_line(play)


@pytest.mark.parametrize("max_threads", [None, 1])
@pytest.mark.parametrize("body_fails", [False, True])
def test_interrupts_at_every_line_of_leaving_lose_nothing(max_threads, body_fails):
    """Children joined, cleanups once, KeyboardInterrupt out; at the very first lines by leaving again."""

    def play(number: int) -> str | None:
        story = Story(max_threads=max_threads)
        interrupt = InterruptAt(number)
        error = ValueError("body") if body_fails else None
        story.scope.__enter__()
        story.prepare()
        for child in (2, 3):
            story.scope.spawn(story.child, child)
        until(lambda: story.started)
        helper = threading.Thread(target=story.scope.cancel)
        if not body_fails:
            helper.start()
        caught = None
        try:
            with interrupt:
                story.scope.__exit__(type(error) if error else None, error, None)
        except BaseException as raised:
            caught = raised
        if story.scope.snapshot().state != "ended":
            again.append(interrupt.where)
            story.scope.__exit__(KeyboardInterrupt, caught, None)
        if not body_fails:
            helper.join(WAIT)
        story.check(interrupt.where)
        if interrupt.where is not None:
            assert isinstance(caught, KeyboardInterrupt), f"{caught!r}, {interrupt.where}"
        return interrupt.where

    again: list[str | None] = []
    places = every_line(play)
    assert any("_clean_up" in place for place in places)
    assert all("__exit__" in str(place) for place in again)
    assert len(again) <= 4


@pytest.mark.parametrize("body_fails", [False, True])
def test_an_error_of_a_signal_handler_while_leaving_loses_nothing(body_fails):
    """An alarm that raises TimeoutError is handled as Ctrl-C is: children joined, cleanups run, it comes out."""
    sleeper, log = Sleeper(), []

    def ring(*_):
        raise TimeoutError("the alarm")

    def alarm():
        until(lambda: scope.snapshot().state == "leaving")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    before, outside = signal.signal(signal.SIGALRM, ring), current_token()
    try:
        with pytest.raises(TimeoutError, match="the alarm"):
            with ThreadScope(on_error="collect") as scope:
                scope.defer(log.append, "cleanup")
                scope.spawn(sleeper.sleep)
                sleeper.await_arrival()
                helper = threading.Thread(target=alarm)
                helper.start()
                if body_fails:
                    raise ValueError("the body")
    finally:
        signal.signal(signal.SIGALRM, before)
        helper.join(WAIT)
    assert sleeper.left() == ["interrupted"]
    assert log == ["cleanup"]
    assert current_token() is outside
    assert scope.report.tasks.cancelled == 1


# --- for real -----------------------------------------------------------------------------------------------

PROGRAM = """
    import sys, threading
    import tokenscope
    from tokenscope import ThreadScope, Cancelled

    def say(word):
        print(word, flush=True)

    def child(ready):
        ready()
        try:
            tokenscope.sleep(60)
        except Cancelled as cancelled:
            say(f"child {cancelled.reason.kind}")
            raise

    def leaving(scope):
        while scope.snapshot().state != "leaving":
            threading.Event().wait(0.001)
        say("ready")

    try:
        with ThreadScope() as scope:
            scope.defer(say, "cleanup")
            BODY
    except KeyboardInterrupt:
        say(f"KeyboardInterrupt {scope.report.reason.kind} {scope.report.outcome}")
"""

BODIES = {
    "joining": "scope.spawn(child, lambda: leaving(scope))",
    "in join()": "scope.spawn(child, lambda: say('ready')); scope.join()",
    "in result()": "scope.spawn(child, lambda: say('ready')).result()",
    "in wait()": "scope.spawn(child, lambda: say('ready')); scope.token.wait()",
    "asleep": "scope.spawn(child, lambda: say('ready')); tokenscope.sleep(60)",
}


def press_until_it_ends(program: Program) -> tuple[int, str, str]:
    """Ctrl-C; once more if it fell into the moment before the main thread blocked."""
    import subprocess

    for _ in range(5):
        program.interrupt()
        try:
            program.process.wait(1)
            break
        except subprocess.TimeoutExpired:
            continue
    return program.finish()


@pytest.mark.parametrize("where", BODIES)
def test_ctrl_c_in_the_main_thread_stops_the_children_and_comes_out(where):
    """A real SIGINT: children cancelled with `interrupted`, joined, cleanups run, KeyboardInterrupt out."""
    with Program(PROGRAM.replace("BODY", BODIES[where])) as program:
        program.expect("ready")
        status, out, err = press_until_it_ends(program)
    assert (status, err) == (0, "")
    assert out.splitlines() == ["child interrupted", "cleanup", "KeyboardInterrupt interrupted interrupted"]


def test_ctrl_c_that_nobody_catches_ends_the_process_with_its_traceback():
    """The notes on it tell what else had failed."""
    code = """
        import tokenscope
        from tokenscope import ThreadScope

        def child():
            print("ready", flush=True)
            try:
                tokenscope.sleep(60)
            finally:
                raise ValueError("beside it")

        with ThreadScope() as scope:
            scope.spawn(child, name="the-child")
    """
    with Program(code) as program:
        program.expect("ready")
        status, _, err = press_until_it_ends(program)
    assert status != 0
    assert "KeyboardInterrupt" in err
    assert "task the-child: ValueError: beside it (<string>:10 in child)" in err


def test_ctrl_c_twice_ends_a_process_whose_child_does_not_obey():
    """The first cancels, the second gives the child up, and the process ends although its thread blocks."""
    code = """
        import threading
        from tokenscope import ThreadScope

        def deaf():
            while scope.snapshot().state != "leaving":
                threading.Event().wait(0.001)
            print("ready", flush=True)
            scope.token.wait(60)
            print("cancelled", flush=True)
            threading.Event().wait(60)

        with ThreadScope() as scope:
            scope.defer(print, "cleanup", flush=True)
            scope.spawn(deaf, name="deaf")
    """
    with Program(code) as program:
        program.expect("ready")
        program.interrupt()
        program.expect("cancelled")
        status, out, err = press_until_it_ends(program)
    assert status != 0
    assert out == "cleanup\n"
    assert "KeyboardInterrupt" in err
    assert "gave up waiting for 1 of its children: deaf" in err
