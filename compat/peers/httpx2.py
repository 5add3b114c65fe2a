"""httpx2: one client for the whole process, as applications have it."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

from tokenscope.integrations.httpx2 import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# No timeouts anywhere: what ends these calls is the cancel, and nothing else.
_trust = ssl.create_default_context(cafile=os.environ.get("COMPAT_AUTHORITY"))
clients: list[Client] = []  # the one in use; a client that was closed cannot be used again


def current() -> Client:
    """Return the client, a new one if the last one was closed."""
    if not clients:
        clients.append(Client(timeout=None, trust_env=False, verify=_trust))
    return clients[-1]


def fetch(url: str) -> bytes:
    """Return the whole answer."""
    return current().get(url).content


def stream(url: str) -> Iterator[bytes]:
    """Yield the answer as it comes."""
    with current().stream("GET", url) as response:
        yield from response.iter_bytes()


def read_stream(url: str) -> None:
    """Read the answer as it comes, to its end."""
    for _chunk in stream(url):
        pass


CALLS: Mapping[str, Callable[[str], object]] = {"fetch": fetch, "stream": read_stream}


def close_idle() -> None:
    """Close the pooled connections."""
    while clients:
        clients.pop().close()
