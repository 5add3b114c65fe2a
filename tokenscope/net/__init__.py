"""Sockets that a cancel can reach: connect, guard, read and write.

Everything here works on plain sockets and knows no HTTP library; the integrations stand on it. For a socket
of your own::

    sock, guard = connect_guarded(("example.org", 80), token=token, timeout=5)
    guarded = GuardedSocket(sock, guard)  # sendall, makefile, close: as usual, and cancellable
"""

from __future__ import annotations

from tokenscope.net.connect import connect_guarded
from tokenscope.net.guard import Guard
from tokenscope.net.resolve import resolve
from tokenscope.net.stream import GuardedReader, GuardedSocket

__all__ = ["Guard", "GuardedReader", "GuardedSocket", "connect_guarded", "resolve"]
