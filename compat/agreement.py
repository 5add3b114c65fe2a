"""Whether matrix.toml, results.json, docs/support.md and pyproject.toml say the same about versions."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

from compat.matrix import LATEST, Matrix, load
from compat.report import ROOT, page, read_results
from compat.run import DISTRIBUTION
from compat.stories import STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    Record = Mapping[str, Any]


def disagreements(root: Path = ROOT) -> list[str]:
    """Return a sentence for each place where matrix, results, page and pyproject.toml do not agree."""
    matrix, records = load(root / "compat" / "matrix.toml"), read_results(root)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    support = root / "docs" / "support.md"
    return [
        *_unknown_limits(matrix),
        *_missing_records(matrix, records),
        *(found for record in records for found in _untrue(matrix, record, project["version"])),
        *_unproven_minimums(matrix, records, project),
        *_outdated_page(page(matrix, records), support),
    ]


def _unknown_limits(matrix: Matrix) -> Iterator[str]:
    for peer in matrix.peers:
        names = {step.name for step in STEPS[peer.kind]}
        for limit in peer.limits:
            if limit.step not in names:
                yield f"matrix.toml: {peer.name} has a limit for {limit.step!r}, which is no step"
            if not limit.reason.strip() or not limit.link.startswith("https://"):
                yield f"matrix.toml: {peer.name}'s limit for {limit.step!r} needs a reason and a link"


def _missing_records(matrix: Matrix, records: Sequence[Record]) -> Iterator[str]:
    recorded, known = {record["cell"] for record in records}, {cell.key for cell in matrix.cells}
    for key in sorted(known - recorded):
        yield f"results.json: {key} was never run; python -m compat --only {key.split(' ')[0]}"
    for key in sorted(recorded - known):
        yield f"results.json: {key} is in no row of matrix.toml"


def _untrue(matrix: Matrix, record: Record, version: str) -> Iterator[str]:
    """A record that claims more than was seen."""
    key, status = record["cell"], record["status"]
    if status != "pass":
        if not record.get("reason"):
            yield f"results.json: {key} is {status!r} without a reason"
        return
    for package, asked in record["versions"].items():
        if asked not in {LATEST, record["ran"].get(package)}:
            yield f"results.json: {key} passed with {package} {record['ran'].get(package)}"
    if not record["ran"]["python"].startswith(f"{record['python']}."):
        yield f"results.json: {key} passed on Python {record['ran']['python']}"
    if record["ran"][DISTRIBUTION] != version:
        yield f"results.json: {key} passed on tokenscope {record['ran'][DISTRIBUTION]}, this is {version}"
    kind = next((peer.kind for peer in matrix.peers if peer.name == record["peer"]), "server")
    if [step["step"] for step in record["steps"]] != [step.name for step in STEPS[kind]]:
        yield f"results.json: {key} was told another story than there is for a {kind}"
    limited = {limit.step for peer in matrix.peers if peer.name == record["peer"] for limit in peer.limits}
    for step in record["steps"]:
        allowed = "not applicable" if step["step"] in limited else "pass"
        if step["status"] != allowed:
            yield f"results.json: {key} passed, but {step['step']!r} is {step['status']!r}, not {allowed!r}"


def _unproven_minimums(matrix: Matrix, records: Sequence[Record], project: Mapping[str, Any]) -> Iterator[str]:
    """A minimum in pyproject.toml names the series of the oldest version in the matrix, which passes."""
    minimums = _minimums(project)
    for package in dict.fromkeys(package for peer in matrix.peers for package in peer.packages):
        minimum, oldest = minimums.get(package), _oldest(matrix, package)
        if minimum is None:
            yield f"pyproject.toml: no minimum version of {package}, which matrix.toml has cells for"
        elif not _in_series(oldest, minimum):
            yield f"matrix.toml: {package} begins at {oldest}, but pyproject.toml promises {minimum}"
        elif not _passes([record for record in records if record["versions"].get(package) == oldest]):
            yield f"results.json: {package} {oldest} does not pass, but pyproject.toml promises {minimum}"


def _oldest(matrix: Matrix, package: str) -> str:
    versions = {cell.versions[package] for cell in matrix.cells if package in cell.versions} - {LATEST}
    return min(versions, key=_numbers, default=LATEST)


def _passes(records: Sequence[Record]) -> bool:
    """Whether some of these cells pass, and no other is anything worse than impossible."""
    statuses = {record["status"] for record in records}
    return {"pass"} <= statuses <= {"pass", "not applicable"}


def _minimums(project: Mapping[str, Any]) -> dict[str, str]:
    """The lowest version of each package that any of the dependencies and extras allows."""
    extras = project.get("optional-dependencies", {}).values()
    found: dict[str, str] = {}
    for requirement in [*project.get("dependencies", ()), *(line for extra in extras for line in extra)]:
        read = re.match(r"([A-Za-z0-9._-]+).*?>=\s*([0-9.]+)", requirement)
        if read:
            package, minimum = read[1].lower(), read[2]
            found[package] = min(found.get(package, minimum), minimum, key=_numbers)
    return found


def _in_series(version: str, minimum: str) -> bool:
    """Whether the version is of the series that the minimum names: 2.28.2 is of 2.28, and of no other."""
    begin = _numbers(minimum)
    return _numbers(version)[: len(begin)] == begin


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _outdated_page(expected: str, path: Path) -> Iterator[str]:
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    if found != expected:
        yield "docs/support.md is not what results.json gives; python -m compat --write-page"
