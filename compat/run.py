"""Run cells: an environment for each set of versions, the story in it, and a record of what was seen."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compat import environments
from compat.environments import Broken, Environment, Missing, Refused
from compat.matrix import ALONE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from compat.matrix import Cell, Matrix

    Record = dict[str, Any]

# Seconds for one telling of the story; it takes about three, and that of a suite minutes.
_CELL_PATIENCE = {"suite": 900}
_USUAL_PATIENCE = 180

HERE = Path(__file__).parent

#: What pip calls tokenscope.
DISTRIBUTION = "tokenscope-threads"


#: The module that tells the story of each kind of peer.
STORIES = {
    "server": "compat.scenario",
    "client": "compat.scenario",
    "database": "compat.query",
    "service": "compat.service",
    "suite": "compat.suite",
}


def _answers(service: str) -> bool:
    """Whether somebody listens there."""
    host, _, port = service.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


class Bench:
    """Runs cells in a folder of its own.

    Args:
        matrix: Whose cells they are.
        folder: Where wheel, environments and logs go; empty.
        progress: Called with a line for people, now and then.
    """

    def __init__(self, matrix: Matrix, folder: Path, progress: Callable[[str], object]) -> None:
        self._matrix = matrix
        self._folder = folder
        self._progress = progress

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        """Run the cells, those that share an environment in a row, and yield a record of each."""
        self._progress("building the wheel")
        self._wheel = environments.build_wheel(self._folder / "wheel")
        # Told from a copy, beside which there is no `tokenscope` that could be imported by mistake.
        shutil.copytree(HERE, self._folder / "compat", ignore=shutil.ignore_patterns("__pycache__", ".*"))
        self._folders = (self._folder / f"environment-{number}" for number in itertools.count())
        for environment in environments.shared(cells):
            yield from self._run_together(environment)

    def _run_together(self, environment: Environment) -> Iterator[Record]:
        folder = next(self._folders)
        wanted = " ".join(f"{package}={version}" for package, version in environment.requirements.items())
        self._progress(f"Python {environment.python}: {wanted}")
        outcome, interpreter = self._make(environment, folder)
        if outcome.get("status") == "not applicable" and len(environment.cells) > 1:
            self._progress("these exclude each other: each cell alone")
            for cell in environment.cells:
                yield from self._run_together(Environment(cell.python, dict(cell.requirements), [cell]))
            return
        for cell in environment.cells:
            record = outcome or self._tell(cell, environment, interpreter, folder)
            yield _recorded(cell, record)

    def _make(self, environment: Environment, folder: Path) -> tuple[Record, Path]:
        """Return the interpreter, or what the lack of one means for all cells of this environment."""
        try:
            return {}, environments.make(environment, self._wheel, folder)
        except Refused as why:
            cell = environment.cells[0]
            asked = " with ".join(f"{package} {environment.versions[package]}" for package in cell.versions)
            return {"status": "not applicable", "reason": f"pip refuses {asked}: {why}"}, folder
        except Missing as why:
            return {"status": "missing", "reason": str(why)}, folder
        except Broken as why:
            return {"status": "fail", "reason": str(why)}, folder

    def _tell(self, cell: Cell, environment: Environment, interpreter: Path, folder: Path) -> Record:
        if absent := [program for program in cell.peer.needs if not shutil.which(program)]:
            return {"status": "missing", "reason": f"no {', '.join(absent)} on this machine"}
        if cell.peer.service and not _answers(cell.peer.service):
            return {"status": "missing", "reason": f"nobody listens on {cell.peer.service}"}
        todo, done = folder / "todo.json", folder / "done.json"
        try:
            todo.write_text(json.dumps(self._task(cell, environment, folder)))
        except Missing as why:
            return {"status": "missing", "reason": str(why)}
        done.unlink(missing_ok=True)
        said = self._scenario(interpreter, cell.peer.kind, todo, done)
        if not done.exists():
            return {"status": "fail", "reason": f"the story broke off: {said or 'without a word'}"}
        return _judged(cell, json.loads(done.read_text()), interpreter)

    def _task(self, cell: Cell, environment: Environment, folder: Path) -> Record:
        """What a story has to know."""
        limits = {limit.step: limit.reason for limit in cell.peer.limits}
        if cell.peer.kind == "suite":
            package = cell.peer.driver[0]
            sources = environments.fetch_sources(package, environment.versions[package], folder / f"{package}-sources")
            known = {test: found.reason for found in cell.peer.deviations for test in found.tests}
            return {"driver": cell.peer.driver, "limits": limits, "sources": str(sources), "deviations": known}
        if cell.peer.kind in ALONE:
            return {"driver": cell.peer.driver, "limits": limits}
        server, client = self._matrix.played(cell)
        return {"server": server.driver, "client": client.driver[0], "limits": limits}

    def _scenario(self, interpreter: Path, kind: str, todo: Path, done: Path) -> str:
        """Tell the story in a process of the environment; the last line that it said in its despair."""
        environ = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
        process = subprocess.Popen(
            [interpreter, "-m", STORIES[kind], todo, done],
            cwd=self._folder,
            env={**environ, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        patience = _CELL_PATIENCE.get(kind, _USUAL_PATIENCE)
        try:
            said, _ = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.terminate()  # it takes its server with it
            said, _ = process.communicate()
            said += f"\nstill running after {patience} s"
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if said.strip():
            self._progress(said.rstrip())
        return said.strip().rpartition("\n")[2]


def _judged(cell: Cell, told: Record, interpreter: Path) -> Record:
    """One status for the whole cell: a story is as good as its worst step, and only about what really ran."""
    failed = [step for step in told["steps"] if step["status"] == "fail"]
    reasons = environments.versions_differ(cell.versions, told["ran"])
    if failed:
        reasons.append(f"{failed[0]['step']}: {failed[0]['reason']}")
    judged = {
        "status": "fail" if reasons else "pass",
        "ran": {
            "python": _python_version(interpreter),
            **{package: told["ran"].get(package, "") for package in (*cell.requirements, DISTRIBUTION)},
        },
        "steps": told["steps"],
    }
    return {**judged, "reason": "; ".join(reasons)} if reasons else judged


def _recorded(cell: Cell, record: Record) -> Record:
    return {
        "cell": cell.key,
        "peer": cell.peer.name,
        "versions": dict(cell.versions),
        "python": cell.python,
        "platform": _platform(),
        "date": datetime.now(UTC).date().isoformat(),
        **record,
    }


def _platform() -> str:
    """The system, its kernel (the watch lives on what epoll does) and the machine."""
    release = ".".join(platform.release().split("-")[0].split(".")[:2])
    return f"{platform.system()} {release} {platform.machine()}"


def _python_version(interpreter: Path) -> str:
    code = "import platform; print(platform.python_version())"
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
