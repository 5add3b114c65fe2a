"""The app of the end-to-end tests: views that block on an upstream server, stream from it, or misbehave.

The last part of a path is the request's number, so that events can be told apart.
"""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

from servers import census

import tokenscope
from tokenscope import CancellationToken, Cancelled, current_scope, current_token
from tokenscope._core import events
from tokenscope.integrations.requests import Session
from tokenscope.integrations.wsgi import RequestScopeMiddleware, cancellable

if TYPE_CHECKING:
    from collections.abc import Iterator

OUTSIDE = current_token()
UPSTREAM = os.environ.get("UPSTREAM", "")
SESSION = Session()
HURRY = 0.1  # seconds for the view `late_stream`


def listen(say: Any) -> None:
    """Write what tokenscope tells of requests into the journal."""

    def told(event: events.RequestCancelled) -> None:
        report = event.report
        say(
            "cancelled",
            endpoint=event.endpoint,
            status=event.status,
            kind=report.reason.kind,
            orphans=len(report.orphans),
            stop_ms=report.stop_duration * 1000,
        )

    events.subscribe(told, events.RequestCancelled)
    events.subscribe(lambda event: say("foreign", origin=event.origin), events.ForeignCancel)


def make(say: Any) -> Any:
    """Build the app."""
    listen(say)
    guarded = RequestScopeMiddleware(lambda *call: route(say, *call))
    hurried = RequestScopeMiddleware(lambda *call: route(say, *call), timeout=HURRY)

    def outermost(environ: dict[str, Any], start_response: Any) -> Any:
        if current_token() is not OUTSIDE:
            say("leaked", path=environ["PATH_INFO"])
        app = hurried if environ["PATH_INFO"].startswith("/late_stream/") else guarded
        return app(environ, start_response)

    return outermost


def route(say: Any, environ: dict[str, Any], start_response: Any) -> Any:
    """Answer with what the view has."""
    body = call(say, environ)
    headers = [("Content-Type", "text/plain")]
    if isinstance(body, list):
        headers.append(("Content-Length", str(len(body[0]))))
    start_response("200 OK", headers)
    return body


def call(say: Any, environ: dict[str, Any]) -> Any:
    """Call the view that the path names."""
    _, name, *number = environ["PATH_INFO"].split("/")
    say("view", name=name, number=number, thread=threading.get_ident())
    return VIEWS[name](environ)


def quick(_environ: Any) -> list[bytes]:
    """Answer at once."""
    return [b"quick"]


def ask(path: str) -> bytes:
    """Read an answer of the upstream server."""
    return SESSION.get(UPSTREAM + path, timeout=30).content


def upstream(_environ: Any) -> list[bytes]:
    """Wait for two answers of the upstream server."""
    scope = current_scope()
    first, second = scope.spawn(ask, "/answer"), scope.spawn(ask, "/answer")
    return [first.result() + second.result()]


def blocked(_environ: Any) -> list[bytes]:
    """Wait, in two children, for an upstream server that never ends."""
    scope = current_scope()
    children = [scope.spawn(ask, "/endless", name="fetch"), scope.spawn(ask, "/endless", name="fetch")]
    return [child.result() for child in children]


blocked_post = cancellable(blocked)


def relay(path: str) -> Iterator[bytes]:
    """Stream what the upstream server sends."""
    with SESSION.get(UPSTREAM + path, stream=True, timeout=30) as response:
        yield from response.iter_content(5)


def stream(_environ: Any) -> Iterator[bytes]:
    """Stream an endless answer."""
    return relay("/endless")


def streamed(_environ: Any) -> Iterator[bytes]:
    """Stream a whole answer."""
    return relay("/answer")


def spin(_environ: Any) -> list[bytes]:
    """Work in Python, with a checkpoint now and then."""
    while True:
        sum(range(1000))
        tokenscope.check()


def foreign(_environ: Any) -> list[bytes]:
    """Raise a cancel of somebody else's."""
    token = CancellationToken(name="elsewhere")
    token.cancel()
    token.check()
    return []


def foreign_group(environ: Any) -> list[bytes]:
    """Raise a group of them."""
    errors = []
    for _ in range(2):
        try:
            foreign(environ)
        except Cancelled as error:
            errors.append(error)
    raise BaseExceptionGroup("foreign", errors)


def foreign_stream(environ: Any) -> Iterator[bytes]:
    """Raise it between two chunks."""
    yield b"first"
    foreign(environ)


def own(_environ: Any) -> list[bytes]:
    """Cancel the request."""
    current_scope().cancel(kind="shutdown")
    tokenscope.check()
    return []


def own_stream(_environ: Any) -> Iterator[bytes]:
    """Cancel it between two chunks."""
    yield b"first"
    current_scope().cancel(kind="shutdown")
    tokenscope.check()


def late_stream(_environ: Any) -> Iterator[bytes]:
    """Stream past the request's deadline."""
    yield b"first"
    tokenscope.sleep(30)


def fail(_environ: Any) -> list[bytes]:
    """Let a child fail."""
    current_scope().spawn(lambda: 1 / 0)
    return [b"looks fine"]


def fail_early(_environ: Any) -> Iterator[bytes]:
    """Let a child of a stream fail before there is anything to send."""
    current_scope().spawn(lambda: 1 / 0)
    tokenscope.sleep(30)
    yield b"never"


def fail_late(_environ: Any) -> Iterator[bytes]:
    """Let a child fail between two chunks."""
    yield b"first"
    current_scope().spawn(lambda: 1 / 0)
    tokenscope.sleep(30)
    yield b"never"


COOL = threading.Event()


def burn(_environ: Any) -> list[bytes]:
    """Start two threads that do nothing but compute."""
    COOL.clear()

    def compute() -> None:
        while not COOL.is_set():
            sum(range(10_000))

    for _ in range(2):
        threading.Thread(target=compute, name="burning").start()
    return [b"burning"]


def cool(_environ: Any) -> list[bytes]:
    """Stop them."""
    COOL.set()
    return [b"cool"]


def count(_environ: Any) -> list[bytes]:
    """Answer with what this process holds."""
    return [json.dumps({**census(), "pid": os.getpid()}).encode()]


VIEWS = {
    "quick": quick,
    "upstream": upstream,
    "blocked": blocked,
    "blocked_post": blocked_post,
    "stream": stream,
    "streamed": streamed,
    "spin": spin,
    "foreign": foreign,
    "foreign_group": foreign_group,
    "foreign_stream": foreign_stream,
    "own": own,
    "own_stream": own_stream,
    "late_stream": late_stream,
    "fail": fail,
    "fail_early": fail_early,
    "fail_late": fail_late,
    "burn": burn,
    "cool": cool,
    "census": count,
}
