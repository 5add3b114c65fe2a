r"""Sockets that a cancel can reach, for code that speaks a protocol of its own.

::

    with net.connect(("example.org", 6379), timeout=5) as sock:
        sock.sendall(b"PING\r\n")  # each call ends with the token that is current where it is made
        sock.recv(100)

`connect` and `guarded` are for users, `select` too. The rest is what the integrations stand on; it works on plain
sockets and knows no library.
"""

from __future__ import annotations

from tokenscope.net.connect import connect_guarded
from tokenscope.net.guard import Guard
from tokenscope.net.listener import GuardedListener
from tokenscope.net.own import connect, guarded
from tokenscope.net.resolve import resolve
from tokenscope.net.select import select
from tokenscope.net.shared import SharedGuard
from tokenscope.net.stream import GuardedReader, GuardedSocket

__all__ = [
    "Guard",
    "GuardedListener",
    "GuardedReader",
    "GuardedSocket",
    "SharedGuard",
    "connect",
    "connect_guarded",
    "guarded",
    "resolve",
    "select",
]
