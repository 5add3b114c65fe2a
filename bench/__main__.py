"""`python -m bench [--only ROW] [--rounds N] [--quick] [--json FILE]`: print the table. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import tokenscope
from bench._rounds import measure
from bench._table import Result, Row, Size, cells, lines
from bench.rows import ROWS


def main(arguments: list[str] | None = None) -> int:
    """Run the rows, print the table; 1 if a row broke (a missed bar is no failure), else 0."""
    options = _parse(arguments)
    rows = _chosen(options.only)
    size = Size(rounds=options.rounds or (1 if options.quick else 7), quick=options.quick, cancels=options.cancels)
    results = []
    for result in measure(rows, size):
        results.append(result)
        print(f"{result.row.name} ...", file=sys.stderr, flush=True)
    about = _about(size)
    print("{python} on {machine}, {cpus} cpus, load {load}, {rounds} rounds".format(**about))
    print("\n".join(lines(map(cells, results))))
    if options.json:
        _write(options.json, about, results)
    return int(any(result.ours is None for result in results))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="What tokenscope costs, beside its peers.")
    parser.add_argument("--only", action="append", metavar="ROW", help="rows whose name begins so; may be repeated")
    parser.add_argument("--rounds", type=int, metavar="N", help="interleaved rounds of each row (7)")
    parser.add_argument("--quick", action="store_true", help="tiny loops and one round: does it run, not how fast")
    parser.add_argument("--cancels", type=int, default=400, metavar="N", help="random cancels of each leak run (400)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--list", action="version", version="\n".join(row.name for row in ROWS), help="name the rows")
    options = parser.parse_args(arguments)
    for name in ("rounds", "cancels"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be 1 or more, not {value}")
    return options


def _chosen(only: list[str] | None) -> list[Row]:
    chosen = [row for row in ROWS if only is None or any(row.name.startswith(word) for word in only)]
    if not chosen:
        names = ", ".join(row.name for row in ROWS)
        raise SystemExit(f"no row begins with {' or '.join(only or ())}; there are: {names}")
    return chosen


def _about(size: Size) -> dict[str, Any]:
    return {
        "tokenscope": tokenscope.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rounds": size.rounds,
        "quick": size.quick,
    }


def _write(file: Path, about: dict[str, Any], results: list[Result]) -> None:
    file.write_text(json.dumps({"about": about, "rows": [r.as_json() for r in results]}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
