"""openai: one client for the whole process, as applications have it; an answer, and a streamed one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import openai

from compat.peers import _sdk
from tokenscope.integrations.openai import cancellable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

clients: list[openai.OpenAI] = []  # the one in use; a client that was closed cannot be used again


def current() -> openai.OpenAI:
    """Return the client, a new one if the last one was closed."""
    if not clients:
        clients.append(cancellable(openai.OpenAI(api_key="none", http_client=_sdk.http_client(openai))))
    return clients[-1]


def fetch(url: str) -> bytes:
    """Return the whole answer, unread."""
    return bytes(_sdk.at(current(), url).chat.completions.with_raw_response.create(**_sdk.QUESTION).content)


def stream(url: str) -> Iterator[bytes]:
    """Yield the words of the answer as they come."""
    with _sdk.at(current(), _sdk.events(url)).chat.completions.create(**_sdk.QUESTION, stream=True) as chunks:
        for chunk in chunks:
            yield chunk.choices[0].delta.content.encode()


def read_stream(url: str) -> None:
    """Read the answer as it comes, to its end."""
    for _word in stream(url):
        pass


CALLS: Mapping[str, Callable[[str], object]] = {"fetch": fetch, "stream": read_stream}


def close_idle() -> None:
    """Close the pooled connections."""
    while clients:
        clients.pop().close()
