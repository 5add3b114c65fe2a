"""Each program in examples/ runs, and prints what the comment at its end says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from outputs import agrees

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

# The file is loaded as a module first: importing an example must start nothing.
RUNNER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("example", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["example"] = module
spec.loader.exec_module(module)
print("\\x1e", end="", flush=True)
sys.exit(module.main())
"""

TRAILER = re.compile(r"^# Expected output:\n(?P<lines>(?:^#.*\n?)+)\Z", re.MULTILINE)


def run(path: Path) -> tuple[str, str]:
    """Return what importing an example printed, and what its `main()` did."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER, str(path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, f"{path.name} ends with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    imported, _, main = done.stdout.partition("\x1e")
    return imported, main


def expected(source: str) -> str | None:
    """Return the output promised in the comment that ends a program, if it has one."""
    trailer = TRAILER.search(source)
    if trailer is None:
        assert "expected output" not in source.lower(), "`# Expected output:` must head the last lines of the file"
        return None
    return re.sub(r"^# ?", "", trailer["lines"], flags=re.MULTILINE)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_prints_what_it_says(path):
    """A reader who runs the file sees what its last comment shows."""
    imported, printed = run(path)
    assert imported == ""
    promised = expected(path.read_text(encoding="utf-8"))
    assert promised is None or agrees(printed, promised), printed


def test_the_promised_output_is_read_from_the_end_of_the_file():
    """A trailing comment is taken as it would be printed."""
    assert expected("x = 1\n\n# Expected output:\n# one\n#\n#   two ...\n") == "one\n\n  two ...\n"
    assert expected("x = 1\n") is None


def test_a_misplaced_promise_is_refused():
    """An output that would not be compared must not look as if it were."""
    with pytest.raises(AssertionError, match="last lines"):
        expected("# Expected output:\n# one\n\nx = 1\n")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def main(): return 3\n", "ends with 3"),
        ("def main(): raise RuntimeError('broken')\n", "broken"),
        ("import warnings\ndef main(): warnings.warn('old')\n", "UserWarning"),
        ("", "no attribute 'main'"),
    ],
)
def test_a_broken_example_is_found(tmp_path, source, complaint):
    """A failure, a warning, a non-zero answer and a missing `main` are all told."""
    path = tmp_path / "broken.py"
    path.write_text(source, encoding="utf-8")
    with pytest.raises(AssertionError, match=complaint):
        run(path)


def test_flask_example_without_flask_names_the_extra():
    """Who runs it without Flask reads in the last line what to install."""
    program = "import runpy, sys; sys.modules['flask'] = None; runpy.run_path(sys.argv[1])"
    example = next(path for path in EXAMPLES if path.name == "flask_chat.py")
    done = subprocess.run(
        [sys.executable, "-c", program, str(example)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.stderr.splitlines()[-1].endswith("pip install 'tokenscope-threads[flask]'")
