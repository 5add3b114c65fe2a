"""The command line of the compatibility bench. The bench itself is not run here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_unknown_name_is_answered_with_the_known_ones():
    """Whoever mistypes a peer learns what there is, and nothing is run."""
    done = subprocess.run(
        [sys.executable, "-m", "compat", "--only", "nope"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no such cell" in done.stderr
    known = done.stderr.partition("one of: ")[2].strip().split(", ")
    assert {"gunicorn", "gunicorn-sync", "urllib3", "wsgiref"} <= set(known)
