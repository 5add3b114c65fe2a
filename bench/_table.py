"""What a row is, what its bar is, and how the table is printed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_COMPARE = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}

#: One round of everything in a contest: quantity -> value, in the unit of its row.
Round = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Size:
    """How much one run may do."""

    rounds: int = 7
    quick: bool = False
    cancels: int = 400  # of each leak run

    def of(self, full: int, quick: int) -> int:
        """The size of one loop."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Contest:
    """Something to measure, round after round. ``missing``: peers that are not installed, and why."""

    play: Round
    missing: Mapping[str, str] = field(default_factory=dict)
    rounds: int | None = None  # where more would only repeat the same


@dataclass(frozen=True)
class Bar:
    """``Bar("<=", 1.15)``: the ratio to the peer; ``Bar("<", 10, "ms")``: our own value."""

    sign: str
    limit: float
    unit: str | None = None

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g} {self.unit or 'x'}"

    def met(self, ours: float, ratio: float | None) -> bool | None:
        """Whether it is; None where the peer that it speaks of is missing."""
        value = ours if self.unit else ratio
        return None if value is None else bool(_COMPARE[self.sign](value, self.limit))


@dataclass(frozen=True)
class Row:
    """One line of the table. Rows of the same ``contest`` are measured together."""

    name: str
    what: str
    unit: str
    bar: Bar
    contest: Callable[[Size], AbstractContextManager[Contest]]
    ours: str = "ours"
    peer: str | None = None
    also: tuple[str, ...] = ()  # others that are told, without a bar
    more: bool = False  # a rate: more is better


@dataclass
class Result:
    """A row, measured."""

    row: Row
    ours: float | None = None  # median of the rounds
    peer: float | None = None
    ratio: float | None = None  # median of the rounds' ratios, ours / peer
    also: dict[str, float] = field(default_factory=dict)
    met: bool | None = None
    note: str = ""
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The shape that README.md describes."""
        row = self.row
        return {
            "name": row.name,
            "what": row.what,
            "unit": row.unit,
            "peer_name": row.peer,
            "ours": self.ours,
            "peer": self.peer,
            "ratio": self.ratio,
            "bar": str(row.bar),
            "met": self.met,
            "also": self.also,
            "note": self.note,
            "rounds": self.rounds,
        }


HEADER = ("row", "ours", "peer", "ratio", "bar", "met", "what, and beside it")


def cells(result: Result) -> tuple[str, ...]:
    """One line of the table, as text."""
    row = result.row
    peer = "-" if row.peer is None else f"{_number(result.peer)} ({row.peer})"
    ratio = "-" if result.ratio is None else f"{result.ratio:.2f}"
    met = {True: "yes", False: "NO", None: "?"}[result.met]
    beside = [row.what, *(f"{name} {_number(value)}" for name, value in result.also.items())]
    if result.note:
        beside.append(result.note)
    return row.name, f"{_number(result.ours)} {row.unit}", peer, ratio, str(row.bar), met, "; ".join(beside)


def lines(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, the last one ragged."""
    table = [HEADER, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER) - 1)]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in table]


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
