"""Has the peer gone? One thread per process watches the sockets of running requests.

``find_connection(environ)`` finds the client's socket; ``watch(connection, on_gone)`` calls ``on_gone()``
once, within a millisecond of the hang-up, until ``Watch.close()``.
"""

from tokenscope.watch._sources import SOURCES, Connection, NotASocket, Source, find_connection
from tokenscope.watch._watcher import CannotWatch, HalfClose, Watch, supported, watch

__all__ = [
    "SOURCES",
    "CannotWatch",
    "Connection",
    "HalfClose",
    "NotASocket",
    "Source",
    "Watch",
    "find_connection",
    "supported",
    "watch",
]
