"""requests on urllib3: one session for the whole process, as applications have it, and urllib3 alone."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from tokenscope.integrations.requests import Session
from tokenscope.integrations.urllib3 import PoolManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# No timeouts anywhere: what ends these calls is the cancel, and nothing else.
_authority = os.environ.get("COMPAT_AUTHORITY")
session = Session()
session.trust_env = False
session.verify = _authority or True
pool = PoolManager(ca_certs=_authority)


def fetch(url: str) -> bytes:
    """Return the whole answer."""
    return session.get(url).content


def stream(url: str) -> Iterator[bytes]:
    """Yield the answer as it comes."""
    with contextlib.closing(session.get(url, stream=True)) as response:
        yield from response.iter_content(None)


def read_stream(url: str) -> None:
    """Read the answer as it comes, to its end."""
    for _chunk in stream(url):
        pass


def read_with_urllib3(url: str) -> None:
    """Read the answer, without requests."""
    pool.request("GET", url, retries=False)


CALLS: Mapping[str, Callable[[str], object]] = {
    "fetch": fetch,
    "stream": read_stream,
    "urllib3": read_with_urllib3,
}


def close_idle() -> None:
    """Close the pooled connections."""
    session.close()
    pool.clear()
