"""What is said about supported versions is what was seen.

compat/matrix.toml, compat/results.json, docs/support.md and the minimum versions in pyproject.toml have to
agree. The bench itself is not run here (`python -m compat` does that), but for a story that must end badly.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def agreement():
    """The bench's own judge, loaded by its path: the folder around it must not get into sys.path."""
    spec = importlib.util.spec_from_file_location("compat", ROOT / "compat" / "__init__.py")
    sys.modules["compat"] = importlib.util.module_from_spec(spec)
    try:
        yield importlib.import_module("compat.agreement")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "compat"]:
            del sys.modules[name]


@pytest.fixture
def copy(tmp_path):
    """All files that have to agree, to be spoilt."""
    (tmp_path / "compat").mkdir()
    (tmp_path / "docs").mkdir()
    for name in ("pyproject.toml", "compat/matrix.toml", "compat/results.json", "docs/support.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def spoil(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path.name} does not say {old!r} any more"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def records(copy):
    return json.loads((copy / "compat" / "results.json").read_text(encoding="utf-8"))["cells"]


def keep(copy, cells):
    (copy / "compat" / "results.json").write_text(json.dumps({"cells": cells}), encoding="utf-8")


def first_green(cells):
    return next(cell for cell in cells if cell["status"] == "pass")


def complaints(agreement, copy):
    """What is wrong besides the page, which every change of the results makes outdated."""
    return [found for found in agreement.disagreements(copy) if not found.startswith("docs/support.md")]


def test_matrix_results_page_and_minimum_versions_agree(agreement):
    """The support table says what was measured, about every version that is claimed."""
    assert agreement.disagreements(ROOT) == []


def test_a_page_that_was_edited_by_hand_is_found(agreement, copy):
    """docs/support.md is generated to the byte."""
    spoil(copy / "docs" / "support.md", "| pass |", "| pass! |")
    assert ["docs/support.md" in found for found in agreement.disagreements(copy)] == [True]


def test_a_cell_that_was_never_run_is_found(agreement, copy):
    """A row of the matrix without a result is a claim without proof."""
    cells = records(copy)
    keep(copy, cells[1:])
    (found,) = complaints(agreement, copy)
    assert cells[0]["cell"] in found
    assert "never run" in found


def test_a_result_of_no_cell_is_found(agreement, copy):
    """A row that has left the matrix leaves the table."""
    spoil(
        copy / "compat" / "matrix.toml",
        'waitress = "latest" }, python = ["3.11", ',
        'waitress = "latest" }, python = [',
    )
    (found,) = complaints(agreement, copy)
    assert "waitress=latest on 3.11 is in no row" in found


def test_a_minimum_that_was_never_run_is_found(agreement, copy):
    """pyproject.toml cannot promise a version that no cell has."""
    spoil(copy / "pyproject.toml", '"waitress>=3.0"', '"waitress>=2.1"')
    (found,) = complaints(agreement, copy)
    assert "waitress" in found
    assert "2.1" in found


@pytest.mark.parametrize("requirement", ['"requests>=2.28,<3"', '"urllib3>=1.26,<3"'])
def test_a_dependency_without_a_minimum_is_found(agreement, copy, requirement):
    """What the wheel depends on has a lowest version, and a cell proves it."""
    name = requirement.strip('"').partition(">")[0]
    text = (copy / "pyproject.toml").read_text(encoding="utf-8").replace(f'"{name}>=', f'"{name}<=')
    (copy / "pyproject.toml").write_text(text, encoding="utf-8")
    (found,) = complaints(agreement, copy)
    assert f"no minimum version of {name}" in found


def test_a_minimum_whose_cells_fail_is_found(agreement, copy):
    """A red cell may stay in the table, but what it disproves may not be promised."""
    cells = records(copy)
    for cell in cells:
        if cell["versions"].get("gunicorn") == "21.2.0":
            cell |= {"status": "fail", "reason": "reason: it took 3.0 s"}
    keep(copy, cells)
    (found,) = complaints(agreement, copy)
    assert "gunicorn 21.2.0 does not pass" in found


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda cell: cell["ran"].update(python="3.9.1"), "passed on Python 3.9.1"),
        (lambda cell: cell["ran"].update({"tokenscope-threads": "0.0.1"}), "passed on tokenscope 0.0.1"),
        (lambda cell: cell["steps"].pop(), "told another story"),
        (lambda cell: cell["steps"][0].update(status="fail", reason="?"), "'start' is 'fail'"),
        (lambda cell: cell["steps"][0].update(status="not applicable"), "'start' is 'not applicable'"),
        (lambda cell: cell.update(status="missing"), "without a reason"),
    ],
)
def test_a_result_that_claims_more_than_was_seen_is_found(agreement, copy, change, complaint):
    """A cell is green only if this version of everything really ran, and every step held."""
    cells = records(copy)
    change(first_green(cells))
    keep(copy, cells)
    assert any(complaint in found for found in complaints(agreement, copy))


def test_a_version_that_did_not_run_cannot_pass(agreement, copy):
    """The version in the row is the version that was imported."""
    cells = records(copy)
    pinned = next(cell for cell in cells if cell["versions"].get("waitress") == "3.0.0")
    pinned["ran"]["waitress"] = "3.0.2"
    keep(copy, cells)
    assert any("passed with waitress 3.0.2" in found for found in complaints(agreement, copy))


def test_a_limit_needs_a_step_a_reason_and_a_link(agreement, copy):
    """'Not possible' is a sentence with a proof, about something that is told."""
    spoil(copy / "compat" / "matrix.toml", 'step = "neighbour"', 'step = "neighbor"')
    spoil(copy / "compat" / "matrix.toml", 'link = "https://', 'link = "')
    found = complaints(agreement, copy)
    assert any("'neighbor', which is no step" in sentence for sentence in found)
    assert any("needs a reason and a link" in sentence for sentence in found)


@pytest.mark.parametrize("page", sorted((ROOT / "tokenscope" / "integrations").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_an_integration_names_cells_that_exist(agreement, page):
    """The `compat:` line at the head of an integration points into the matrix, or to a file of tests."""
    matrix = agreement.load(ROOT / "compat" / "matrix.toml")
    known = {f"{package}-{version}" for cell in matrix.cells for package, version in cell.versions.items()}
    known |= {peer.name for peer in matrix.peers}
    known |= {str(test.relative_to(ROOT)) for test in ROOT.glob("tests/integrations/test_*.py")}
    (line,) = re.findall(r"^compat: +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.split(r",? and |, each with |, ", line)) <= known


def test_the_bench_can_say_no(tmp_path):
    """Told to an app outside of tokenscope, the story comes to a bad end at every step that needs it."""
    shutil.copytree(ROOT / "compat", tmp_path / "compat", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    spoil(tmp_path / "compat" / "app.py", "return RequestScopeMiddleware(page, **settings)", "return page")
    # The wheel is not what is tested here; and without a scope the app cannot even begin to wait.
    spoil(tmp_path / "compat" / "scenario.py", "assert where.is_relative_to(sys.prefix)", "assert True")
    program = (
        "import json, sys; from pathlib import Path; from compat.scenario import perform;"
        "print(json.dumps(perform(['wsgiref'], 'requests', {}, Path('.'), patience=2.0)[0]))"
    )
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=55,
        check=True,
    )
    held = {step["step"]: step["status"] == "pass" for step in json.loads(told.stdout)}
    assert [step for step, passed in held.items() if passed] == ["start", "next", "shutdown"]
