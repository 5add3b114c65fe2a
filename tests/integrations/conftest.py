"""What the tests of integrations share."""

from __future__ import annotations

import pytest
from peers import Authority, authority


@pytest.fixture(scope="session")
def certificates() -> Authority:
    """Return the certificates of this test run."""
    return authority()
