"""The service that the app's work waits for. It answers, or falls silent for ever, and notes when it is left.

/answer          the number of the connection that asked
/gate            the same, once the gate is open
anything else    silence: /fetch before the head, /urllib3 within a body, /stream after the first chunk, /events after
                 the first event of a model's answer

What follows in the path is the client's own affair: SDKs append their `/chat/completions` to what they are told.
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from typing import BinaryIO

_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR

# One event that the SDKs of OpenAI and of Anthropic both take for the first word of an answer.
_EVENT = (
    b"event: content_block_delta\n"
    b'data: {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "first"},'
    b' "id": "1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "first"}}]}\n\n'
)

# What is sent before the silence.
_PRELUDE = {
    "/fetch": b"",
    "/urllib3": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nthe first half",
    "/stream": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n",
    "/events": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n"
    % (len(_EVENT), _EVENT),
}


@dataclass(frozen=True)
class Note:
    """`what` is "reached" or "left"; `at` in seconds of the monotonic clock, which all processes share."""

    what: str
    visit: str
    call: str
    connection: int
    at: float


class Upstream:
    """A server with a thread for each connection. `context`: speaks TLS."""

    def __init__(self, tell: Callable[[Note], None], context: ssl.SSLContext | None = None) -> None:
        self.gate = threading.Event()
        self._tell = tell
        self._context = context
        self._connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        port = self._listener.getsockname()[1]
        # By name where there is TLS: so the look-up of a name is part of the story.
        self.address = f"http://127.0.0.1:{port}" if context is None else f"https://localhost:{port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept nobody any more; conversations end when their clients do."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                sock, _address = self._listener.accept()
                self._connections += 1
                threading.Thread(target=self._serve, args=(sock, self._connections), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):  # the client may leave at any moment: that is the story
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True)
            with sock, sock.makefile("rb") as stream:
                while target := _read_target(stream):
                    self._answer(sock, number, target)

    def _answer(self, sock: socket.socket, number: int, target: str) -> None:
        split = urlsplit(target)
        page = "/" + split.path.split("/")[1]
        asked = dict(parse_qsl(split.query))

        def note(what: str) -> None:
            self._tell(Note(what, asked.get("visit", ""), asked.get("call", ""), number, time.monotonic()))

        if page in _PRELUDE:
            sock.sendall(_PRELUDE[page])
            note("reached")
            _wait_until_gone(sock)
            note("left")
            raise ConnectionError
        if page == "/gate":
            note("reached")
            self.gate.wait(60)
        body = str(number).encode()
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


class Notes:
    """What the upstream services have noted. `tell` may be called by any thread, the rest by one."""

    def __init__(self) -> None:
        self._arriving: queue.SimpleQueue[Note] = queue.SimpleQueue()
        self._heard: list[Note] = []
        self.tell = self._arriving.put

    def expect(self, what: str, visit: str, calls: set[str], within: float) -> dict[str, Note]:
        """Wait until each of these calls has such a note.

        Raises:
            AssertionError: Some have not, in `within` seconds.
        """
        end = time.monotonic() + within
        while True:
            found = {note.call: note for note in self._heard if (note.what, note.visit) == (what, visit)}
            if calls <= found.keys():
                return found
            try:
                self._heard.append(self._arriving.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                missing = ", ".join(sorted(calls - found.keys()))
                raise AssertionError(f"upstream was not {what} by {missing} within {within} s") from None


def _read_target(stream: BinaryIO) -> str:
    """Read the next request, and return what it asks for; nothing at the end. An S3 key may hide a query."""
    first, line, length = stream.readline(), b"-", 0
    while line.strip():
        line = stream.readline()
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    stream.read(length)
    return unquote(first.decode("latin-1").split(" ")[1]) if first.strip() else ""


def _wait_until_gone(sock: socket.socket) -> None:
    poll = select.poll()
    poll.register(sock, _GONE)
    poll.poll()
