"""werkzeug: the development server behind `flask run`, a thread for each connection."""

from __future__ import annotations

import signal
import socket
import sys

THREADS = r"MainThread|Thread-\d+ \(process_request_thread\)"


def main(fd: str) -> None:
    """Serve until SIGTERM."""
    from werkzeug.serving import make_server

    from compat.app import build

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listener = socket.socket(fileno=int(fd))
    host, port = listener.getsockname()
    make_server(host, port, build(), threaded=True, fd=int(fd)).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
