"""What the drivers of the vendors' SDKs have in common: an HTTP client that trusts the bench, and addresses."""

from __future__ import annotations

import importlib
import os
import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from types import ModuleType

_trust = ssl.create_default_context(cafile=os.environ.get("COMPAT_AUTHORITY"))

#: What is asked of the model; it never matters.
QUESTION: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "?"}], "max_tokens": 9}


def http_client(sdk: ModuleType) -> Any:
    """Return a cancellable client of the fork of httpx that this version of the SDK is made for."""
    theirs = sdk.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]
    ours = importlib.import_module(f"tokenscope.integrations.{theirs}")
    return ours.Client(timeout=None, trust_env=False, verify=_trust)


def at(client: Any, url: str) -> Any:
    """Return the client as it would be if that were its base URL; they share their connections."""
    split = urlsplit(url)
    return client.with_options(
        base_url=f"{split.scheme}://{split.netloc}{split.path}", default_query=dict(parse_qsl(split.query))
    )


def events(url: str) -> str:
    """Return where the same is told as events."""
    return url.replace("/stream?", "/events?")
