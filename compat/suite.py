"""The story of an upstream project's own tests, in numbered steps: they pass as before with tokenscope in between.

They are run twice, from the source distribution of the very version that is installed: as they are, and with
`tokenscope.instrument()` active and each test under a token of its own, so that every call goes through the guards. A
test that passes the first time and not the second is a deviation; `matrix.toml` lists those that are on purpose, each
with its reason, and there may be no others.

Run by `run.py` in the environment of a cell: `python -m compat.suite TODO.json DONE.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compat.app import versions
from compat.query import tell
from compat.scenario import Steps

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

STEPS = Steps()
step = STEPS.step

#: Seconds for one test.
PATIENCE = 60


class Story:
    """The story while it is told to one project.

    Args:
        sources: The unpacked source distribution.
        arguments: What pytest is given: where the tests are, and which are left out.
        deviations: Names of tests, without parameters, that are known to fail, and why.
    """

    def __init__(self, sources: Path, arguments: Iterable[str], deviations: Mapping[str, str]) -> None:
        self._sources = sources
        self._arguments = list(arguments)
        self._deviations = deviations
        self._plain: dict[str, str] = {}
        self.seen: dict[str, dict[str, Any]] = {}  # more about some steps than whether they passed

    @step("plain", "the project's tests run from its sources, without tokenscope")
    def plain(self) -> None:
        self._plain = self._run(self._arguments, under=False)
        self.seen["plain"] = {"passed": len(_passed(self._plain))}
        assert _passed(self._plain), "no test passes"

    @step("guarded", "with tokenscope active they pass as well, but for those that are listed with a reason")
    def guarded(self) -> None:
        assert self._plain, "there is nothing to compare with"
        guarded = self._run(self._arguments, under=True)
        broken = self._broken(_passed(self._plain) - _passed(guarded))
        found = {name.partition("[")[0] for name in broken}
        passed = _passed(self._plain) - broken
        self.seen["guarded"] = {"passed": len(passed), "deviations": len(broken)}
        unknown, outdated = found - self._deviations.keys(), self._deviations.keys() - found
        assert not unknown, f"these fail, and nobody knows why: {', '.join(sorted(unknown))}"
        assert not outdated, f"these are said to fail, and pass: {', '.join(sorted(outdated))}"

    def _broken(self, suspects: set[str]) -> set[str]:
        """Which of these fail again under tokenscope, and pass again without it: not by chance, that is."""
        if not suspects:
            return set()
        chosen = sorted(suspects)
        again = _passed(self._run(chosen, under=True))
        return {name for name in _passed(self._run(chosen, under=False)) if name not in again}

    def _run(self, arguments: Iterable[str], *, under: bool) -> dict[str, str]:
        """Run the tests; how each of them ended."""
        with tempfile.TemporaryDirectory() as folder:
            outcomes = Path(folder) / "outcomes.json"
            subprocess.run(
                [
                    sys.executable,
                    *("-m", "pytest", "-q", "-p", "compat.suite_plugin", "-p", "no:cacheprovider"),
                    *("--timeout", str(PATIENCE), *arguments),
                ],
                cwd=self._sources,
                env={
                    **os.environ,
                    "PYTHONPATH": str(Path(__file__).parents[1]),
                    "COMPAT_OUTCOMES": str(outcomes),
                    "COMPAT_UNDER": "1" if under else "",
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
            assert outcomes.exists(), "pytest broke off"
            ended: dict[str, str] = json.loads(outcomes.read_text())
            return ended


def _passed(ended: Mapping[str, str]) -> set[str]:
    return {name for name, outcome in ended.items() if outcome == "passed"}


def main(todo: str, done: str) -> None:
    """Read what to do from one file, write what was seen into another."""
    task = json.loads(Path(todo).read_text())
    story = Story(Path(task["sources"]), task["driver"][1:], task["deviations"])
    records = tell(STEPS, story, task["limits"])
    told = [record | story.seen.get(record["step"], {}) for record in records]
    Path(done).write_text(json.dumps({"steps": told, "ran": versions()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
