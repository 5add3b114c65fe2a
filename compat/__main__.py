"""`python -m compat`: run the cells of the bench, record what was seen, write the support table.

Without options all cells of matrix.toml are run. `--quick` is for continuous integration: it records nothing.
Exit status: 0 if nothing failed, 1 if something did (with CI=true in the environment: or could not be run).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compat import agreement, environments, report
from compat.environments import Missing
from compat.matrix import load
from compat.run import Bench

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compat.matrix import Cell, Matrix

# Where --keep leaves environments and logs; the version control ignores it.
_KEPT = Path(__file__).parent / ".cells"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit status."""
    options = _parse(arguments)
    if options.check:
        return _check()
    if options.write_page:
        report.write([])
        return 0
    matrix = load()
    cells = _select(matrix, options)
    if not cells:
        print(f"matrix.toml has no such cell; --only takes one of: {', '.join(_names(matrix))}", file=sys.stderr)
        return 2
    try:
        records = _run(cells, keep=options.keep)
    except Missing as why:  # before there was anything to run
        print(f"no wheel: {why}", file=sys.stderr)
        return 1
    if not options.quick:
        report.write(records)
    return _summary(records)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m compat", description="Run the compatibility bench.")
    parser.add_argument("--only", metavar="NAME", action="append", help="a peer, its driver or one of its packages")
    parser.add_argument("--python", metavar="3.12", action="append", help="only the cells of this Python")
    parser.add_argument("--quick", action="store_true", help="what pip can install, on this Python; records nothing")
    parser.add_argument("--keep", action="store_true", help="leave environments and logs in compat/.cells")
    parser.add_argument("--check", action="store_true", help="run nothing: do matrix, results and pages agree?")
    parser.add_argument("--write-page", action="store_true", help="run nothing: write docs/support.md again")
    return parser.parse_args(arguments)


def _check() -> int:
    found = agreement.disagreements()
    for sentence in found:
        print(sentence)
    return 1 if found else 0


def _select(matrix: Matrix, options: argparse.Namespace) -> list[Cell]:
    pythons = [environments.running_python()] if options.quick else options.python
    return [
        cell
        for cell in matrix.cells
        if (not options.only or any(cell.answers_to(name) for name in options.only))
        and (not pythons or cell.python in pythons)
        and (cell.peer.quick or not options.quick)
    ]


def _names(matrix: Matrix) -> list[str]:
    """What `--only` knows: see `Cell.answers_to`."""
    return sorted({name for cell in matrix.cells for name in (cell.peer.name, cell.peer.driver[0], *cell.versions)})


def _run(cells: list[Cell], *, keep: bool) -> list[dict[str, Any]]:
    if keep:
        shutil.rmtree(_KEPT, ignore_errors=True)
        _KEPT.mkdir()
        return _run_in(_KEPT, cells)
    with tempfile.TemporaryDirectory(prefix="compat-") as folder:
        return _run_in(Path(folder), cells)


def _run_in(folder: Path, cells: list[Cell]) -> list[dict[str, Any]]:
    records = []
    began = time.monotonic()
    for record in Bench(load(), folder, lambda line: print(f"-- {line}", flush=True)).run(cells):
        print(_line(record), flush=True)
        records.append(record)
    print(f"-- {len(records)} cells in {time.monotonic() - began:.0f} s")
    return records


def _line(record: dict[str, Any]) -> str:
    """One line to send to somebody."""
    seconds = {step["step"]: step["seconds"] for step in record.get("steps", ()) if "seconds" in step}
    ran = " ".join(
        f"{package}={record.get('ran', {}).get(package, version)}" for package, version in record["versions"].items()
    )
    told = [
        record["status"],
        record["peer"],
        ran,
        f"on {record.get('ran', {}).get('python', record['python'])}",
    ]
    if "reason" in seconds:
        told.append(f"(all woken after {seconds['reason'] * 1000:.1f} ms)")
    if record.get("reason"):
        told.append(f"- {record['reason']}")
    return " ".join(part for part in told if part)


def _summary(records: list[dict[str, Any]]) -> int:
    bad = {"fail", "missing"} if os.environ.get("CI") == "true" else {"fail"}
    return 1 if any(record["status"] in bad for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
