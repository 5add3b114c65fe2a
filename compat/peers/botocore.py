"""botocore: a client of S3 for each endpoint, as applications have it; an object, and one read as it comes."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config

from tokenscope.integrations.botocore import instrument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_session = botocore.session.get_session()
clients: dict[str, Any] = {}  # by endpoint
_making = threading.Lock()  # a session makes one client at a time


def _client(endpoint: str) -> Any:
    with _making:
        if endpoint not in clients:
            clients[endpoint] = instrument(_made(endpoint))
        return clients[endpoint]


def _made(endpoint: str) -> Any:
    return _session.create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="id",
        aws_secret_access_key="secret",
        verify=os.environ.get("COMPAT_AUTHORITY"),
        # What ends these calls is the cancel, and nothing else.
        config=Config(s3={"addressing_style": "path"}, connect_timeout=None, read_timeout=None, proxies={}),
    )


def _body(url: str) -> Any:
    """Return the body of the object; its bucket is the page, and its key hides the query."""
    split = urlsplit(url)
    client = _client(f"{split.scheme}://{split.netloc}")
    return client.get_object(Bucket=split.path.strip("/"), Key=f"key?{split.query}")["Body"]


def fetch(url: str) -> bytes:
    """Return the whole object."""
    return bytes(_body(url).read())


def stream(url: str) -> Iterator[bytes]:
    """Yield the object as it comes, a word at a time."""
    with contextlib.closing(_body(url)) as body:
        yield from body.iter_chunks(len(b"first"))


def read_stream(url: str) -> None:
    """Read the object as it comes, to its end."""
    for _chunk in stream(url):
        pass


CALLS: Mapping[str, Callable[[str], object]] = {"fetch": fetch, "stream": read_stream}


def close_idle() -> None:
    """Close the pooled connections."""
    while clients:
        clients.popitem()[1].close()
