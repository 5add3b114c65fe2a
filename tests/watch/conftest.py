"""A server of each kind, shared by a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from servers import KINDS, serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servers import Server


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each real server in turn, running the app that watches."""
    with serve(request.param, "watch/watch_app.py:make", tmp_path_factory.mktemp("server")) as running:
        yield running
