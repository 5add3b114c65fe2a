"""wsgiref: the standard library's server, given a thread for each connection."""

from __future__ import annotations

import signal
import socket
import socketserver
import sys
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

THREADS = r"MainThread|Thread-\d+ \(process_request_thread\)"


class ThreadedServer(socketserver.ThreadingMixIn, WSGIServer):
    """On a socket that listens already."""

    daemon_threads = True

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.getsockname(), WSGIRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_name, self.server_port = listener.getsockname()
        self.setup_environ()


def main(fd: str) -> None:
    """Serve until SIGTERM."""
    from compat.app import build

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = ThreadedServer(socket.socket(fileno=int(fd)))
    server.set_app(build())
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
