"""results.json -> docs/support.md. The same results give the same page, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compat.matrix import load
from compat.run import DISTRIBUTION
from compat.stories import STEPS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from compat.matrix import Cell, Matrix

    Record = Mapping[str, Any]

ROOT = Path(__file__).parents[1]

# Steps whose seconds are worth a column, and its heading, for each kind of peer.
_EXCHANGE = {
    "reason": "all woken",
    "joined": "all joined",
    "upstream": "upstream closed",
    "stream": "stream ended",
    "deadline": "504 after deadline",
    "shutdown": "shutdown",
}
_COLUMNS = {
    "server": _EXCHANGE,
    "client": _EXCHANGE,
    "database": {"cut": "woken", "server": "server idle", "deadline": "after deadline", "deaf server": "deaf server"},
    "service": {"cut": "woken", "server": "service let go", "deadline": "after deadline"},
}

_TITLES = {"server": "Servers", "client": "Clients", "database": "Databases", "service": "Services"}

_STORIES = {
    "server": "The story",
    "database": "The story of a database driver",
    "service": "The story of a service's client",
    "suite": "The story of a project's own tests",
}

_HEAD = """\
# What is supported, and where that was seen

*Generated from `compat/results.json`. Do not edit: run `python -m compat` (see `compat/README.md`).*

Each row is one telling of a story (below) to the real versions in it, with the wheel of tokenscope {tokenscope}.
A row passes if every step does. Times are milliseconds on the machine of that day, medians where a step is
repeated: from the visitor's hang-up (or the deadline, the cancel) to the *last* of its effects, seen from outside
of the process. They tell "at once" from "sooner or later"; `bench/` measures how fast it can be.
"""

_STATUS = {"pass": "pass", "fail": "**FAIL**", "missing": "not run", "not applicable": "n/a"}


# --- results.json -------------------------------------------------------------------------------------------


def read_results(root: Path = ROOT) -> list[dict[str, Any]]:
    """Return the records of all cells; none before the first run."""
    path = root / "compat" / "results.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["cells"]) if path.exists() else []


def write(new: Iterable[dict[str, Any]], root: Path = ROOT) -> None:
    """Put new records in the place of old ones, drop those of no cell, and write the page."""
    matrix = load(root / "compat" / "matrix.toml")
    known = {record["cell"]: record for record in (*read_results(root), *new)}
    cells = [known[cell.key] for cell in matrix.cells if cell.key in known]
    text = json.dumps({"cells": cells}, indent=1, ensure_ascii=False) + "\n"
    (root / "compat" / "results.json").write_text(text, encoding="utf-8")
    (root / "docs" / "support.md").write_text(page(matrix, cells), encoding="utf-8")


# --- docs/support.md ----------------------------------------------------------------------------------------


def page(matrix: Matrix, records: Sequence[Record]) -> str:
    """Return docs/support.md."""
    ran = sorted({record["ran"][DISTRIBUTION] for record in records if "ran" in record})
    parts = [
        _HEAD.format(tokenscope=", ".join(ran) or "(never)"),
        *_tables(matrix, records),
        *_suites(matrix, records),
        *_unhappy(records),
        *_limits(matrix),
        _story(),
    ]
    return "\n".join(parts)


def _tables(matrix: Matrix, records: Sequence[Record]) -> Iterator[str]:
    cells = {cell.key: cell for cell in matrix.cells}
    for kind, title in _TITLES.items():
        columns = _COLUMNS[kind]
        rows = [
            _row(cells[record["cell"]], record, columns)
            for record in records
            if record["cell"] in cells and cells[record["cell"]].peer.kind == kind
        ]
        yield f"## {title}\n"
        yield _table([kind, "Python", "result", *(f"{heading}, ms" for heading in columns.values()), "seen"], rows)


def _suites(matrix: Matrix, records: Sequence[Record]) -> Iterator[str]:
    """What other projects' own tests say, and where they say something else than before."""
    cells = {cell.key: cell for cell in matrix.cells}
    rows = [
        _suite_row(cells[record["cell"]], record)
        for record in records
        if record["cell"] in cells and cells[record["cell"]].peer.kind == "suite"
    ]
    yield "## Upstream suites\n"
    head = ["tests of", "Python", "result", "pass without tokenscope", "of these, with it", "deviations", "seen"]
    yield _table(head, rows)
    yield "Each deviation, and why it is right:\n"
    yield (
        "\n".join(
            f"- {peer.driver[0]}, {', '.join(f'`{_function(test)}`' for test in found.tests)}: {found.reason}"
            for peer in matrix.peers
            for found in peer.deviations
        )
        + "\n"
    )


def _function(test: str) -> str:
    return test.rpartition("::")[2]


def _suite_row(cell: Cell, record: Record) -> list[str]:
    steps = {step["step"]: step for step in record.get("steps", ())}
    return [
        _name(cell, record),
        record.get("ran", {}).get("python", cell.python),
        _STATUS[record["status"]],
        *(
            str(steps.get(step, {}).get(number, "-"))
            for step, number in (("plain", "passed"), ("guarded", "passed"), ("guarded", "deviations"))
        ),
        f"{record['date']}, {record['platform']}",
    ]


def _row(cell: Cell, record: Record, columns: Mapping[str, str]) -> list[str]:
    steps = {step["step"]: step for step in record.get("steps", ())}
    return [
        _name(cell, record),
        record.get("ran", {}).get("python", cell.python),
        _STATUS[record["status"]],
        *(_milliseconds(steps.get(step, {})) for step in columns),
        f"{record['date']}, {record['platform']}",
    ]


def _name(cell: Cell, record: Record) -> str:
    """What ran, or should have run. The server's cells name the server, the client's every package of it."""
    ran = record.get("ran", {})
    versions = [f"{package} {ran.get(package, version)}" for package, version in cell.versions.items()]
    if cell.peer.kind != "server":
        return ", ".join(versions)
    own = [ran.get(package, version) for package, version in cell.versions.items()]
    return " ".join([cell.peer.name, *(own or ["(standard library)"])])


def _milliseconds(step: Record) -> str:
    if "seconds" in step:
        return f"{step['seconds'] * 1000:.1f}"
    return "**FAIL**" if step.get("status") == "fail" else "-"


def _unhappy(records: Sequence[Record]) -> Iterator[str]:
    """Whatever is not green, with its reason; nobody should have to look for it."""
    for status, title in (
        ("fail", "What fails"),
        ("missing", "What could not be run"),
        ("not applicable", "What excludes each other"),
    ):
        found = [f"- {record['cell']}: {record.get('reason')}" for record in records if record["status"] == status]
        if found:
            yield f"## {title}\n"
            yield "\n".join(found) + "\n"


def _limits(matrix: Matrix) -> Iterator[str]:
    yield "## Steps that cannot be told\n"
    yield (
        "\n".join(
            f"- {peer.name}, *{limit.step}*: {limit.reason} ([why]({limit.link}))"
            for peer in matrix.peers
            for limit in peer.limits
        )
        + "\n"
    )


def _story() -> str:
    return "\n".join(
        f"## {title}\n\n" + "\n".join(f"{step.number}. *{step.name}*: {step.claim}." for step in STEPS[kind]) + "\n"
        for kind, title in _STORIES.items()
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
