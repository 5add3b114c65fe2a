"""The WSGI app under test. It runs inside the server's process and tells a journal what happens to it.

/answer          says hello, at once
/work            spawns children that block upstream in every way the client knows, and one that sleeps; waits
/deadline        the same, with a time limit on the request
/stream          streams what comes from upstream
/relay           answers with what upstream answers
/census          what this process holds: threads and descriptors. The only page outside of tokenscope
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import tokenscope
from tokenscope.integrations.wsgi import RequestScopeMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import ModuleType
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

#: Seconds that a request to /deadline may take.
DEADLINE = 1.0

# Each call of a request is made over both.
_SCHEMES = ("http", "https")


def build() -> WSGIApplication:
    """Return the app, configured by the environment of its process."""
    client = importlib.import_module(f"compat.peers.{os.environ['COMPAT_CLIENT']}")
    app = App(client, json.loads(os.environ["COMPAT_UPSTREAM"]))
    say("serving", pid=os.getpid(), tokenscope=tokenscope.__file__, versions=versions())
    return app


def versions() -> dict[str, str]:
    """Return the version of every package that this process could import."""
    return {found.name.lower(): found.version for found in importlib.metadata.distributions()}


def say(what: str, **facts: Any) -> None:
    """Write a line into the journal: one write, so that threads do not mix theirs."""
    line = json.dumps({"what": what, "at": time.monotonic(), **facts})
    os.write(int(os.environ["COMPAT_JOURNAL"]), line.encode() + b"\n")


class App:
    """See the module's head. `upstream` is the address of the upstream service for each scheme."""

    def __init__(self, client: ModuleType, upstream: dict[str, str]) -> None:
        self._client = client
        self._upstream = upstream
        self._pages = {
            "/census": self.census,
            "/answer": _guarded(self.answer),
            "/work": _guarded(self.work),
            "/deadline": _guarded(self.work, timeout=DEADLINE),
            "/stream": _guarded(self.stream),
            "/relay": _guarded(self.relay),
        }

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return self._pages[environ["PATH_INFO"]](environ, start_response)

    def answer(self, _environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return _page(start_response, b"hello")

    def work(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        visit, scope = _visit(environ), tokenscope.current_scope()
        scope.defer(lambda: say("joined", visit=visit, left=len(scope.snapshot().tasks)))
        calls = {"sleep": lambda: tokenscope.sleep(60.0), **self._calls(visit)}
        tasks = [scope.spawn(_witnessed, visit, name, call, name=name) for name, call in calls.items()]
        say("spawned", visit=visit, children=len(tasks))
        for task in tasks:
            task.result()
        return _page(start_response, b"nobody ever waits this long")

    def stream(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        visit, scope = _visit(environ), tokenscope.current_scope()
        scope.defer(lambda: say("joined", visit=visit, left=len(scope.snapshot().tasks)))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return _streamed(visit, self._client.stream(self._url("http", "stream", visit, "stream")))

    def relay(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = dict(parse_qsl(environ["QUERY_STRING"]))["path"]
        return _page(start_response, self._client.fetch(self._url("http", path, _visit(environ), "relay")))

    def census(self, _environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self._client.close_idle()
        held = {"threads": [thread.name for thread in threading.enumerate()], "descriptors": _descriptors()}
        return _page(start_response, json.dumps(held).encode())

    def _calls(self, visit: str) -> dict[str, Callable[[], object]]:
        """One call for each way to block, over each scheme; the names are those in the upstream's notes."""
        return {
            f"{name}-{scheme}": _call(call, self._url(scheme, name, visit, f"{name}-{scheme}"))
            for name, call in self._client.CALLS.items()
            for scheme in _SCHEMES
        }

    def _url(self, scheme: str, path: str, visit: str, name: str) -> str:
        return f"{self._upstream[scheme]}/{path}?visit={visit}&call={name}"


def _guarded(page: WSGIApplication, **settings: Any) -> WSGIApplication:
    return RequestScopeMiddleware(page, **settings)


def _call(call: Callable[[str], object], url: str) -> Callable[[], object]:
    return lambda: call(url)


def _visit(environ: WSGIEnvironment) -> str:
    return str(dict(parse_qsl(environ["QUERY_STRING"])).get("visit", ""))


def _page(start_response: StartResponse, body: bytes) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def _witnessed(visit: str, name: str, call: Callable[[], object]) -> None:
    """Run a child's work, and say what became of it, and when."""
    try:
        call()
    except BaseException as error:
        _say_end(visit, name, error)
        raise
    _say_end(visit, name, None)


def _say_end(visit: str, name: str, error: BaseException | None) -> None:
    at = time.monotonic()  # before anything else
    reason = getattr(error, "reason", None)
    say(
        "ended",
        at=at,
        visit=visit,
        child=name,
        how="returned" if error is None else repr(error),
        kind=None if reason is None else str(reason.kind),
        deadline=tokenscope.current_token().deadline,
    )


def _streamed(visit: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Pass a stream on, and say when it waits for more; what ends it is told like the end of a child."""
    try:
        for chunk in chunks:
            yield chunk
            say("waiting", visit=visit)
    except BaseException as error:
        _say_end(visit, "stream", error)
        raise
    _say_end(visit, "stream", None)


def _descriptors() -> list[str]:
    """What the open descriptors refer to, without the numbers; none where the system does not show them."""
    held = []
    try:
        numbers = os.listdir("/proc/self/fd")  # noqa: PTH208 - the names are numbers
    except OSError:
        return []
    for number in numbers:
        try:
            target = os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115 - no path in most cases
        except OSError:
            continue  # the one that listed them
        held.append(target.partition(":[")[0])
    return sorted(held)
