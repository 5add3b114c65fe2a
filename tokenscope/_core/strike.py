"""Interrupting children that do not obey: by which way, and how often. The rules of safety are in ``window.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenscope._core import events, injection, monitoring

if TYPE_CHECKING:
    from tokenscope._core.window import Way, Window

__all__ = ["beat_after", "strike"]

FIRST_PAUSE = 0.001  # seconds from the first attempt to the second; each further pause is twice as long

_monitor = monitoring.Monitor()
_injection = injection.Injection()
_told: set[str] = set()


def beat_after(count: int) -> float:
    """Seconds from the first attempt to the one with this number, counted from 0."""
    return float(FIRST_PAUSE * (2**count - 1))


def strike(window: Window, cut: Any) -> None:
    """Try to have the `Cancelled` of ``cut`` raised in the window's thread; to be repeated until the task ends."""
    way = _choose()
    if way is not None:
        window.interrupt(cut, way)


def _choose() -> Way | None:
    if monitoring.available():
        if _monitor.free():
            return _monitor
        _tell("sys.monitoring", "all numbers for tools are taken; exceptions are injected instead")
    if injection.available():
        return _injection
    _tell("on_straggler='interrupt'", "this interpreter offers no way to raise an exception in another thread")
    return None


def _tell(what: str, why: str) -> None:
    if what not in _told:
        _told.add(what)
        events.emit(events.FallbackUsed(what, why))
