"""What both apps of the demo work with: the client of the model, and the record of their own work."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from wsgiref.types import WSGIEnvironment

    import requests

    from tokenscope import CancellationToken

__all__ = ["Desk", "Job", "Order", "client_of", "event"]


@dataclass(frozen=True)
class Order:
    """What the client wants. ``number`` is the client's."""

    number: int
    effort: str = "high"
    tokens: int = 64

    @classmethod
    def of(cls, environ: WSGIEnvironment) -> Order:
        """Read it from the request."""
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        return cls(client_of(environ), **json.loads(body or "{}"))

    def for_model(self) -> dict[str, Any]:
        """It in OpenAI's words."""
        return {
            "model": "demo-thinker",
            "messages": [{"role": "user", "content": "What becomes of the work when I leave?"}],
            "reasoning_effort": self.effort,
            "max_completion_tokens": self.tokens,
            "stream": True,
        }


@dataclass
class Job:
    """A piece of the app's work, as seen from outside: ``began`` and ``ended`` monotonic."""

    name: str
    began: float
    ended: float | None = None


@dataclass
class Desk:
    """What the views work with, and the record of their work. Thread-safe."""

    session: requests.Session
    model: str
    jobs: list[Job] = field(default_factory=list)  # only ever appended to
    told: dict[int, str | None] = field(default_factory=dict)  # by client: why its request was cancelled

    def words(self, what: str, order: Order) -> Iterator[str]:
        """Ask the model, and pass on what it says while it says it."""
        call = f"{order.number}.{what}"
        with self.session.post(
            f"{self.model}/v1/chat/completions",
            json=order.for_model(),
            headers={"X-Call": call},
            stream=True,
            timeout=60,
        ) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                word = line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content")
                if word:
                    yield word

    def suggest(self, order: Order) -> str:
        """Ask the model what the user might ask next."""
        with self.doing(f"{order.number}.suggest"):
            return "".join(self.words("suggest", order))

    @contextlib.contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Record that this is being worked on."""
        job = Job(name, time.monotonic())
        self.jobs.append(job)
        try:
            yield
        finally:
            job.ended = time.monotonic()

    def tell(self, order: Order, token: CancellationToken) -> None:
        """Record why a request was cancelled, if it was."""
        self.told[order.number] = None if token.reason is None else str(token.reason.kind)

    def as_json(self) -> bytes:
        """Everything so far."""
        jobs = [vars(job) for job in tuple(self.jobs)]
        return json.dumps({"jobs": jobs, "told": dict(self.told)}).encode()


def client_of(environ: WSGIEnvironment) -> int:
    """The number of the client, from the path; 0 if it does not say."""
    number = environ["PATH_INFO"].rpartition("/")[2]
    return int(number) if number.isdecimal() else 0


def event(word: str) -> bytes:
    """One server-sent event."""
    return f"data: {word}\n\n".encode()
