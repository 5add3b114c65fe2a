"""One TLS context for the connections of many threads."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

__all__ = ["SharedContext"]


class SharedContext:
    """What httpcore uses of an `ssl.SSLContext`, with the protocols set once and not before every handshake.

    httpcore sets them for each new connection, on the context that all of them share, and OpenSSL frees the old list
    meanwhile. Another thread that begins a handshake just then copies freed memory into its ClientHello, and its
    innocent request fails with "TLSV1_ALERT_DECODE_ERROR" (seen with CPython 3.11 and OpenSSL 3, about once in 1,000
    handshakes beside a thread that does nothing else).
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._protocols: list[str] | None = None

    def set_alpn_protocols(self, protocols: list[str]) -> None:
        """As of the context; nothing if they are those already."""
        with self._lock:
            if protocols != self._protocols:
                self._context.set_alpn_protocols(protocols)
                self._protocols = list(protocols)

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        """As of the context."""
        return self._context.wrap_socket(*args, **options)
