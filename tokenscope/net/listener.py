"""A listening socket whose `accept` can be cancelled.

It waits in `select`, and nothing is shut down: other processes may listen on the same socket (servers that fork
workers), and a listener that was shut down would be dead for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from tokenscope._core import clock
from tokenscope.net.select import select
from tokenscope.net.shared import take_over

if TYPE_CHECKING:
    import socket

    from tokenscope._core.token import CancellationToken
    from tokenscope.net.stream import GuardedSocket

__all__ = ["GuardedListener"]


class GuardedListener:
    """Stands in for a listening socket. After a cancel it is as good as before. Everything else is the socket's own.

    Thread-safe: any number of threads may wait in `accept`.
    """

    __slots__ = ("__weakref__", "_sock", "_timeout", "_token")

    def __init__(self, sock: socket.socket, token: CancellationToken | None = None) -> None:
        self._sock = sock
        self._timeout = sock.gettimeout()
        self._token = token
        sock.setblocking(False)  # or whom another thread overtakes, after `select`, would be blocked

    def __repr__(self) -> str:
        return f"<GuardedListener of {self._sock!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def gettimeout(self) -> float | None:
        """Seconds that `accept` waits at most."""
        return self._timeout

    def settimeout(self, value: float | None) -> None:
        """As the socket's own.

        Raises:
            TypeError, ValueError: ``value`` is not a length of time.
        """
        self._timeout = clock.validate_timeout(value, "value")

    def setblocking(self, flag: bool) -> None:
        """As the socket's own."""
        self._timeout = None if flag else 0.0

    def accept(self) -> tuple[GuardedSocket, Any]:
        """Wait for a connection; the guarded socket of it, and its address.

        Raises:
            Cancelled: This thread is, or was meanwhile, cancelled. No connection was taken.
            TimeoutError: The time of `settimeout` was up.
        """
        end = clock.deadline_after(self._timeout)
        while True:
            left = None if end is None else max(0.0, end - clock.now())
            if not select([self._sock], [], [], left, token=self._token)[0] and self._timeout != 0:
                raise TimeoutError("timed out")
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:  # another thread was faster
                if self._timeout == 0:
                    raise
                continue
            return take_over(sock, self._token), address
