"""The app that the hosts serve, inside of the server's process.

`/plain/...` goes around the middleware, everything else through it: `/hello` answers at once, `/flask` does so
by a Flask view, `/hang` waits for its cancel and reports it, `/work` answers late and has a child, `/census`
tells what the process holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenscope
from bench._hosts import BURNERS, JOURNAL
from tokenscope.integrations.wsgi import RequestScopeMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

HELLO = [b"Hello, world!\n"]


def hello(_environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The least that an app can do."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(HELLO[0])))])
    return HELLO


def hang(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Wait for the hang-up; say when the token was cancelled, and when this code ran again."""
    token = tokenscope.current_token()
    say({"what": "hanging"})
    token.wait(30)
    awake = time.time()
    say({"what": "awake", "awake": awake, "at": token.reason.at if token.reason else None})
    return hello(environ, start_response)


def work(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """A while of work with a child, as long as the query says (milliseconds)."""
    seconds = float(environ["QUERY_STRING"]) / 1e3
    child = tokenscope.current_scope().spawn(tokenscope.sleep, seconds)
    tokenscope.sleep(seconds)
    child.result()
    return hello(environ, start_response)


def census(_environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Descriptors, and the threads that run something."""
    threads = [t for t in threading.enumerate() if t.name not in {"tokenscope-idle", "tokenscope-timer"}]
    body = json.dumps({"fds": sum(1 for _ in Path("/proc/self/fd").iterdir()), "threads": len(threads)}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


VIEWS: dict[str, Any] = {"/hello": hello, "/hang": hang, "/work": work, "/census": census}

with contextlib.suppress(ImportError):  # then its row says so
    import flask

    VIEWS["/flask"] = flask_app = flask.Flask(__name__)
    flask_app.add_url_rule("/flask", view_func=lambda: "Hello, world!\n")


def route(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """What the middleware is around."""
    return VIEWS[environ["PATH_INFO"]](environ, start_response)


guarded = RequestScopeMiddleware(route)


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """What the server calls."""
    _, around, path = environ["PATH_INFO"].rpartition("/plain")
    if not around:
        return guarded(environ, start_response)
    environ["PATH_INFO"] = path
    return route(environ, start_response)


def say(fact: dict[str, Any]) -> None:
    """A line for the process that measures."""
    os.write(int(os.environ[JOURNAL]), json.dumps(fact).encode() + b"\n")


def burn() -> None:
    """Keep the interpreter busy, as a thread that computes does."""
    number = 0
    while True:
        number = (number * 31 + 7) % 1_000_003


def make() -> Any:
    """The app, once the server is about to serve."""
    for _ in range(int(os.environ.get(BURNERS, "0"))):
        threading.Thread(target=burn, daemon=True).start()
    say({"what": "serving"})
    return app


def main(kind: str, fd: int) -> None:
    """Serve on an inherited socket."""
    import socket

    listener = socket.socket(fileno=fd)
    if kind == "waitress":
        from waitress import create_server

        create_server(make(), sockets=[listener], threads=8).run()
    else:
        from werkzeug.serving import make_server

        host, port = listener.getsockname()
        make_server(host, port, make(), threaded=True, fd=listener.fileno()).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
