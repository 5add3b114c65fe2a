"""The house has floors: a module imports only from lower ones.

A row of the table is a floor, an entry a *room*: a module, or a package with all that is in it. Between rooms
imports go strictly downwards; on one floor `a < b` lets b lean on a. Inside a room imports are free while
no cycle forms. `if TYPE_CHECKING:` does not count; an import inside a function does.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PACKAGE = Path(__file__).parents[1] / "tokenscope"

FLOORS = {
    0: "_core._primitives _core._typing",
    1: "_core.errors _core.events _core.report _core.ambient _core.clock < _core.reasons",
    2: "_core.timer _core.workers _core.window < _core.injection < _core.monitoring < _core.strike",
    3: "_core.tree < _core.token",
    4: "_core.outcome _core.current < _core.cleanup < _core.task",
    5: "_core.crew < _core.mapping < _core.scope _core",  # `_core` itself: what the core offers
    6: "budget commit background executor",
    7: "combine channels watch process sync < waiting < net aio",
    8: "sessions",
    9: "observe remote agents",
    10: "integrations < instrument testing",
    11: "",  # the front door, `tokenscope` itself: it names what is below and has no logic
    12: "cli < __main__",  # who uses the library as everybody does, through the front door
}
DOOR = "tokenscope"


def rooms_and_neighbours() -> tuple[dict[str, int], set[tuple[str, str]]]:
    """Read the table: the floor of each room, and the pairs of which the first may lean on the second."""
    floors, neighbours = {DOOR: 11}, set()
    for floor, row in FLOORS.items():
        for entry in row.replace(" < ", "<").split():
            chain = [f"{DOOR}.{room}" for room in entry.split("<")]
            floors |= dict.fromkeys(chain, floor)
            neighbours |= {(upper, lower) for lower, upper in itertools.combinations(chain, 2)}
    return floors, neighbours


ROOMS, NEIGHBOURS = rooms_and_neighbours()

# Up to this floor nothing but the standard library is imported, in no line of the file.
STANDARD_LIBRARY_ONLY = 6
# Above it third-party libraries stand at the top of a file in these rooms only: importing them is the use.
THIRD_PARTY_AT_THE_TOP = {"tokenscope.integrations", "tokenscope.testing"}


@dataclass(frozen=True)
class Import:
    """One imported module: where it stands, and whether importing the file is enough to load it."""

    module: str
    line: int
    at_the_top: bool


def read_package(folder: Path = PACKAGE) -> dict[str, str]:
    """Return the source of every module of the package, by its dotted name."""
    sources = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        sources[".".join(parts)] = path.read_text(encoding="utf-8")
    return sources


def room_of(module: str) -> str | None:
    """Return the room a module is in: the longest name in the table that it is, or stands under."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    room = next((name for name in names if name in ROOMS), None)
    # A table that placed new modules in the front door or in the core by default would place everything.
    return None if room in {DOOR, f"{DOOR}._core"} and room != module else room


def imports(module: str, sources: Mapping[str, str]) -> Iterator[Import]:
    """Yield what a module imports when it runs, wherever in the file."""
    return walk(ast.parse(sources[module]), module, sources, at_the_top=True)


def walk(node: ast.AST, module: str, sources: Mapping[str, str], *, at_the_top: bool) -> Iterator[Import]:
    """Yield the imports under a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.orelse:
                yield from walk(ast.Module([statement], []), module, sources, at_the_top=at_the_top)
            continue
        for name in named_by(child, module, sources):
            yield Import(name, child.lineno, at_the_top)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk(child, module, sources, at_the_top=at_the_top and not inside)


def is_type_checking(test: ast.expr) -> bool:
    """Tell whether a condition is `TYPE_CHECKING`, or that name of some module."""
    return ast.unparse(test).rpartition(".")[2] == "TYPE_CHECKING"


def named_by(node: ast.AST, module: str, sources: Mapping[str, str]) -> list[str]:
    """Return the modules that one statement or call imports."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = absolute(node, module, sources)
            inner = (f"{base}.{alias.name}" for alias in node.names)
            return [name if name in sources else base for name in inner]
        case ast.Call(args=[ast.Constant(value=str(name)), *_]):
            called = ast.unparse(node.func).rpartition(".")[2]
            return [name] if called in {"import_module", "__import__"} else []
    return []


def absolute(node: ast.ImportFrom, module: str, sources: Mapping[str, str]) -> str:
    """Return the full name of the module after `from`."""
    if not node.level:
        return node.module or ""
    is_package = any(name.startswith(f"{module}.") for name in sources)
    parts = module.split(".") + ([""] if is_package else [])
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


def breaches(sources: Mapping[str, str]) -> list[str]:
    """Return what stands in the way of the floors, one sentence each."""
    homeless = [f"{module} is in no room of the table" for module in sources if room_of(module) is None]
    climbing = [
        f"{module}:{used.line} {complaint}"
        for module in sources
        for used in imports(module, sources)
        if (complaint := judge(module, used))
    ]
    return homeless + climbing


def judge(module: str, used: Import) -> str | None:
    """Return what is wrong with one import, if anything."""
    mine = room_of(module)
    if mine is None:
        return None
    if used.module.partition(".")[0] == DOOR:
        return judge_own(mine, used.module)
    return judge_foreign(mine, used)


def judge_own(mine: str, used: str) -> str | None:
    """Return what is wrong with importing a module of the package."""
    theirs = room_of(used)
    if theirs is None:
        return f"imports {used}, which is in no room"
    if theirs == mine or ROOMS[theirs] < ROOMS[mine] or (mine, theirs) in NEIGHBOURS:
        return None
    return f"(floor {ROOMS[mine]}) imports {used} (floor {ROOMS[theirs]})"


def judge_foreign(mine: str, used: Import) -> str | None:
    """Return what is wrong with importing somebody else's module."""
    library = used.module.partition(".")[0]
    if library in sys.stdlib_module_names:
        return None
    if ROOMS[mine] <= STANDARD_LIBRARY_ONLY:
        return f"(floor {ROOMS[mine]}) imports {library}, which is not of the standard library"
    if used.at_the_top and mine not in THIRD_PARTY_AT_THE_TOP:
        return f"imports {library} at its top: import it where it is used"
    return None


def cycle(sources: Mapping[str, str]) -> list[str] | None:
    """Return a ring of modules that need each other in order to load, if there is one."""
    graph = {
        module: {used.module for used in imports(module, sources) if used.at_the_top and used.module != module}
        for module in sources
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return None


def test_every_module_imports_only_from_lower_floors():
    """No module of the package imports from its own floor or from above, and each has its place."""
    found = breaches(read_package())
    assert not found, "\n".join(found)


def test_no_modules_need_each_other_in_order_to_load():
    """The imports at the top of the files form no cycle, inside a room either."""
    assert cycle(read_package()) is None


def test_the_package_is_being_read():
    """An empty list of breaches is not an empty list of files."""
    sources = read_package()
    assert {"tokenscope", "tokenscope._core._primitives", "tokenscope._core.token"} <= sources.keys()
    assert any(used.module == "tokenscope._core._primitives" for used in imports("tokenscope._core.timer", sources))


TOKEN, TIMER, WSGI, FLASK = (
    "tokenscope._core.token",
    "tokenscope._core.timer",
    "tokenscope.integrations.wsgi",
    "tokenscope.integrations.flask",
)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        (TIMER, "from tokenscope._core import token", "(floor 2) imports tokenscope._core.token (floor 3)"),
        (TIMER, "import tokenscope._core.token", "(floor 2) imports tokenscope._core.token (floor 3)"),
        (TIMER, "from .token import x", "(floor 2) imports tokenscope._core.token (floor 3)"),
        (TIMER, "from . import token", "(floor 2) imports tokenscope._core.token (floor 3)"),
        (TIMER, "def f():\n from . import token", "(floor 2) imports tokenscope._core.token (floor 3)"),
        (TIMER, "from tokenscope import x", "(floor 2) imports tokenscope (floor 11)"),
        (TIMER, "import_module('tokenscope.cli')", "(floor 2) imports tokenscope.cli (floor 12)"),
        (
            TIMER,
            "if TYPE_CHECKING: pass\nelse: from . import token",
            "(floor 2) imports tokenscope._core.token",
        ),
        (
            TIMER,
            "from tokenscope._core import workers",
            "(floor 2) imports tokenscope._core.workers (floor 2)",
        ),
        (WSGI, "from tokenscope.testing import x", "(floor 10) imports tokenscope.testing (floor 10)"),
        (TIMER, "def f(): import requests", "imports requests, which is not of the standard library"),
        ("tokenscope.net.guard", "import requests", "imports requests at its top"),
        ("tokenscope.attic", "", "is in no room of the table"),
        ("tokenscope._core.attic", "", "is in no room of the table"),
    ],
)
def test_a_planted_breach_is_found(module, source, complaint):
    """Each way of climbing the stairs is seen for what it is."""
    sources = {
        "tokenscope": "",
        "tokenscope._core": "",
        TOKEN: "",
        "tokenscope._core.workers": "",
        module: source,
    }
    assert any(complaint in breach for breach in breaches(sources)), breaches(sources)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (TOKEN, "from tokenscope._core import timer"),
        (TOKEN, "if TYPE_CHECKING:\n from tokenscope._core.scope import ThreadScope"),
        (TOKEN, "if typing.TYPE_CHECKING:\n from tokenscope._core.scope import ThreadScope"),
        (FLASK, "from tokenscope.integrations.wsgi import x\nimport flask"),
        ("tokenscope.cli.demo", "import tokenscope\ndef f(): import waitress"),
        ("tokenscope", "from tokenscope._core.token import CancellationToken"),
    ],
)
def test_what_is_allowed_is_not_complained_about(module, source):
    """Going down, staying in the room, and imports for the type checker alone are free."""
    sources = {"tokenscope": "", TIMER: "", WSGI: "", module: source}
    assert breaches(sources) == []


def test_a_planted_cycle_is_found():
    """Two modules of one room that load each other are seen; a function-level import breaks the ring."""
    ring = {WSGI: "from tokenscope.integrations import flask", FLASK: "import tokenscope.integrations.wsgi"}
    assert set(cycle(ring) or ()) == {WSGI, FLASK}
    ring[FLASK] = "def late(): import tokenscope.integrations.wsgi"
    assert cycle(ring) is None
