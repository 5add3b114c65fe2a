"""An exception injected into another thread: for interpreters without `sys.monitoring`, and where that is taken.

``PyThreadState_SetAsyncExc`` leaves a class with a thread. The interpreter raises it there between two instructions of
Python, at any place, and nowhere within C: what a thread is blocked in comes to its end first. The class is made for
one interrupt, and its constructor tells the window that it has come. The thread itself takes it back by leaving
nothing instead.

Where a finalizer runs just then, the interpreter prints the exception and goes on. The place is looked at before;
between the look and the exception it may still change, and then the next attempt has to do it.

Source: https://docs.python.org/3/c-api/init.html#c.PyThreadState_SetAsyncExc
"""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING, Any

from tokenscope._core.errors import Cancelled
from tokenscope._core.window import is_safe

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.window import Window

__all__ = ["Injection", "available"]


_LOOKS, _PAUSE = 20, 0.0001  # a thread that does little but finalize is elsewhere for a moment now and then; in seconds


class Injection:
    """See the module's head. Keeps nothing."""

    def send(self, window: Window, *, again: bool) -> bool:
        """See `Way.send`."""
        if again:
            return True  # two of them would not be one
        arrival = _arrival_at(window)
        leave, _take_back = _calls()
        for _ in range(_LOOKS):
            if is_safe(sys._current_frames().get(window.ident)):
                return bool(leave(window.ident, arrival))
            time.sleep(_PAUSE)
        return False

    def withdraw(self, window: Window, *, pending: bool) -> None:
        """See `Way.withdraw`."""
        if pending:
            _leave, take_back = _calls()
            take_back(window.ident, None)


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
def _calls() -> tuple[Callable[[int, type], int], Callable[[int, None], int]]:
    """The call of the interpreter, with a class and with NULL."""
    import ctypes  # noqa: PLC0415  # some builds lack it, and most processes never need it

    name = "PyThreadState_SetAsyncExc"
    leave = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.py_object)((name, ctypes.pythonapi))
    take_back = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)((name, ctypes.pythonapi))
    return leave, take_back


def available() -> bool:
    """Whether this interpreter can do it."""
    try:
        _calls()
    except (ImportError, AttributeError):  # AttributeError: no such function, as in PyPy
        return False
    return True
