"""A socket and its file, with every blocking call run through a guard."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

    from typing_extensions import Buffer

    from tokenscope._core._typing import override
    from tokenscope.net.guard import Guard
else:
    from tokenscope._core._typing import override

__all__ = ["GuardedReader", "GuardedSocket"]


class GuardedSocket:
    """Stands in for a connected socket, plain or TLS: `sendall`, `recv` and files are cancellable.

    It takes over one hold on ``guard`` and gives it back in `close`. Everything else is the socket's own.
    """

    __slots__ = ("__weakref__", "_guard", "_held", "_sock")

    def __init__(self, sock: socket.socket, guard: Guard) -> None:
        self._sock = sock
        self._guard = guard
        self._held = [None]  # the hold on the guard; popped once

    def __repr__(self) -> str:
        return f"<GuardedSocket {self._guard!r} of {self._sock!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def fileno(self) -> int:
        """The descriptor of the socket itself (not of the guard)."""
        return self._sock.fileno()

    def settimeout(self, value: float | None) -> None:
        """As the socket's own; a timeout that the token's deadline caused comes out as `Cancelled`."""
        self._sock.settimeout(value)

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        """Send everything, or raise what the token says."""
        self._guard.upload(self._sock.sendall, data, flags)

    def send(self, data: Buffer, flags: int = 0) -> int:
        """Send something, or raise what the token says."""
        return int(self._guard.upload(self._sock.send, data, flags))

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive, or raise what the token says."""
        received: bytes = self._guard.call(self._sock.recv, size, flags)
        return received

    def recv_into(self, buffer: Buffer, size: int = 0, flags: int = 0) -> int:
        """Receive into ``buffer``, or raise what the token says."""
        return int(self._guard.call(self._sock.recv_into, buffer, size, flags))

    def makefile(self, mode: str = "r", buffering: int | None = None, **options: Any) -> Any:
        """Open a file on the socket. Files for reading bytes are guarded; they are what HTTP clients use.

        Raises:
            ValueError: Any mode but ``"rb"``: such a file would block where no cancel reaches it.
        """
        if mode not in {"rb", "br"}:
            raise ValueError(f"a guarded socket opens files in mode 'rb' only, not {mode!r}; write with sendall()")
        reader = GuardedReader(self._sock.makefile("rb", 0, **options), self._guard)
        if buffering == 0:
            return reader
        return io.BufferedReader(reader, io.DEFAULT_BUFFER_SIZE if buffering in {None, -1} else buffering)

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


class GuardedReader(io.RawIOBase):
    """The raw file under a buffered one: each read asks the token, before and after."""

    def __init__(self, raw: io.RawIOBase, guard: Guard) -> None:
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
        """Whether it can be read: that is all it can."""
        return True

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
    def close(self) -> None:
        """Close the file; the last one closes a socket that was closed before."""
        if self.closed:
            return
        super().close()
        try:
            self._raw.close()
        finally:
            self._guard.release()
