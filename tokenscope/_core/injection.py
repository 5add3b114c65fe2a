"""An exception injected into another thread: for interpreters without `sys.monitoring`, and where that is taken.

``PyThreadState_SetAsyncExc`` leaves a class with a thread. The interpreter raises it there between two instructions of
Python, at any place, and nowhere within C: what a thread is blocked in comes to its end first. The class is made for
one interrupt, and its constructor tells the window that it has come.

It is not taken back, but waited for: CPython before 3.13 has one flag for all threads that says "somebody has an
exception to raise", and clears it when one is raised only. As long as it is set, everybody is slower; and on 3.11 a
thread that is traced (by a debugger, or for coverage) stands still at the next function that it calls. So nothing is
sent to a thread that is blocked, which is told by the processor time that it uses.

Where a finalizer runs just then, the interpreter prints the exception and goes on. The place is looked at before;
between the look and the exception it may still change, and then the next attempt has to do it.

Source: https://docs.python.org/3/c-api/init.html#c.PyThreadState_SetAsyncExc
"""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING, Any

from tokenscope._core import clock
from tokenscope._core.errors import Cancelled
from tokenscope._core.window import is_safe

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.window import Window

__all__ = ["Injection", "available"]


# Seconds that the end of a function waits for what was sent. It comes at once, unless code in C ate it unseen.
_LONGEST_WAIT = 1.0
_clock_of = getattr(time, "pthread_getcpuclockid", None)  # not on every system
_LOOKS, _PAUSE = 20, 0.0001  # a thread that does little but finalize is elsewhere for a moment now and then; in seconds


class Injection:
    """See the module's head. Keeps nothing."""

    def send(self, window: Window, *, again: bool) -> bool:
        """See `Way.send`."""
        if again:
            return True  # two of them would not be one
        if not _computes(window):
            return False
        arrival = _arrival_at(window)
        for _ in range(_LOOKS):
            if is_safe(sys._current_frames().get(window.ident)):
                return bool(_leave()(window.ident, arrival))
            time.sleep(_PAUSE)
        return False

    def withdraw(self, window: Window, *, pending: bool) -> None:
        """See `Way.withdraw`."""
        end = clock.now() + _LONGEST_WAIT
        while pending and window.awaits() and clock.now() < end:
            pass  # it is raised at one of these lines


def _computes(window: Window) -> bool:
    """Whether the thread has used the processor since the last time this was asked; False the first time.

    The thread lives: its window is open, and cannot be closed meanwhile.
    """
    if _clock_of is None:
        return True  # nobody can tell
    before, window.used = window.used, time.clock_gettime(_clock_of(window.ident))
    return before is not None and window.used > before


def _arrival_at(window: Window) -> type[Cancelled]:
    """The class to be raised in the window's thread."""
    cut = window._cut

    def arrive(error: Cancelled) -> None:
        Cancelled.__init__(error, cut.reason, cut.origin_name)
        error._cut = cut
        window.note_landed(error)

    def reduce(error: Cancelled) -> tuple[Any, ...]:
        return Cancelled, (error.reason, error.origin)

    body = {"__init__": arrive, "__reduce__": reduce, "__module__": Cancelled.__module__}
    return type(Cancelled.__name__, (Cancelled,), body)


@functools.cache
def _leave() -> Callable[[int, type], int]:
    """The call of the interpreter."""
    import ctypes  # noqa: PLC0415  # some builds lack it, and most processes never need it

    kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.py_object)
    return kind(("PyThreadState_SetAsyncExc", ctypes.pythonapi))


def available() -> bool:
    """Whether this interpreter can do it."""
    try:
        _leave()
    except (ImportError, AttributeError):  # AttributeError: no such function, as in PyPy
        return False
    return True
