"""What `instrument` and `uninstrument` did, for people and for logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["InstrumentReport", "UninstrumentReport"]


@dataclass(frozen=True)
class InstrumentReport:
    """What one call of `instrument` did.

    Attributes:
        turned_on: Names that this call turned on.
        already_on: Names that were on before.
        not_installed: Names whose library is not there; nothing was done for them.
        versions: Of the library behind each name that is on; Python's own for what is of the standard library.
        not_reached: Names in modules that hold the original, as ``legacy.worker.sleep`` does after ``from time import
            sleep``: what is called by them is as before. Only what can be seen in modules is listed.
    """

    turned_on: tuple[str, ...]
    already_on: tuple[str, ...]
    not_installed: tuple[str, ...]
    versions: Mapping[str, str]
    not_reached: tuple[str, ...] = ()

    def __str__(self) -> str:
        return _sentence(
            ("turned on", [f"{name} {self.versions[name]}" for name in self.turned_on]),
            ("already on", [f"{name} {self.versions[name]}" for name in self.already_on]),
            ("not installed", self.not_installed),
            ("not reached", self.not_reached),
        )


@dataclass(frozen=True)
class UninstrumentReport:
    """What one call of `uninstrument` did.

    Attributes:
        turned_off: Names that this call turned off.
        refused: Attributes that somebody else replaced after us, and what is there now. They were left alone; what is
            ours below does nothing any more.
    """

    turned_off: tuple[str, ...]
    refused: Mapping[str, str]

    def __str__(self) -> str:
        return _sentence(
            ("turned off", self.turned_off),
            ("not restored", [f"{attribute} (now {found})" for attribute, found in self.refused.items()]),
        )


def _sentence(*parts: tuple[str, tuple[str, ...] | list[str]]) -> str:
    return "; ".join(f"{what}: {', '.join(which)}" for what, which in parts if which) or "nothing to do"
