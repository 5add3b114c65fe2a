"""The app of the demo on a real WSGI server. Runs in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import socket
import socketserver
import sys
import threading
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from tokenscope.cli.demo_app import make_app
from tokenscope.cli.demo_process import end_with_parent

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

__all__ = ["THREADS", "main"]

#: Enough for every client at a time, on servers with a fixed number of threads.
THREADS = 128


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing: the receipt tells."""


class _ThreadedServer(socketserver.ThreadingMixIn, WSGIServer):
    """The standard library's server, with a thread for each connection."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no error here."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*_)


def _serve_wsgiref(app: WSGIApplication, listener: socket.socket) -> None:
    server = _ThreadedServer(listener.getsockname(), _QuietHandler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.server_name, server.server_port = listener.getsockname()
    server.setup_environ()
    server.set_app(app)
    server.serve_forever(poll_interval=0.05)


def _serve_waitress(app: WSGIApplication, listener: socket.socket) -> None:
    importlib.import_module("waitress").create_server(app, sockets=[listener], threads=THREADS).run()


def _serve_gunicorn(app: WSGIApplication, listener: socket.socket) -> None:
    settings = {
        "bind": f"fd://{listener.fileno()}",
        "worker_class": "gthread",
        "workers": 1,
        "threads": THREADS,
        "graceful_timeout": 2,
        "loglevel": "warning",
        "control_socket_disable": True,  # newer versions only
    }
    base: Any = importlib.import_module("gunicorn.app.base").BaseApplication

    def load_config(self: Any) -> None:
        for name, value in settings.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    made = type("DemoServer", (base,), {"load_config": load_config, "load": lambda _self: app})
    made().run()


_SERVE = {"wsgiref": _serve_wsgiref, "waitress": _serve_waitress, "gunicorn": _serve_gunicorn}


def main(fd: str, kind: str, model: str, style: str) -> None:
    """Serve on the inherited listener until the parent process closes our stdin.

    Args:
        fd: Of the listener.
        kind: Which server.
        model: The model's URL.
        style: ``plain``, ``scoped``, or ``aloud``: scoped, with the log of cancelled requests on stderr.
    """
    if style == "aloud":
        logging.basicConfig(level=logging.WARNING, format="app:   %(message)s")
        logging.getLogger("tokenscope").setLevel(logging.INFO)
    # Through SystemExit: a server that is not told to stop stops so, and says goodbye to its threads.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    pid = os.getpid()
    threading.Thread(target=end_with_parent, args=(lambda: os.kill(pid, signal.SIGTERM),), daemon=True).start()
    _SERVE[kind](make_app(model, scoped=style != "plain"), socket.socket(fileno=int(fd)))


if __name__ == "__main__":
    main(*sys.argv[1:])
