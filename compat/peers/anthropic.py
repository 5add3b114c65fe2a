"""anthropic: one client for the whole process, as applications have it; an answer, and a streamed one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anthropic

from compat.peers import _sdk
from tokenscope.integrations.anthropic import cancellable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

clients: list[anthropic.Anthropic] = []  # the one in use; a client that was closed cannot be used again


def current() -> anthropic.Anthropic:
    """Return the client, a new one if the last one was closed."""
    if not clients:
        clients.append(cancellable(anthropic.Anthropic(api_key="none", http_client=_sdk.http_client(anthropic))))
    return clients[-1]


def fetch(url: str) -> bytes:
    """Return the whole answer, unread."""
    return bytes(_sdk.at(current(), url).messages.with_raw_response.create(**_sdk.QUESTION).http_response.content)


def stream(url: str) -> Iterator[bytes]:
    """Yield the words of the answer as they come."""
    with _sdk.at(current(), _sdk.events(url)).messages.create(**_sdk.QUESTION, stream=True) as events:
        for event in events:
            yield event.delta.text.encode()


def read_stream(url: str) -> None:
    """Read the answer as it comes, to its end."""
    for _word in stream(url):
        pass


CALLS: Mapping[str, Callable[[str], object]] = {"fetch": fetch, "stream": read_stream}


def close_idle() -> None:
    """Close the pooled connections."""
    while clients:
        clients.pop().close()
