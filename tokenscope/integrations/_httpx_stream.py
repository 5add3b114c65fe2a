"""httpcore's connections with a guard: the network backend that a pool is given, and its streams.

httpcore 1 and its fork httpcore2 ask for nothing but these methods; the errors are made of whichever of the two asks.

A stream works for one token at a time: it takes the current one with its first call after it left the pool (or was
made), and is freed by `detach` before the pool has it back. So a body stays bound to the token that it was
opened under, whoever reads it.
"""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING, Any

from tokenscope._core.current import current_token
from tokenscope._core.errors import Cancelled
from tokenscope.integrations._binding import Binding
from tokenscope.net import Guard, connect_guarded
from tokenscope.net.handshake import close_half_made

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable

__all__ = ["Backend", "Stream"]


class Backend:
    """Opens guarded connections. Thread-safe; it has no state.

    Args:
        errors: The module whose exceptions are raised: ``httpcore`` or ``httpcore2``.
    """

    def __init__(self, errors: Any) -> None:
        self._errors = errors

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[tuple[int, int, int | bytes]] | None = None,
    ) -> Stream:
        """Look the name up and connect, or raise what the token says."""
        token, explicit = Binding.here()
        with _Translated(self._errors.ConnectTimeout, self._errors.ConnectError):
            sock, guard = connect_guarded(
                (host, port),
                token=token,
                explicit=explicit,
                timeout=timeout,
                source_address=None if local_address is None else (local_address, 0),
                socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *(socket_options or ())],
            )
        return Stream(sock, guard, self._errors)

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[tuple[int, int, int | bytes]] | None = None,
    ) -> Stream:
        """Connect to a server of this machine. It answers at once, unless its backlog is full (docs/limits.md)."""
        with _Translated(self._errors.ConnectTimeout, self._errors.ConnectError):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                for option in socket_options or ():
                    sock.setsockopt(*option)
                sock.settimeout(timeout)
                sock.connect(path)
                return Stream(sock, Guard(sock), self._errors)
            except BaseException:
                sock.close()
                raise

    def sleep(self, seconds: float) -> None:
        """The pause between two attempts to connect (``retries=``)."""
        current_token().sleep(seconds)


class Stream:
    """One connection, plain or TLS. Used by one thread at a time, as httpcore does."""

    def __init__(self, sock: socket.socket, guard: Guard, errors: Any) -> None:
        self._sock = sock
        self._guard = guard
        self._errors = errors
        self._held = [None]  # the hold on the guard; popped once

    def __repr__(self) -> str:
        return f"<Stream {self._guard!r}>"

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Receive something, ``b""`` at the end, or raise what the token says."""
        self._attach()
        with _Translated(self._errors.ReadTimeout, self._errors.ReadError, self.close):
            self._sock.settimeout(timeout)
            received: bytes = self._guard.call(self._sock.recv, max_bytes)
            return received

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send everything, or raise what the token says. ``timeout`` is for each part that the system takes."""
        self._attach()
        rest = memoryview(buffer)
        with _Translated(self._errors.WriteTimeout, self._errors.WriteError, self.close):
            self._sock.settimeout(timeout)
            while rest:
                rest = rest[self._guard.upload(self._sock.send, rest) :]

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Stream:
        """Shake hands, or raise what the token says."""
        self._attach()
        try:
            with _Translated(self._errors.ConnectTimeout, self._errors.ConnectError):
                self._sock.settimeout(timeout)
                self._guard.call(self._shake_hands, ssl_context, server_hostname)
        except BaseException:
            self.close()
            raise
        return self

    def _shake_hands(self, context: ssl.SSLContext, server_hostname: str | None) -> None:
        try:
            self._sock = context.wrap_socket(self._sock, server_hostname=server_hostname)
        except Exception as error:
            close_half_made(error)
            raise

    def _attach(self) -> None:
        if self._guard.token is None:
            token, explicit = Binding.here()
            self._guard.attach(token, explicit=explicit)

    def detach(self) -> None:
        """Work for nobody, before the pool has the connection back; one that was cut is closed."""
        if not self._guard.detach():
            self.close()

    def close(self) -> None:
        """Close it; idempotent."""
        try:
            self._sock.close()
        finally:
            if self._held:
                self._held.pop()
                self._guard.release()

    def get_extra_info(self, info: str) -> Any:
        """What httpcore and its users ask: ``socket``, ``ssl_object``, the addresses, ``is_readable``."""
        look = _INFO.get(info)
        return None if look is None else look(self)

    def is_spent(self) -> bool:
        """Whether an idle connection must not be used again: it has ended, or is the parent process's."""
        return self._guard.foreign or _is_readable(self._sock)


_INFO: dict[str, Callable[[Stream], Any]] = {
    "is_readable": Stream.is_spent,
    "socket": lambda stream: stream._sock,  # noqa: SLF001 - this file's own
    "ssl_object": lambda stream: getattr(stream._sock, "_sslobj", None),  # noqa: SLF001 - as httpcore does it
    "client_addr": lambda stream: stream._sock.getsockname(),  # noqa: SLF001 - this file's own
    "server_addr": lambda stream: stream._sock.getpeername(),  # noqa: SLF001 - this file's own
}


def _is_readable(sock: socket.socket) -> bool:
    if sock.fileno() < 0:
        return True
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class _Translated:
    """``with _Translated(late, broken):`` gives what a socket raises the words of httpcore.

    ``cut`` is called if a `Cancelled` comes out: httpcore itself forgets a connection that was cut between connect and
    the first request, as in the greeting of a SOCKS proxy.
    """

    __slots__ = ("_broken", "_cut", "_late")

    def __init__(self, late: type[Exception], broken: type[Exception], cut: Callable[[], object] | None = None) -> None:
        self._late = late
        self._broken = broken
        self._cut = cut

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TimeoutError):
            raise self._late(error) from error
        if isinstance(error, OSError):
            raise self._broken(error) from error
        if isinstance(error, Cancelled) and self._cut is not None:
            self._cut()
