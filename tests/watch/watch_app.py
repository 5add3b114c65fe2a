"""A WSGI app that only watches: it waits until the client has gone, or for as long as it was told."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from servers import census, query

from tokenscope.watch import find_connection, watch


def make(say: Any) -> Any:
    """Build the app."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        answer = ROUTES[environ["PATH_INFO"]](say, environ)
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(answer)))])
        return [answer]

    return app


def hang(say: Any, environ: dict[str, Any]) -> bytes:
    """Watch the client for `wait` seconds at most, and say how it ended."""
    asked = query(environ)
    if asked.get("late"):  # begin only when the client has long gone
        say("late", id=asked["id"])
        time.sleep(float(asked["late"]))
    connection = find_connection(environ)
    gone = threading.Event()
    watched = watch(connection, gone.set, half_close=asked.get("half_close", "cancel"))
    say("watching", id=asked["id"], source=connection.source)
    gone.wait(float(asked["wait"]))
    fired = watched.close()
    say("ended", id=asked["id"], gone=gone.is_set(), fired=fired, twice=watched.close(), at=time.time())
    return b"answer"


def fork(say: Any, environ: dict[str, Any]) -> bytes:
    """Fork while the watcher runs and this request is watched; the child watches a client of its own."""
    import socket

    from tokenscope.watch import Connection

    gone = threading.Event()
    watched = watch(find_connection(environ), gone.set)
    pid = os.fork()
    if not pid:
        watched.close()  # the parent's: must touch nothing of the parent's
        mine, peer = socket.socketpair()
        seen = threading.Event()
        again = watch(Connection("test", mine.fileno(), socket.AF_UNIX, mine), seen.set)
        peer.close()
        say("child", seen=seen.wait(5), fired=again.close())
        os._exit(0)
    os.waitpid(pid, 0)
    say("forked")
    gone.wait(5)
    say("ended", id="fork", gone=gone.is_set(), fired=watched.close())
    return b"answer"


def count(_say: Any, _environ: dict[str, Any]) -> bytes:
    """Answer with what this process holds."""
    import json

    return json.dumps(census()).encode()


ROUTES = {"/hang": hang, "/fork": fork, "/census": count}
