"""httpx2: one client for the whole process, as applications have it."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

from tokenscope.integrations.httpx2 import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# No timeouts anywhere: what ends these calls is the cancel, and nothing else.
client = Client(
    timeout=None, trust_env=False, verify=ssl.create_default_context(cafile=os.environ.get("COMPAT_AUTHORITY"))
)


def fetch(url: str) -> bytes:
    """Return the whole answer."""
    return client.get(url).content


def stream(url: str) -> Iterator[bytes]:
    """Yield the answer as it comes."""
    with client.stream("GET", url) as response:
        yield from response.iter_bytes()


def read_stream(url: str) -> None:
    """Read the answer as it comes, to its end."""
    for _chunk in stream(url):
        pass


CALLS: Mapping[str, Callable[[str], object]] = {"fetch": fetch, "stream": read_stream}


def close_idle() -> None:
    """Close the pooled connections."""
    client.close()
