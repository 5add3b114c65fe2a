"""The bench runs and tells what its README says; how fast anything is, is not tested here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {
    "check",
    "check-deep",
    "child",
    "child-bytes",
    "cancel-leaves",
    "cancel-chain",
    "spawn",
    "failing-child",
    "sleepers",
    "slow-callback",
    "offload",
}
HTTP = {
    *(
        f"{what}{phase}-{client}{share}"
        for what in ("cancel", "close")
        for phase, clients in (("", ("requests", "httpx", "openai", "anthropic")), ("-body", ("requests", "httpx")))
        for client in clients
        for share in ("", "-p99")
    ),
    "keep-alive-requests",
    "keep-alive-httpx",
}
ABOUT = {"tokenscope", "python", "machine", "cpus", "load", "at", "rounds", "quick"}
ROW = {"name", "what", "unit", "peer_name", "ours", "peer", "ratio", "bar", "met", "also", "note", "rounds"}


def bench(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "bench", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """What a quick run of the core's rows prints and writes."""
    file = tmp_path_factory.mktemp("bench") / "numbers.json"
    done = bench("--quick", "--json", str(file), *(f"--only={name}" for name in CORE))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(CORE))
def test_a_row_of_the_core_runs(core, name):
    """Each row about the core measures something, and compares it with a peer that is there."""
    printed, written = core
    (row,) = (row for row in written["rows"] if row["name"] == name)
    assert row["ours"] > 0, row
    assert row["rounds"]["ours" if name != "check-deep" else "deep"], row
    assert row["peer"] or row["peer_name"] is None or "not installed" in row["note"], row
    assert any(line.split()[:1] == [name] for line in printed.splitlines()), printed


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    """What a quick run of the rows about HTTP clients writes, with two libraries missing."""
    folder = tmp_path_factory.mktemp("bench")
    for library in ("aiohttp", "anthropic"):
        text = f"raise ModuleNotFoundError('No module named {library}', name='{library}')"
        (folder / f"{library}.py").write_text(text, encoding="utf-8")
    file = folder / "numbers.json"
    done = bench("--quick", "--json", str(file), *(f"--only={name}" for name in HTTP), PYTHONPATH=str(folder))
    assert done.returncode == 1, done.stdout + done.stderr  # what was to be measured is not there
    return {row["name"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}


@pytest.mark.parametrize("name", sorted(name for name in HTTP if "anthropic" not in name))
def test_a_row_about_http_clients_runs(http, name):
    """Each of our HTTP clients is measured beside its peer; a peer that is missing is said in the row."""
    row = http[name]
    assert row["ours"] > 0, row
    assert row["peer"] > 0, row
    assert row["met"] is not None
    assert name.startswith("keep-alive") or "aiohttp is not installed" in row["note"], row


def test_a_client_that_is_missing_hides_no_other(http):
    """A client of ours whose library is not installed leaves rows that say so, and nothing else is lost."""
    assert http.keys() == HTTP
    for name in (name for name in HTTP if "anthropic" in name):
        assert http[name]["ours"] is None
        assert "anthropic" in http[name]["note"]
        assert "install" in http[name]["note"]


def test_the_json_has_the_documented_shape(core):
    """A program can rely on the keys that the README of the bench lists."""
    _, written = core
    assert set(written) == {"about", "rows"}
    assert set(written["about"]) == ABOUT
    assert all(set(row) == ROW for row in written["rows"])
    assert {row["name"] for row in written["rows"]} == CORE
    readme = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert all(f'"{key}"' in readme for key in ABOUT | ROW)


def test_a_missing_peer_is_said_in_its_row(tmp_path):
    """A peer that is not installed leaves a row that says so, and decides nothing."""
    (tmp_path / "cantok.py").write_text("raise ModuleNotFoundError('No module named cantok', name='cantok')")
    file = tmp_path / "numbers.json"
    done = bench("--quick", "--only=child", "--json", str(file), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(file.read_text(encoding="utf-8"))["rows"][0]
    assert "cantok is not installed (pip install cantok)" in row["note"]
    assert (row["peer"], row["ratio"], row["met"]) == (None, None, None)


def test_a_row_that_breaks_hides_no_other(tmp_path):
    """An error in one row is told in it, the others are measured, and the status is 1."""
    (tmp_path / "cantok.py").write_text("def SimpleToken(*parents): raise ZeroDivisionError")
    file = tmp_path / "numbers.json"
    done = bench("--quick", "--only=child", "--only=spawn", "--json", str(file), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert "broken: ZeroDivisionError" in rows["child"]["note"]
    assert rows["spawn"]["ours"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--only=nonsense",), "no row begins with nonsense"),
        (("--rounds=0",), "--rounds must be 1 or more, not 0"),
    ],
)
def test_a_bad_argument_of_the_bench_is_named(arguments, complaint):
    """What cannot be done is said, not guessed."""
    done = bench(*arguments)
    assert done.returncode != 0
    assert complaint in done.stderr
