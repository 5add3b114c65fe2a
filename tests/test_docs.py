"""Whatever a reader may copy out of the documentation was run.

* Each fenced `python` block of README.md and docs/ runs in a fresh interpreter, warnings being errors.
* `<!-- continue -->` on the line before a fence: the block goes on where the one before it in the file ended.
* `<!-- output -->` on the line before a `text` fence: what the block before it prints; `...` stands for
  anything within a line.
* There is no mark for "do not run this". What cannot run is not a program, and is fenced as what it is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from outputs import agrees

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What a fence may call itself. Anything else (`py`, `pycon`, nothing at all) might be code that nobody runs.
LANGUAGES = {"python", "text", "sh", "toml", "ini", "json", "http", "sql", "diff", "mermaid"}

FENCE = re.compile(
    r"(?:^[ ]*<!--[ ]*(?P<mark>[^\n]*?)[ ]*-->[ ]*\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>[^\n`]*)\n(?P<body>.*?)^[ ]*```[ ]*$",
    re.MULTILINE | re.DOTALL,
)

# Runs blocks one after another in one namespace. A traceback names the page and counts its lines.
RUNNER = """
import json, sys
page, blocks = json.load(sys.stdin)
namespace = {"__name__": "__main__"}
for line, body in blocks:
    exec(compile("\\n" * line + body, page, "exec"), namespace)
    print("\\x1e", end="", flush=True)
"""


@dataclass
class Block:
    """A piece of Python in a page, and what the page says it prints."""

    line: int  # of the opening fence, counted from 1
    body: str
    output: str | None = None


@dataclass
class Story:
    """Blocks that share a namespace."""

    page: str
    blocks: list[Block] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the page and the line where the story begins."""
        return f"{self.page}:{self.blocks[0].line}"


def stories(page: str, text: str) -> list[Story]:
    """Return the stories that a page tells, and refuse a page that could hide one."""
    refuse_loose_ends(page, text)
    told: list[Story] = []
    block: Block | None = None  # the Python block just before, which an output belongs to
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start("language")) + 1
        language, mark = fence["language"].strip(), fence["mark"]
        if language not in LANGUAGES:
            raise ValueError(f"{page}:{line}: a fence says {language!r}; it may say {sorted(LANGUAGES)}")
        if language == "python":
            block = Block(line, dedented(fence))
            if mark == "continue":
                continued(told, f"{page}:{line}").blocks.append(block)
            else:
                told.append(Story(page, [block]))
        elif mark == "output":
            if block is None or language != "text":
                raise ValueError(f"{page}:{line}: an output is a text fence and follows a python fence")
            block.output, block = dedented(fence), None
        else:
            block = None
    return told


def refuse_loose_ends(page: str, text: str) -> None:
    """Refuse a fence that is not closed, and a mark that is not on the line before a fence."""
    fences = list(FENCE.finditer(text))
    ticks = len(re.findall(r"^[ ]*(?:```|~~~)", text, re.MULTILINE))
    if ticks != 2 * len(fences):
        raise ValueError(f"{page}: a fence is not closed, or is not made of three backticks")
    marks = len(re.findall(r"<!--[ ]*(?:continue|output)\b", text))
    if marks != sum(fence["mark"] in {"continue", "output"} for fence in fences):
        raise ValueError(f"{page}: a mark does not stand on the line before a fence")


def continued(told: list[Story], place: str) -> Story:
    """Return the story that a continuing block belongs to."""
    if not told:
        raise ValueError(f"{place}: nothing before it to continue")
    return told[-1]


def dedented(fence: re.Match[str]) -> str:
    """Return what a fence contains, without the indentation of the fence."""
    return re.sub(rf"^{fence['indent']}", "", fence["body"], flags=re.MULTILINE)


def tell(story: Story) -> list[str]:
    """Run a story and return what each block printed."""
    blocks = [(block.line, block.body) for block in story.blocks]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=json.dumps([story.page, blocks]),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, f"{story} fails:\n{done.stdout}\n{done.stderr}"
    return done.stdout.split("\x1e")[:-1]


ALL = [story for page in PAGES for story in stories(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("story", ALL, ids=str)
def test_a_documented_program_runs_and_prints_what_the_page_says(story):
    """A block of Python in the documentation works as it stands."""
    for block, printed in zip(story.blocks, tell(story), strict=True):
        if block.output is not None:
            assert agrees(printed, block.output), f"{story.page}:{block.line} prints:\n{printed}"


PAGE = """
# A page
```python
x = 1
print(x, 0.25)
```
<!-- output -->
```text
1 ...
```

- A list

  <!-- continue -->
  ```python
  print(x + 1)
  ```

```sh
ls
```
"""


def test_a_page_is_read_as_its_reader_would():
    """Blocks are found in lists too, continue where they say so, and own the output behind them."""
    (story,) = stories("page.md", PAGE)
    assert [(block.line, block.output) for block in story.blocks] == [(3, "1 ...\n"), (15, None)]
    assert tell(story) == ["1 0.25\n", "2\n"]


def test_a_failing_block_is_told_with_its_line_in_the_page():
    """A broken example points at the line in the page."""
    (story,) = stories("page.md", "text\n\n```python\nx = 1\nundefined\n```\n")
    with pytest.raises(AssertionError, match=r'"page.md", line 5(.|\n)*NameError'):
        tell(story)


def test_a_warning_in_a_block_is_a_failure():
    """A reader does not want to copy a deprecated call."""
    (story,) = stories("page.md", "```python\nimport warnings\nwarnings.warn('old')\n```\n")
    with pytest.raises(AssertionError, match="UserWarning"):
        tell(story)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```py\nx\n```\n", "says 'py'"),
        ("```\nimport tokenscope\n```\n", "says ''"),
        ("```python no-run\nx\n```\n", "says 'python no-run'"),
        ("<!-- continue -->\n```python\nx\n```\n", "nothing before it"),
        ("<!-- output -->\n```text\nx\n```\n", "follows a python fence"),
        ("<!-- output -->\n\n```text\nx\n```\n", "on the line before a fence"),
        ("~~~python\nx\n~~~\n", "three backticks"),
        ("```python\nx\n", "not closed"),
        ("```python\nx\n```\n<!-- output -->\n```sh\nx\n```\n", "an output is a text fence"),
    ],
)
def test_a_page_cannot_hide_a_block(text, complaint):
    """A fence that would not be run, or would be run for nothing, stops the tests."""
    with pytest.raises(ValueError, match=complaint):
        stories("page.md", text)


@pytest.mark.parametrize(
    ("printed", "promised", "same"),
    [
        ("took 0.3 ms\n", "took ... ms", True),
        ("took 0.3 s\n", "took ... ms", False),
        ("a\nb\n", "a...", False),
        ("a\nb", "a\nb\n", True),
        ("a", "", False),
    ],
)
def test_outputs_are_compared_to_the_letter_except_for_dots(printed, promised, same):
    """Three dots stand for anything within one line, and nothing else does."""
    assert agrees(printed, promised) is same


LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    """Each link of a page to another file of the repository leads to one that is there."""
    targets = (match["target"].partition("#")[0] for match in LINK.finditer(page.read_text(encoding="utf-8")))
    local = [target for target in targets if target and "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (page.parent / target).exists()] == []
