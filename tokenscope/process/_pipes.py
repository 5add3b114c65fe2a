"""The pipes of a process: files whose blocked reads and writes a cancel ends, and the talk of `communicate`."""

from __future__ import annotations

import contextlib
import io
import os
import reprlib
import select
from typing import IO, TYPE_CHECKING, Any

from tokenscope._core._typing import override
from tokenscope.process._waiting import wait_ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope.process._child import Child

__all__ = ["GuardedPipe", "Talk", "guarded"]

_CHUNK = 65536
# More than any pipe holds (a megabyte, where somebody asked for it): a stranger may go on writing for ever.
_LAST_READS = 40
# What a pipe that polls as writable takes without blocking. Our end is not made non-blocking: a read end may be handed
# on as the standard input of another process, which would share the flag and does not expect it.
_ATOM = select.PIPE_BUF


class GuardedPipe(io.RawIOBase):
    """Our end of a pipe. Reading and writing are checkpoints, and end with the process.

    When the process and its group are gone, a pipe that a stranger still holds open counts as ended.
    """

    def __init__(self, raw: io.FileIO, child: Child) -> None:
        super().__init__()
        self._raw = raw
        self._child = child

    @override
    def readable(self) -> bool:
        return self._raw.readable()

    @override
    def writable(self) -> bool:
        return self._raw.writable()

    @override
    def fileno(self) -> int:
        return self._raw.fileno()

    @override
    def readinto(self, buffer: Any) -> int | None:
        return self._when_ready(select.POLLIN, lambda: self._raw.readinto(buffer))

    @override
    def write(self, data: Any) -> int | None:
        return self._when_ready(select.POLLOUT, lambda: self._raw.write(memoryview(data)[:_ATOM]))

    def _when_ready(self, mask: int, operation: Callable[[], int | None]) -> int | None:
        child, fd = self._child, self.fileno()
        with child.shielded():
            while True:
                gone = child.tree.gone  # looked at first: what it wrote before its end is there after that
                ready = child.step({fd: mask}, None)
                if child.cancelled:
                    if child.tree.gone:
                        child.raise_cut()
                elif ready:
                    return operation()
                elif gone:
                    return 0

    @override
    def close(self) -> None:
        try:
            super().close()
        finally:
            self._raw.close()


def guarded(stream: IO[Any] | None, child: Child, bufsize: int) -> IO[Any] | None:
    """The stream that ``subprocess`` made, rebuilt on a guarded pipe."""
    if stream is None:
        return None
    if isinstance(stream, io.TextIOWrapper):
        settings = (stream.encoding, stream.errors, None, stream.line_buffering, stream.write_through)
        inner = _rebuilt(stream.detach(), child, bufsize)
        return io.TextIOWrapper(inner, *settings)
    rebuilt: IO[Any] = _rebuilt(stream, child, bufsize)
    return rebuilt


def _rebuilt(stream: Any, child: Child, bufsize: int) -> Any:
    size = bufsize if bufsize > 1 else io.DEFAULT_BUFFER_SIZE
    if isinstance(stream, io.FileIO):
        return GuardedPipe(stream, child)
    kind = io.BufferedReader if isinstance(stream, io.BufferedReader) else io.BufferedWriter
    return kind(GuardedPipe(stream.detach(), child), size)


class Talk:
    """What `communicate` has sent and heard; kept between calls that ran out of time."""

    def __init__(self, stdin: IO[Any] | None, stdout: IO[Any] | None, stderr: IO[Any] | None, message: Any) -> None:
        self._streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        self._heard: dict[str, list[bytes]] = {name: [] for name in ("stdout", "stderr") if self._streams[name]}
        self._unsent = memoryview(b"") if stdin is None else memoryview(_encoded(message, stdin)).cast("B")
        self._open = {name: stream for name, stream in self._streams.items() if stream and not stream.closed}
        if stdin is not None and not stdin.closed:
            self._begin(stdin)

    def _begin(self, stdin: IO[Any]) -> None:
        try:
            stdin.flush()  # what the user wrote before
        except BrokenPipeError:
            self.hang_up()
        if not self._unsent:
            self.hang_up()

    @property
    def wanted(self) -> dict[int, int]:
        """What to wait for."""
        masks = {"stdin": select.POLLOUT}
        return {stream.fileno(): masks.get(name, select.POLLIN) for name, stream in self._open.items()}

    def go_on(self, ready: set[int]) -> None:
        """Send and hear what is possible without blocking."""
        for name, stream in tuple(self._open.items()):
            if stream.fileno() in ready:
                if name == "stdin":
                    self._send(stream.fileno())
                else:
                    self._hear(name, stream)

    def _send(self, fd: int) -> None:
        try:
            sent = os.write(fd, self._unsent[:_ATOM])
        except BrokenPipeError:
            sent = len(self._unsent)  # it does not listen
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self.hang_up()

    def _hear(self, name: str, stream: IO[Any]) -> None:
        data = os.read(stream.fileno(), _CHUNK)
        if data:
            self._heard[name].append(data)
        else:
            del self._open[name]
            stream.close()

    def hang_up(self) -> None:
        """Close its standard input."""
        stdin = self._open.pop("stdin", None)
        if stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                stdin.close()

    def finish(self) -> None:
        """Everything is gone: hear what is left in the pipes, and close them, also if a stranger holds one open."""
        self.hang_up()
        for _ in range(_LAST_READS):
            ready = wait_ready(self.wanted, 0.0)
            if not ready:
                break
            self.go_on(ready)
        while self._open:
            self._open.popitem()[1].close()

    def so_far(self, name: str) -> bytes | None:
        """The bytes of a stream until now; None if it is no pipe."""
        return b"".join(self._heard[name]) if name in self._heard else None

    def text(self, name: str, errors: str | None = None) -> Any:
        """As `so_far`, decoded if the stream is one of text; ``errors`` for what may be cut in the middle."""
        data, stream = self.so_far(name), self._streams[name]
        if data is None or not isinstance(stream, io.TextIOWrapper):
            return data
        return (
            data.decode(stream.encoding, errors or stream.errors or "strict").replace("\r\n", "\n").replace("\r", "\n")
        )


def _encoded(message: Any, stdin: IO[Any]) -> Any:
    if message is None:
        return b""
    if isinstance(stdin, io.TextIOWrapper):
        if not isinstance(message, str):
            raise TypeError(f"input must be a str for a pipe of text, not {reprlib.repr(message)}")
        return message.encode(stdin.encoding, stdin.errors or "strict")
    try:
        return memoryview(message)
    except TypeError:
        said = f"input must be bytes for a pipe of bytes, not {reprlib.repr(message)}; text=True makes it one of text"
        raise TypeError(said) from None
