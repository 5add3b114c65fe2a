"""Where cells run: in a fresh environment, with the built wheel and the real versions of the peers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compat.matrix import LATEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compat.matrix import Cell

ROOT = Path(__file__).parents[1]

# Seconds for one run of pip, downloads included.
_PIP_PATIENCE = 300

# Python -> package -> its newest version; looked up once in a run.
_newest: dict[str, dict[str, str]] = {}

_REFUSED = re.compile(r"^\s+(\S+ \S+ depends on .+)$", re.MULTILINE)


class Refused(Exception):
    """pip knows that these versions exclude each other; the message is its reason."""


class Missing(Exception):
    """This machine cannot run the cell; the message says what it lacks."""


class Broken(Exception):
    """The wheel does not go together with versions that it claims to support."""


@dataclass
class Environment:
    """What several cells share: a Python, and a set of versions none of them minds."""

    python: str
    requirements: dict[str, str] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)  # what `make` asked pip for: nothing is "latest" any more

    def takes(self, cell: Cell) -> bool:
        """Take the cell in, if all its versions are here or were not asked for yet."""
        fits = self.python == cell.python and all(
            self.requirements.get(package, version) == version for package, version in cell.requirements.items()
        )
        if fits:
            self.requirements |= cell.requirements
            self.cells.append(cell)
        return fits


def shared(cells: Iterable[Cell]) -> list[Environment]:
    """Distribute cells over as few environments as their versions allow."""
    environments: list[Environment] = []
    for cell in cells:
        if not any(environment.takes(cell) for environment in environments):
            environments.append(Environment(cell.python))
            environments[-1].takes(cell)
    return environments


def build_wheel(folder: Path) -> Path:
    """Build the distribution as it is now, and return the wheel."""
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def make(environment: Environment, wheel: Path, folder: Path) -> Path:
    """Make the environment and return its interpreter.

    "latest" is looked up before anything is installed: pip would quietly take an older version to please a
    neighbour. Then the peers come first and alone: if they exclude each other, that is a fact about them. The
    wheel comes second, with the same versions asked for again: if it minds one of them, that is our bug.

    Raises:
        Missing: No such Python here, or the package index cannot be reached.
        Refused: The peers exclude each other.
        Broken: The wheel excludes one of them.
    """
    subprocess.run([find_python(environment.python), "-m", "venv", "--without-pip", folder], check=True)
    interpreter = folder / "bin" / "python"
    environment.versions = environment.requirements | _latest(environment, interpreter)
    wanted = [f"{package}=={version}" for package, version in environment.versions.items()]
    _pip("install", *wanted, into=interpreter)
    try:
        _pip("install", str(wheel), *wanted, into=interpreter)
    except Refused as why:
        raise Broken(f"the wheel does not go with {', '.join(wanted)}: {why}") from None
    return interpreter


def fetch_sources(package: str, version: str, folder: Path) -> Path:
    """Download the source distribution of a package, unpack it, and return where.

    Raises:
        Missing: The package index has none, or cannot be reached.
    """
    _pip("download", "--no-deps", "--no-binary", package, "--dest", str(folder), f"{package}=={version}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return archive.with_suffix("").with_suffix("")


def find_python(minor: str) -> Path:
    """Return an interpreter of this version, "3.12": the running one, pyenv's newest, or one on the PATH.

    Raises:
        Missing: There is none.
    """
    if minor == running_python():
        return Path(sys.executable)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = sorted(pyenv.glob(f"versions/{minor}.*/bin/python"), key=_patch, reverse=True)
    if on_path := shutil.which(f"python{minor}"):
        candidates.append(Path(on_path))
    for candidate in candidates:
        if _is_python(candidate, minor):
            return candidate
    raise Missing(f"no Python {minor} on this machine")


def running_python() -> str:
    """Return the version of this very Python, as in "3.11"."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _patch(python: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", python.parts[-3]))


def _is_python(candidate: Path, minor: str) -> bool:
    """Whether it runs (a pyenv shim of a version that is not selected does not), and is what it says."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == minor


def _latest(environment: Environment, interpreter: Path) -> dict[str, str]:
    """The newest version that the index has for this Python of each package that is not pinned."""
    known = _newest.setdefault(environment.python, {})
    packages = [package for package, version in environment.requirements.items() if version == LATEST]
    if unknown := [package for package in packages if package not in known]:
        found = interpreter.parent / "latest.json"
        _pip("install", "--dry-run", "--no-deps", "--report", str(found), *unknown, into=interpreter)
        installed = [entry["metadata"] for entry in json.loads(found.read_text(encoding="utf-8"))["install"]]
        known |= {metadata["name"].lower(): metadata["version"] for metadata in installed}
    return {package: known[package] for package in packages}


def _pip(command: str, *arguments: str, into: Path | None = None) -> None:
    target = [] if into is None else ["--python", str(into)]
    # Its own words are what is recorded, so it may not be told to keep quiet.
    environ = {name: value for name, value in os.environ.items() if name not in {"PIP_QUIET", "PIP_VERBOSE"}}
    environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pip", *target, "--no-input", command, *arguments],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PIP_PATIENCE,
        check=False,
    )
    if done.returncode == 0:
        return
    said = done.stdout + done.stderr
    if "ResolutionImpossible" in said:
        reasons = dict.fromkeys(" ".join(reason.split()) for reason in _REFUSED.findall(said))
        raise Refused("; ".join(reasons) or "pip finds no set of versions that go together")
    raise Missing(f"pip could not {command}: {_complaint(said)}")


def _complaint(said: str) -> str:
    """The line of pip's that tells most: its last error, or the last of all."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it says nothing"]
    return next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])


def versions_differ(asked: Mapping[str, str], ran: Mapping[str, str]) -> list[str]:
    """Say which versions that ran are not those that were asked for."""
    return [
        f"{package} {ran.get(package, 'nothing')} ran instead of {version}"
        for package, version in asked.items()
        if package not in ran or version not in {LATEST, ran[package]}
    ]
