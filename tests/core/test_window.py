"""The rules of a window, with a way that does what it is told and nothing by itself."""

from __future__ import annotations

import os
import sys
import threading
import types
from typing import TYPE_CHECKING, Any

import pytest
from peers.attempts import Attempt, blocked_in, wait_until

from tokenscope import CancellationToken, Cancelled, bind, shield
from tokenscope._core.injection import Injection
from tokenscope._core.window import Window, here, hold_here, is_safe

if TYPE_CHECKING:
    from collections.abc import Callable


class Ordered:
    """A way that records what it is asked; the thread is in C, as it were, so that nothing comes by itself."""

    def __init__(self) -> None:
        self.sent: list[bool] = []
        self.withdrawn: list[bool] = []
        self.possible = True
        self.landing: BaseException | None = None  # raised by the next withdrawal

    def send(self, _window: Window, *, again: bool) -> bool:
        """Record it."""
        self.sent.append(again)
        return self.possible

    def withdraw(self, _window: Window, *, pending: bool) -> None:
        """Record it."""
        self.withdrawn.append(pending)
        error, self.landing = self.landing, None
        if error is not None:
            raise error


@pytest.fixture
def cut():
    """A cancel to be told of."""
    token = CancellationToken()
    token.cancel("enough")
    return token._cut


@pytest.fixture
def way():
    """See `Ordered`."""
    return Ordered()


def run(fn: Callable[[Window], Any]) -> Any:
    """Call ``fn`` in a window of this thread."""
    window = Window()
    return window.call(fn, (window,), {})


def test_the_end_of_the_function_withdraws_what_is_under_way(cut, way):
    """When `call` has returned, nothing comes any more, and nothing is sent."""
    window = run(lambda window: (window.interrupt(cut, way), window)[1])
    assert way.withdrawn[0]
    window.interrupt(cut, way)
    assert way.sent == [False]
    assert here() is None


def test_an_interrupt_in_the_last_lines_is_raised_and_the_window_closed_all_the_same(cut, way):
    """It lands while the window is being closed: closing is done again."""
    way.landing = Cancelled(cut.reason)
    windows = []
    with pytest.raises(Cancelled):
        run(lambda window: (windows.append(window), window.interrupt(cut, way)))
    assert len(way.withdrawn) == 2
    windows[0].interrupt(cut, way)
    assert way.sent == [False]
    assert here() is None


def test_to_hold_withdraws_and_to_let_go_raises(cut, way):
    """What was under way is put off until the holder is through."""

    def work(window: Window) -> None:
        window.interrupt(cut, way)
        window.hold("a")
        window.hold("b")
        assert way.withdrawn == [True, False]
        window.interrupt(cut, way)
        assert way.sent == [False]
        window.let_go("a")
        with pytest.raises(Cancelled) as caught:
            window.let_go("b")
        assert caught.value._cut is cut
        assert window.landed == 1

    run(work)


def test_an_interrupt_that_lands_in_hold_leaves_nothing_held(cut, way):
    """The holder never began: nobody would let go."""

    def work(window: Window) -> None:
        window.interrupt(cut, way)
        way.landing = Cancelled(cut.reason)
        with pytest.raises(Cancelled):
            window.hold("a")
        window.interrupt(cut, way)
        assert len(way.sent) == 2

    run(work)


def test_what_has_landed_is_not_raised_again_by_letting_go(cut, way):
    """It was told; a shield in the `finally` that it runs must not tell it twice."""

    def work(window: Window) -> None:
        window.interrupt(cut, way)
        assert window.land() is not None
        window.hold("a")
        window.let_go("a")
        assert window.landed == 1

    run(work)


def test_to_let_go_on_another_thread_raises_nothing_there(cut, way):
    """It is not that thread which is to be interrupted."""

    def work(window: Window) -> None:
        window.hold("a")
        window.interrupt(cut, way)
        Attempt(lambda: window.let_go("a")).value()
        window.interrupt(cut, way)
        assert way.sent == [False]

    run(work)


def test_a_shield_in_a_tender_place_raises_nothing_there(cut, way):
    """A shield within an `__exit__` ends in the middle of it."""
    log = []

    class Manager:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            with shield():
                window = here()
                assert window is not None
                window.interrupt(cut, way)
            log.append("whole")

    def work(window: Window) -> None:
        with Manager():
            pass
        window.interrupt(cut, way)
        assert way.sent == [False]

    run(work)
    assert log == ["whole"]


def test_one_at_a_time(cut, way):
    """A second one is sent when the first exception is gone."""

    def work(window: Window) -> None:
        window.interrupt(cut, way)
        window.interrupt(cut, way)
        assert way.sent == [False, True]
        error = window.land()
        assert error is not None
        assert window.land() is None
        window.interrupt(cut, way)
        assert len(way.sent) == 2
        assert way.withdrawn == [False]
        del error
        window.interrupt(cut, way)
        assert way.sent == [False, True, False]

    run(work)


def test_what_could_not_be_sent_does_not_land(cut, way):
    """It was a bad moment; the next attempt is a new one."""

    def work(window: Window) -> None:
        way.possible = False
        window.interrupt(cut, way)
        assert window.land() is None
        way.possible = True
        window.interrupt(cut, way)
        assert way.sent == [False, False]
        assert window.land() is not None

    run(work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_child_nothing_lands(cut, way):
    """Neither what was under way, nor what a holder put off."""

    def work(window: Window) -> int:
        window.interrupt(cut, way)
        pid = os.fork()
        if pid == 0:
            try:
                assert window.land() is None
                window.hold("a")
                window.let_go("a")
                os._exit(7)
            finally:
                os._exit(1)
        window.interrupt(cut, way)
        return pid

    pid = run(work)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_outside_of_a_window_there_is_nothing_to_hold():
    """Most threads are in none."""
    assert here() is None
    assert hold_here(object()) is None


# --- places ---------------------------------------------------------------------------------------------------------


def _called_from(module: str, fn: Callable[[], Any]) -> Any:
    """Call ``fn`` from a function that stands in ``module``."""
    caller = types.FunctionType((lambda fn: fn()).__code__, {"__name__": module})
    return caller(fn)


def _is_safe_here() -> bool:
    return is_safe(sys._getframe())


def _is_safe_in(module: str) -> bool:
    here = types.FunctionType((lambda is_safe, frame: is_safe(frame())).__code__, {"__name__": module})
    return bool(here(is_safe, lambda: sys._getframe(1)))


@pytest.mark.parametrize(
    ("module", "safe"),
    [
        ("somebody.else", True),
        ("importlib._bootstrap", False),
        ("importlib._bootstrap_external", False),
        ("logging", False),
        ("logging.handlers", False),
        ("logging_of_mine", True),
        ("tokenscope._core.tree", False),
        ("tokenscope._core.current", True),
        ("tokenscope.background", True),
    ],
)
def test_functions_called_from_tender_modules_are_spared(module, safe):
    """Half an import, or half a locked section of ours, is worse than a late interrupt."""
    assert run(lambda _window: _called_from(module, _is_safe_here)) is safe


@pytest.mark.parametrize(("module", "safe"), [("somebody.else", True), ("tokenscope.background", False)])
def test_the_librarys_own_frames_are_no_place(module, safe):
    """What stands in them listens to its token."""
    assert run(lambda _window: _is_safe_in(module)) is safe


def test_outside_of_the_function_no_place_is_safe():
    """The frames of a thread that is in no window."""
    assert not _is_safe_here()
    assert not is_safe(None)


def test_through_bind_it_is_safe():
    """A function that was bound to a token is the user's still."""
    assert run(lambda _window: bind(_is_safe_here)())


# --- injection ------------------------------------------------------------------------------------------------------


class Waits:
    """A context manager that waits in its `__exit__`."""

    def __init__(self, gate: threading.Event) -> None:
        self.gate = gate

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, *_: object) -> None:
        """Wait."""
        self.gate.wait(10)


def test_nothing_is_injected_into_a_tender_place(cut):
    """The place is looked at before."""
    gate, windows = threading.Event(), []

    def work(window: Window) -> str:
        windows.append(window)
        with Waits(gate):
            pass
        return "whole"

    attempt = Attempt(lambda: run(work))
    wait_until(lambda: blocked_in(attempt.thread, "__exit__"))
    windows[0]._cut = cut
    assert not Injection().send(windows[0], again=False)
    gate.set()
    assert attempt.value() == "whole"


def test_nothing_is_injected_into_a_blocked_thread(cut):
    """It would stay there, and on CPython 3.11 stop every thread that is traced. When it computes, it gets it."""
    gate, windows = threading.Lock(), []
    gate.acquire()

    def work(window: Window) -> None:
        windows.append(window)
        gate.acquire()
        while True:
            pass

    attempt = Attempt(lambda: run(work))
    wait_until(lambda: blocked_in(attempt.thread, "work") and windows)
    windows[0]._cut = cut
    wait_until(lambda: not any(Injection().send(windows[0], again=False) for _ in range(3)))
    assert not windows[0].landed
    gate.release()
    wait_until(lambda: windows[0].interrupt(cut, Injection()) or windows[0].landed)
    assert isinstance(attempt.failure(), Cancelled)


def test_the_end_waits_for_what_was_injected(cut):
    """Sent in the last moment, it is raised in the lines that close the window."""
    for _ in range(20):
        window = Window()
        injection = Injection()

        def work(window: Window = window, injection: Injection = injection) -> None:
            injection.send(window, again=False)  # a look at the clock
            window.interrupt(cut, injection)

        try:
            window.call(work, (), {})
        except Cancelled:
            assert window.landed == 1
        else:
            assert window.landed == 0
        assert not window.awaits()
