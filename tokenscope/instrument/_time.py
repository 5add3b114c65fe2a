"""`time.sleep`, ended by a cancel of the current token: for code that cannot be edited.

guarded:      ``time.sleep``, looked up in its module at the call
interrupted:  under a current token it is that token's own sleep, a checkpoint; outside of any scope it is Python's
not:          names bound before: ``from time import sleep`` (`not_reached` finds those of modules), default arguments;
    a sleep that somebody else had put there before us (it is called, between two checkpoints)
versions:     the time of Python >=3.11
compat:       tests/instrument/test_time.py
"""

from __future__ import annotations

import operator
import sys
import time
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

from tokenscope._core.current import current_token
from tokenscope._core.token import NEVER
from tokenscope.integrations._patch import Patch, Patches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenscope._core.token import CancellationToken

__all__ = ["PATCHES", "not_reached"]

#: Seconds from which on Python's own refuses: it counts in 64 bits of nanoseconds.
_TOO_LONG = 2**63 / 10**9


def _sleep(around: Any) -> Callable[..., Any]:
    wait = _token_sleep if _is_pythons(around) else _between_checkpoints

    def sleep(*args: Any, **kwargs: Any) -> Any:
        token = current_token()
        if not PATCHES.on or token is NEVER or len(args) != 1 or kwargs:
            return around(*args, **kwargs)
        return wait(token, around, args[0])

    return sleep


def _token_sleep(token: CancellationToken, around: Callable[[Any], Any], value: Any) -> None:
    seconds = _length(value)
    if seconds is None:
        around(value)  # it says what is wrong, in its own words
    else:
        token.sleep(seconds)


def _between_checkpoints(token: CancellationToken, around: Callable[[Any], Any], value: Any) -> Any:
    """Somebody else's sleep: a mock is to count its calls, gevent's to switch. How it waits is not ours to change."""
    token.check()
    slept = around(value)
    token.check()
    return slept


def _length(value: Any) -> float | None:
    """What Python's own takes for a length of time; None for what it refuses."""
    try:
        seconds = value if isinstance(value, float) else operator.index(value)
    except TypeError:
        return None
    return float(seconds) if 0 <= seconds < _TOO_LONG else None


def _is_pythons(candidate: Any) -> bool:
    # By `type`: `isinstance` asks for `__class__`, and a lazy object (Django's settings) sets itself up then.
    return type(candidate) is BuiltinFunctionType and candidate.__self__ is time and candidate.__name__ == "sleep"


def not_reached() -> tuple[str, ...]:
    """Names in modules that hold Python's own sleep, from before ``instrument``: ``legacy.worker.sleep``."""
    return tuple(sorted(f"{module}.{name}" for module, name in _plain_sleeps() if module != "time"))


def _plain_sleeps() -> Iterator[tuple[str, str]]:
    for module, found in list(sys.modules.items()):
        for name, value in list(_names_in(found).items()):
            if _is_pythons(value):
                yield module, name


def _names_in(module: object) -> dict[str, Any]:
    """Its names, without waking a lazy module, which loads itself when it is asked for anything."""
    try:
        names: dict[str, Any] = object.__getattribute__(module, "__dict__")
    except AttributeError:  # whatever somebody put into `sys.modules`
        return {}
    return names


PATCHES = Patches(Patch(time, "sleep", _sleep))
