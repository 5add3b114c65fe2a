"""The front door: what `import tokenscope` offers, no more and no less."""

from __future__ import annotations

import inspect
import pickle
import tomllib
import types
from pathlib import Path

import pytest

import tokenscope

ROOT = Path(__file__).parents[1]

# The names the contract fixes. More may be offered; none of these may go.
CONTRACT = {
    # errors
    "BudgetExceeded",
    "Cancelled",
    "CommitRefused",
    "DeadlineExceeded",
    "ScopeClosed",
    "StragglersLeft",
    "TaskCancelled",
    "TokenScopeError",
    # tokens
    "CancelKind",
    "CancelReason",
    "CancellationToken",
    # what is current
    "bind",
    "check",
    "current_scope",
    "current_token",
    "defer",
    "fail_after",
    "move_on_after",
    "shield",
    "sleep",
    "use_token",
    # scopes
    "BackgroundScope",
    "Task",
    "ThreadScope",
}


def accidental_names(module: types.ModuleType) -> set[str]:
    """Return the names a module shows without offering them; its submodules are reached by their path."""
    shown = {name for name in dir(module) if not name.startswith("_")}
    parts = {name for name in shown if inspect.ismodule(getattr(module, name))}
    own = {name for name in parts if getattr(module, name).__name__ == f"{module.__name__}.{name}"}
    return shown - own - set(module.__all__)


def test_the_door_offers_what_the_contract_names():
    """No name of the contract is missing."""
    assert set(tokenscope.__all__) >= CONTRACT


def test_the_list_is_sorted_and_names_nothing_twice():
    """`__all__` reads like an index."""
    assert list(tokenscope.__all__) == sorted(set(tokenscope.__all__))


@pytest.mark.parametrize("name", tokenscope.__all__)
def test_each_name_resolves(name):
    """What is offered is there."""
    assert getattr(tokenscope, name) is not None


def test_nothing_is_shown_by_accident():
    """A helper imported by the front door does not become public through it."""
    assert accidental_names(tokenscope) == set()


def test_an_accidental_name_would_be_seen():
    """The check above finds a stray import and a stray helper, and lets a submodule pass."""
    module = types.ModuleType("house")
    module.__all__ = ["offered"]
    module.offered, module.helper, module.inspect = 1, 2, inspect
    module.room = types.ModuleType("house.room")
    assert accidental_names(module) == {"helper", "inspect"}


@pytest.mark.parametrize("name", [n for n in tokenscope.__all__ if inspect.isclass(getattr(tokenscope, n))])
def test_public_classes_bear_their_public_address(name):
    """Tracebacks and pickles say `tokenscope.ThreadScope`, not where the class happens to live."""
    cls = getattr(tokenscope, name)
    assert (cls.__module__, cls.__qualname__) == ("tokenscope", name)
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_asking_for_a_name_that_is_not_there_is_an_attribute_error():
    """A lazy front door answers a wrong name as every module does."""
    with pytest.raises(AttributeError, match="no_such_name"):
        tokenscope.no_such_name  # noqa: B018 - asking is the test


def test_the_version_is_the_one_that_is_published():
    """`tokenscope.__version__` and the version of the distribution are one number."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert tokenscope.__version__ == project["version"]


def test_the_package_says_that_it_is_typed():
    """Type checkers look into a package only where `py.typed` lies."""
    assert (Path(tokenscope.__file__).parent / "py.typed").is_file()
