"""An exception raised by the thread itself, at an event of `sys.monitoring`: CPython 3.12 and newer.

The events are switched on for the functions in which the thread stands, and call back *in the thread*, before something
happens there: a function begins, or a loop jumps back. A thread that computes for ever does one of the two for ever. It
sees its own frames then, so that a bad moment is told from a good one without a race.

Why not the event JUMP, which says just that: an exception out of its callback passes by the ``except`` and ``finally``
around the loop (seen with CPython 3.12 and 3.13). INSTRUCTION comes before the jump, and its exceptions are caught
where they should be. All other instructions are switched off as they come by, so a loop pays for its jumps only.

Other threads that run the same functions pay as well while it is on, and are otherwise left alone. What a function on
the stack calls later is not watched; where the thread is then, the next attempt looks again.

Invariants
    1. The tool's number is taken exactly while something is watched: others may want it.
    2. Events are on in no function but `codes`. They go off when nobody is watched any more.
"""

from __future__ import annotations

import sys
from opcode import opmap
from typing import TYPE_CHECKING, Any

from tokenscope._core import _primitives
from tokenscope._core._typing import override
from tokenscope._core.window import here, is_safe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, FrameType

    from tokenscope._core.window import Window

__all__ = ["Monitor", "available"]

# 0, 1, 2 and 5 are meant for debuggers, coverage, profilers and optimizers.
# https://docs.python.org/3/library/sys.monitoring.html#tool-identifiers
_NUMBERS = (4, 3)
_JUMP_BACK = opmap.get("JUMP_BACKWARD", -1)
_monitoring: Any = getattr(sys, "monitoring", None)


def available() -> bool:
    """Whether this interpreter can do it."""
    return _monitoring is not None and _JUMP_BACK >= 0


class Monitor(_primitives.Room):
    """See the module's head. There is one for the process."""

    __slots__ = ("codes", "number", "watched")

    def __init__(self) -> None:
        super().__init__()
        self.number: int | None = None  # all change under the lock
        self.watched: set[Window] = set()
        self.codes: set[CodeType] = set()

    def free(self) -> bool:
        """Whether there is a number for us."""
        return self.number is not None or any(_monitoring.get_tool(number) is None for number in _NUMBERS)

    def send(self, window: Window, *, again: bool) -> bool:  # noqa: ARG002  # it may have moved on since
        """See `Way.send`."""
        codes = {frame.f_code for frame in _stack(sys._current_frames().get(window.ident))}
        with self.enter(): self._watch_locked(window, codes)
        return window in self.watched

    def withdraw(self, window: Window, *, pending: bool) -> None:  # noqa: ARG002  # landed or not, it is watched
        """See `Way.withdraw`."""
        with self.enter(): self._unwatch_locked(window)

    def _watch_locked(self, window: Window, codes: set[CodeType]) -> None:
        if self.number is None:
            self._begin_locked()
        if self.number is None:
            return
        self.watched.add(window)
        self.codes |= codes
        for code in codes:
            _monitoring.set_local_events(self.number, code, _events())

    def _begin_locked(self) -> None:
        for number in _NUMBERS:
            try:
                _monitoring.use_tool_id(number, "tokenscope")
            except ValueError:  # taken
                continue
            self.number = number
            _listen(number, _on_entry, _on_instruction)
            return

    def _unwatch_locked(self, window: Window) -> None:
        self.watched.discard(window)
        if self.watched or self.number is None:
            return
        for code in tuple(self.codes):
            _monitoring.set_local_events(self.number, code, _monitoring.events.NO_EVENTS)
            self.codes.discard(code)
        _listen(self.number, None, None)
        _monitoring.free_tool_id(self.number)
        self.number = None

    @override
    def _after_fork_locked(self) -> None:
        # The interpreter was copied with the events on. The number stays ours: the next one who is watched uses it.
        self.watched.clear()


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _events() -> int:
    events = _monitoring.events
    return int(events.PY_START | events.INSTRUCTION)


def _listen(number: int, on_entry: Any, on_instruction: Any) -> None:
    events = _monitoring.events
    _monitoring.register_callback(number, events.PY_START, on_entry)
    _monitoring.register_callback(number, events.INSTRUCTION, on_instruction)


# --- in whichever thread comes by; no events come out of these -----------------------------------------------------


def _on_entry(_code: CodeType, _offset: int) -> None:
    _raise_what_is_due(sys._getframe(1))


def _on_instruction(code: CodeType, offset: int) -> Any:
    if code.co_code[offset] != _JUMP_BACK:
        return _monitoring.DISABLE
    _raise_what_is_due(sys._getframe(1))
    return None


def _raise_what_is_due(frame: FrameType) -> None:
    window = here()
    if window is None or not is_safe(frame):
        return
    error = window.land()
    if error is not None:
        try:
            raise error
        finally:
            del error  # or its traceback would keep it for good, and nobody could tell that it is gone
