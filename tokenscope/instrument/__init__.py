"""Code that cannot be edited: `instrument` makes the libraries that it calls cancellable, in the whole process.

Each name in the table stands for patches that an integration brings. A library is imported when it is asked for, and
nothing is patched before all that was asked for has been imported and checked.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from tokenscope.instrument._report import InstrumentReport, UninstrumentReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope.integrations._patch import Patches

__all__ = ["InstrumentReport", "UninstrumentReport", "instrument", "uninstrument"]


@dataclass(frozen=True)
class _Entry:
    library: str  # its top-level module
    module: str  # ours, with `PATCHES`
    by_default: bool = False
    standard: bool = False  # of the standard library

    @property
    def installed(self) -> bool:
        return self.standard or importlib.util.find_spec(self.library) is not None

    @property
    def version(self) -> str:
        return platform.python_version() if self.standard else metadata.version(self.library)

    def patches(self) -> Patches:
        patches: Patches = importlib.import_module(self.module).PATCHES
        return patches

    def not_reached(self) -> tuple[str, ...]:
        look: Callable[[], tuple[str, ...]] = getattr(importlib.import_module(self.module), "not_reached", tuple)
        return look()


_TABLE = {
    "requests": _Entry("requests", "tokenscope.integrations.requests", by_default=True),
    "urllib3": _Entry("urllib3", "tokenscope.integrations.urllib3", by_default=True),
    "threading": _Entry("threading", "tokenscope.instrument._threading", standard=True),
    "time": _Entry("time", "tokenscope.instrument._time", standard=True),
}


def instrument(*names: str) -> InstrumentReport:
    """Make what these libraries block in end with the current token, in the whole process.

    Sessions and connection managers that exist already are reached too. Outside of any scope nothing changes.
    Idempotent, thread-safe.

    Args:
        names: ``"requests"`` and ``"urllib3"``; none means both of them, as far as they are installed. By name only:
            ``"time"``: ``time.sleep`` is a checkpoint, and ends with the token; ``"threading"``: bare threads and
            executors' work that are started in a scope are its children.

    Raises:
        ValueError: An unknown name; the message lists those there are. Nothing was changed.
        TypeError: A name is no str.
        ImportError: A library is there, but not in a version that can be guarded. Nothing was changed.
        TokenScopeError: urllib3's HTTP/2 mode is on. Nothing was changed.
    """
    for name in names:
        _check(name)
    wanted = dict.fromkeys(names) if names else [name for name, entry in _TABLE.items() if entry.by_default]
    there = {name: _TABLE[name].patches() for name in wanted if _TABLE[name].installed}
    new = {name: patches.turn_on(name) for name, patches in there.items()}
    return InstrumentReport(
        turned_on=tuple(name for name, was_off in new.items() if was_off),
        already_on=tuple(name for name, was_off in new.items() if not was_off),
        not_installed=tuple(name for name in wanted if name not in there),
        versions={name: _TABLE[name].version for name in there},
        not_reached=tuple(missed for name in there for missed in _TABLE[name].not_reached()),
    )


def uninstrument(*names: str) -> UninstrumentReport:
    """Undo `instrument` for these names; none means all. Idempotent, thread-safe.

    Every patched attribute is again the object that it was. One that somebody else has replaced since is left to them,
    which the report and the log tell (`RestoreRefused`); ours below it does nothing any more. Calls that are under way
    stay cancellable until they end.

    Raises:
        ValueError: An unknown name; the message lists those there are. Nothing was changed.
        TypeError: A name is no str.
    """
    for name in names:
        _check(name)
    turned_off: list[str] = []
    refused: dict[str, str] = {}
    for name in dict.fromkeys(names or _TABLE):
        if _TABLE[name].module not in sys.modules:
            continue  # it was never on
        held, found = _TABLE[name].patches().turn_off(name)
        turned_off += [name] * held
        refused |= found
    return UninstrumentReport(tuple(turned_off), refused)


def _check(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {name!r}; there are: {', '.join(_TABLE)}")
    if name not in _TABLE:
        raise ValueError(f"tokenscope cannot instrument {name!r}; there are: {', '.join(_TABLE)}")
