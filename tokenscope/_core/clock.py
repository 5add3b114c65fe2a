"""Time: one monotonic clock for waiting, the wall clock for telling, and the check of every timeout."""

from __future__ import annotations

import math
import time
from numbers import Real

__all__ = ["deadline_after", "now", "validate_timeout", "wall"]

now = time.monotonic
wall = time.time


def validate_timeout(value: object, name: str = "timeout") -> float | None:
    """Check a length of time given by a user and return it in seconds; ``None`` and ``inf`` mean no limit.

    Raises:
        TypeError: It is not a number (``True`` is not one here).
        ValueError: It is negative or not a number in IEEE's sense.
    """
    if value is None:
        return None
    if type(value) is float and 0.0 <= value < math.inf:  # the common case, quickly
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number of seconds or None, not {value!r}")
    try:
        seconds = float(value)
    except OverflowError:  # an integer beyond all floats
        seconds = math.inf if value == abs(value) else -math.inf
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"{name} must be 0 or more seconds, not {value!r}")
    return None if math.isinf(seconds) else seconds


def deadline_after(timeout: float | None) -> float | None:
    """The monotonic time ``timeout`` seconds from now, or None for no limit."""
    return None if timeout is None else now() + timeout
