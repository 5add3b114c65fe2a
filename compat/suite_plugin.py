"""A plugin of pytest's, for somebody else's tests: notes how each ended, and puts tokenscope in between if asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

_ended: dict[str, str] = {}

if _under := os.environ.get("COMPAT_UNDER"):
    import tokenscope

    tokenscope.instrument()
    try:
        import httpx
    except ImportError:
        pass  # no tests of httpx, then
    else:
        # It has no switch for the whole process. The tests of its client find ours under the name of theirs.
        from tokenscope.integrations.httpx import Client

        httpx.Client = Client  # type: ignore[misc]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Each test under a token of its own: without one, guards stand aside."""
    if not _under:
        return (yield)
    with tokenscope.use_token(tokenscope.CancellationToken()):
        return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember the worst of setup, call and teardown."""
    if report.when == "call" or report.outcome != "passed":
        _ended[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    """Write it all down."""
    Path(os.environ["COMPAT_OUTCOMES"]).write_text(json.dumps(_ended))
