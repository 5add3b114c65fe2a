"""A socket and its file, with every blocking call run through a guard."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any, Protocol, Self

from tokenscope.net.handshake import close_half_made

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable

    from typing_extensions import Buffer

    from tokenscope._core._typing import override
else:
    from tokenscope._core._typing import override

__all__ = ["GuardedReader", "GuardedSocket"]

# What else blocks, by the way the bytes go.
_RECEIVES = frozenset({"recvfrom", "recvfrom_into", "recvmsg", "recvmsg_into", "read", "do_handshake", "unwrap"})
_SENDS = frozenset({"sendmsg", "sendfile", "write"})


def _given(flags: int) -> tuple[int, ...]:
    """The flags, if there are any: the sockets of urllib3's pyOpenSSL know no such argument."""
    return (flags,) if flags else ()


class _Guard(Protocol):
    """What a guarded socket needs of a `Guard` or a `SharedGuard`."""

    def call(self, operation: Callable[..., Any], *args: Any) -> Any: ...
    def upload(self, operation: Callable[..., Any], *args: Any) -> Any: ...
    def shutdown(self, how: int) -> None: ...
    def retain(self) -> None: ...
    def release(self) -> None: ...


class GuardedSocket:
    """Stands in for a connected socket, plain or TLS: whatever blocks is cancellable.

    A blocked call raises `Cancelled`, and the connection is over: its peer sees the end at once. What does not block
    is the socket's own. It takes over one hold on ``guard`` and gives it back in `close`.
    """

    __slots__ = ("__weakref__", "_guard", "_held", "_sock")

    def __init__(self, sock: socket.socket, guard: _Guard) -> None:
        self._sock = sock
        self._guard = guard
        self._held = [None]  # the hold on the guard; popped once

    def __repr__(self) -> str:
        return f"<GuardedSocket {self._guard!r} of {self._sock!r}>"

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._sock, name)
        if name in _RECEIVES:
            return functools.partial(self._guarded, self._guard.call, found)
        if name in _SENDS:
            return functools.partial(self._guarded, self._guard.upload, found)
        return found

    @staticmethod
    def _guarded(run: Callable[..., Any], operation: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        return run(functools.partial(operation, *args, **options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor of the socket itself (not of the guard)."""
        return self._sock.fileno()

    def settimeout(self, value: float | None) -> None:
        """As the socket's own; a timeout that the token's deadline caused comes out as `Cancelled`."""
        self._sock.settimeout(value)

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        """Send everything, or raise what the token says."""
        self._guard.upload(self._sock.sendall, data, *_given(flags))

    def send(self, data: Buffer, flags: int = 0) -> int:
        """Send something, or raise what the token says."""
        return int(self._guard.upload(self._sock.send, data, *_given(flags)))

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive, or raise what the token says."""
        received: bytes = self._guard.call(self._sock.recv, size, *_given(flags))
        return received

    def recv_into(self, buffer: Buffer, size: int = 0, flags: int = 0) -> int:
        """Receive into ``buffer``, or raise what the token says."""
        return int(self._guard.call(self._sock.recv_into, buffer, size, *_given(flags)))

    def start_tls(
        self, ssl_context: ssl.SSLContext, *, server_hostname: str | None = None, server_side: bool = False
    ) -> None:
        """Go on in TLS. What was read ahead by a file of this socket is lost: open files afterwards.

        Args:
            ssl_context: The settings and certificates.
            server_hostname: Whom the other side has to be, for a client.
            server_side: This is the server.

        Raises:
            Cancelled: The token was cancelled, before or meanwhile.
            ssl.SSLError: The handshake failed. After either the socket is good for `close` only.
        """
        self._guard.call(
            functools.partial(self._wrap, ssl_context, server_hostname=server_hostname, server_side=server_side)
        )

    def _wrap(self, ssl_context: ssl.SSLContext, **options: Any) -> None:
        try:
            self._sock = ssl_context.wrap_socket(self._sock, **options)
        except BaseException as error:
            close_half_made(error)
            raise

    def makefile(
        self,
        mode: str = "r",
        buffering: int | None = None,
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """Open a file on the socket, as the socket's own does; its reads and writes are guarded.

        Raises:
            ValueError: A mode that is not made of r, w and b; a text file without a buffer.
        """
        if not {"r", "w", "b"} >= set(mode):
            raise ValueError(f"mode must be made of 'r', 'w' and 'b', not {mode!r}")
        if buffering == 0 and "b" not in mode:
            raise ValueError("a text file needs a buffer: buffering must not be 0")
        writes = "w" in mode
        reads = "r" in mode or not writes
        raw = GuardedReader(self._sock.makefile("r" * reads + "w" * writes + "b", 0), self._guard)  # type: ignore[call-overload]
        if buffering == 0:
            return raw
        size = io.DEFAULT_BUFFER_SIZE if buffering is None or buffering < 0 else buffering
        buffered = _buffered(raw, size, reads=reads, writes=writes)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def shutdown(self, how: int) -> None:
        """Shut the connection down below TLS, and only while it is in use.

        The socket's own method would drop the TLS layer under a reader, and would hit whoever has taken the
        connection out of its pool since.
        """
        self._guard.shutdown(how)

    def close(self) -> None:
        """Close the socket; the connection ends when its files are closed as well."""
        try:
            self._sock.close()
        finally:
            if self._held:
                self._held.pop()
                self._guard.release()


def _buffered(raw: GuardedReader, size: int, *, reads: bool, writes: bool) -> Any:
    if reads and writes:
        return io.BufferedRWPair(raw, raw, size)
    return io.BufferedReader(raw, size) if reads else io.BufferedWriter(raw, size)


class GuardedReader(io.RawIOBase):
    """The raw file under a buffered one: each read and write asks the token, before and after."""

    def __init__(self, raw: io.RawIOBase, guard: _Guard) -> None:
        super().__init__()
        self._raw = raw
        self._guard = guard
        guard.retain()

    # No __getattr__: io.IOBase asks ten times a request for a private field that is not there.

    @property
    def name(self) -> Any:
        """What the socket's own file says: the descriptor."""
        return getattr(self._raw, "name", -1)

    @property
    def _sock(self) -> Any:
        """The socket below; some clients (docker's) fetch it from here."""
        return getattr(self._raw, "_sock", None)

    @override
    def readable(self) -> bool:
        """Whether it was opened for reading."""
        return self._raw.readable()

    @override
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._raw.writable()

    @override
    def fileno(self) -> int:
        """The descriptor of the socket."""
        return self._raw.fileno()

    @override
    def readinto(self, buffer: Buffer) -> int | None:
        """Read what is there, or wait for it, or raise what the token says."""
        count: int | None = self._guard.call(self._raw.readinto, buffer)
        return count

    @override
    def write(self, data: Buffer) -> int | None:
        """Write something, or raise what the token says."""
        count: int | None = self._guard.upload(self._raw.write, data)
        return count

    @override
    def close(self) -> None:
        """Close the file; the last one closes a socket that was closed before."""
        if self.closed:
            return
        super().close()
        try:
            self._raw.close()
        finally:
            self._guard.release()
