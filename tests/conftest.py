"""What holds for every test: it says in a docstring what it proves, and it leaves nothing behind."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from leaks import Footprint, describe, settle

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_configure() -> None:
    """Let Ctrl-C be heard: a shell that starts the tests in the background (``pytest &``) has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that does not say in a sentence what it proves."""
    silent = [
        item.nodeid
        for item in items
        if isinstance(item, pytest.Function) and not (getattr(item.function, "__doc__", None) or "").strip()
    ]
    if silent:
        message = "each test says in a one-sentence docstring what it proves; these do not:\n  "
        raise pytest.UsageError(message + "\n  ".join(silent))


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail the test that leaves a thread, a socket or another file descriptor behind.

    Fixtures of a wider scope are set up before this one and those of the test after it: what the test and its
    own fixtures open must be closed at the end, while a server shared by a module may stay.
    """
    before = Footprint.take()
    yield
    left = settle(before)
    if left:
        pytest.fail(describe(left), pytrace=False)
