"""waitress: one thread that selects, and a fixed crew of workers."""

from __future__ import annotations

import signal
import socket
import sys

THREADS = r"MainThread|waitress-\d+"


def main(fd: str) -> None:
    """Serve until SIGTERM."""
    from waitress import create_server  # type: ignore[import-untyped]

    from compat.app import build

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    create_server(build(), sockets=[socket.socket(fileno=int(fd))], threads=8).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
