r"""When the thread of a task may be interrupted: while its own function runs, and holds nothing that must be done.

States of a window::

    new --call--> open <--hold / let go--> held
                    \                       /
                     \--(the function ends)/--> over

An interrupt::

    none --ordered--> under way --(raised in the thread)--> landed --(that exception is gone)--> none
                          \--(the window is held, or over, first)--> raised before that; or withdrawn, if the way
                                                                     can, and raised when it is let go

There are two ways to raise an exception in another thread, ``monitoring.py`` and ``injection.py``. The rules are here.

Invariants
    1. An interrupt is ordered under the lock, into an open window that nobody holds. The thread itself holds and closes
       its window: under the lock, and then it withdraws what is under way, or waits for it. So when `hold` or `call` is
       through, nothing comes any more, although before that an exception may appear between any two lines of Python.
    2. At most one is under way or landed. Another one is ordered when the first exception is gone, which means that
       somebody swallowed it: none ever hits a function that is already unwinding.
    3. Every line between the first and the last at which one can appear is inside of `call`, which lets it pass. `call`
       closes the window twice: an interrupt that cuts the first attempt off is the only one (2).
    4. `landed` counts the exceptions. An order bears the number it was given at, and is void when that has changed: so
       the thread needs no lock to tell that one has landed.

Lock order: a window > `monitoring.Monitor`, a leaf. Nobody's code runs under either.
After a fork the child is never interrupted on behalf of its parent: it finds the window closed.
"""

from __future__ import annotations

import sys
import threading
import weakref
from os import getpid
from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tokenscope._core import _primitives
from tokenscope._core._typing import override

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from tokenscope._core.errors import Cancelled

__all__ = ["Way", "Window", "hold_here", "is_safe"]

T = TypeVar("T")

_NOBODY = -1  # an order that no landing answers to


class Way(Protocol):
    """How an exception gets into another thread."""

    def send(self, window: Window, *, again: bool) -> bool:
        """Have an exception raised in the window's thread; False: not now. ``again``: one is still under way."""

    def withdraw(self, window: Window, *, pending: bool) -> None:
        """Stop. On the window's own thread: when it is through, nothing comes any more. ``pending``: one is under way.

        What is under way may be raised in here instead.
        """


class Window(_primitives.Room):
    """See the module's head. One for each task that may be interrupted."""

    __slots__ = (
        "__weakref__",
        "_cut",
        "_error",
        "_holders",
        "_open",
        "_order",
        "_owed",
        "_way",
        "ident",
        "landed",
        "used",
    )

    def __init__(self) -> None:
        super().__init__()
        self.ident = get_ident()  # the thread that makes it is the one that may be interrupted
        self.landed = 0
        self.used: float | None = None  # processor time of the thread when it was last looked at, in seconds
        self._open = False
        self._holders: set[object] = set()
        self._way: Way | None = None  # chosen once
        self._cut: Any = None  # of which the thread is to be told
        self._owed = False  # it is to be told, and was not yet
        self._order = _NOBODY
        self._error: weakref.ref[BaseException] | None = None  # the last one that landed

    # --- on the task's thread -----------------------------------------------------------------------------------

    def call(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        """Return ``fn(*args, **kwargs)``, which may be interrupted. Used once.

        Raises:
            Cancelled: It was.
            BaseException: What ``fn`` raised.
        """
        try:
            try:
                _here.window = self
                self._open = True
                return fn(*args, **kwargs)
            finally:
                self._close()
        finally:
            self._close()
            _here.window = None

    def _close(self) -> None:
        with self.enter(): self._close_locked()
        self._withdraw()

    def _close_locked(self) -> None:
        self._open = False

    def hold(self, holder: object) -> None:
        """Nothing is raised from the end of this call on, until ``holder`` lets go. May be repeated."""
        try:
            with self.enter(): self._holders.add(holder)
            self._withdraw()
        except BaseException:
            with self.enter(): self._holders.discard(holder)
            raise

    def let_go(self, holder: object) -> None:
        """``holder`` is through; the last thing in its ``__exit__``. Raises what was put off, where that may be done.

        May be repeated, and called on another thread; there nothing is raised.

        Raises:
            Cancelled: The interrupt.
        """
        with self.enter(): self._holders.discard(holder)
        if not self._owed or self.ident != get_ident() or not is_safe(_left_place()):
            return
        with self.enter(): error = self._take_locked()
        if error is not None:
            try:
                raise error
            finally:
                del error  # or its traceback would keep it for good, and nobody could tell that it is gone

    def _take_locked(self) -> Cancelled | None:
        """What is owed, if it is not on its way by itself."""
        if not self._owed or self._holders or not self._open or self._order == self.landed or self.pid != getpid():
            return None
        return self._new_error()

    def awaits(self) -> bool:
        """Whether an interrupt is under way."""
        return self._order == self.landed

    def _withdraw(self) -> None:
        if self._way is not None:
            self._way.withdraw(self, pending=self.awaits())
            self._order = _NOBODY

    def land(self) -> Cancelled | None:
        """What to raise in the thread, at the very place from which this is called; None: nothing, or not now."""
        if self._order != self.landed or self.pid != getpid():
            return None
        return self._new_error()

    def _new_error(self) -> Cancelled:
        error: Cancelled = self._cut.as_error()
        self.note_landed(error)
        return error

    def note_landed(self, error: BaseException) -> None:
        """``error`` is being raised."""
        self._error = weakref.ref(error)
        self._owed = False
        self.landed += 1  # last: whoever sees the number sees the error

    # --- on other threads ---------------------------------------------------------------------------------------

    def interrupt(self, cut: Any, way: Way) -> None:
        """Have the `Cancelled` of ``cut`` raised in the thread, as soon as the rules allow.

        To be called again and again until the task ends: an exception can be swallowed, and a moment can be a bad one.
        """
        with self.enter(): self._interrupt_locked(cut, way)

    def _interrupt_locked(self, cut: Any, way: Way) -> None:
        self._cut = cut
        self._way = self._way or way
        number = self.landed  # read first, see `note_landed`
        if self._error is not None and self._error() is not None:
            self._way.withdraw(self, pending=False)
            return
        self._owed = True
        if self._open and not self._holders:
            self._order_locked(self._way, number)

    def _order_locked(self, way: Way, number: int) -> None:
        again = self._order == number
        self._order = number
        try:
            sent = way.send(self, again=again)
        except BaseException:
            self._order = _NOBODY
            raise
        if not sent:
            self._order = _NOBODY

    @override
    def _after_fork_locked(self) -> None:
        self._open = self._owed = False
        self._order = _NOBODY


class _Here(threading.local):
    window: Window | None = None  # the one that this thread is in


_here = _Here()


def here() -> Window | None:
    """The window that this thread is in."""
    return _here.window


def hold_here(holder: object) -> Window | None:
    """Hold the window that this thread is in, if it is in one; to be let go of by whoever likes."""
    window = _here.window
    if window is not None:
        window.hold(holder)
    return window


# --- places ---------------------------------------------------------------------------------------------------------

_CALL = Window.call.__code__
#: What runs in these was begun by the interpreter, at a moment of its own, or must be whole.
_TENDER_FUNCTIONS = frozenset({"__del__", "__enter__", "__exit__"})
_TENDER_MODULES = frozenset(
    {"importlib._bootstrap", "importlib._bootstrap_external", "logging", "queue", "threading", "weakref"}
)
_TENDER_PACKAGES = ("logging.", "tokenscope._core.")
_TRANSPARENT = "tokenscope._core.current"  # `bind` and the like, through which users' functions are called
_OURS = "tokenscope."
_LEAVING = frozenset({"__exit__", "let_go", "_let_go"})


def is_safe(frame: FrameType | None) -> bool:
    """Whether an exception may be raised in this frame of a window's thread: nothing of what it stands in is tender.

    A finalizer's exceptions are lost, half a ``with`` is none, a module that is half imported is thrown away, and a
    lock that everybody logs under must be given back. In the library's own code there is no need: what blocks there,
    listens.
    """
    if frame is None or _module(frame).startswith(_OURS):
        return False
    while frame is not None and frame.f_code is not _CALL:
        if frame.f_code.co_name in _TENDER_FUNCTIONS or _is_tender(_module(frame)):
            return False
        frame = frame.f_back
    return frame is not None


def _left_place() -> FrameType | None:
    """The frame with the ``with`` statement that is being left."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name in _LEAVING and _module(frame).startswith(_OURS):
        frame = frame.f_back
    return frame


def _is_tender(module: str) -> bool:
    return module in _TENDER_MODULES or (module.startswith(_TENDER_PACKAGES) and module != _TRANSPARENT)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
