"""A small model server: OpenAI's streaming wire format, and a meter. Runs in a process of its own.

It makes a token every so often, in silence while it thinks, and bills each one until it notices that its
client is gone. It looks at the connection while it waits, as good inference servers do. So what is billed
after a hang-up is the doing of the app in between.

``GET /ledger`` tells what was billed, to whom and when; times are ``time.monotonic()``, the same for all
processes of one machine.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tokenscope.cli.demo_process import end_with_parent

__all__ = ["THINKING", "Call", "Ledger", "main"]

#: How many tokens the model thinks, in silence, for each of OpenAI's words of effort.
THINKING = {"minimal": 0, "low": 20, "medium": 60, "high": 120}
_WORDS = "a thread that nobody waits for still runs and still is paid for".split()  # noqa: SIM905
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


@dataclass
class Call:
    """One call of the model. Written by its own thread."""

    name: str
    opened: float
    tokens: list[float] = field(default_factory=list)  # when each was made
    closed: float | None = None
    gone: bool = False  # it ended because the client had gone


class Ledger:
    """All calls. Thread-safe."""

    def __init__(self, *, aloud: bool) -> None:
        self._calls: list[Call] = []  # only ever appended to
        self._aloud = aloud

    def open(self, name: str) -> Call:
        """Begin to bill."""
        call = Call(name, time.monotonic())
        self._calls.append(call)
        return call

    def close(self, call: Call) -> None:
        """Stop billing."""
        call.closed = time.monotonic()
        if self._aloud:
            why = ", then its client was gone" if call.gone else ""
            # In one piece, newline included: `print` would let other threads in between.
            sys.stderr.write(f"model: {call.name} billed {len(call.tokens)} tokens{why}\n")

    def as_json(self) -> bytes:
        """Everything so far."""
        return json.dumps([asdict(call) for call in tuple(self._calls)]).encode()


class Server(ThreadingHTTPServer):
    """A thread per connection; ``rate`` in tokens per second."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, listener: socket.socket, rate: float, *, aloud: bool) -> None:
        super().__init__(listener.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.rate = rate
        self.ledger = Ledger(aloud=aloud)


class ClientGone(Exception):
    """Nobody listens to this call any more."""


class Handler(BaseHTTPRequestHandler):
    """``POST /v1/chat/completions`` and ``GET /ledger``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        """Say nothing: the ledger tells."""

    def do_GET(self) -> None:
        """Show the ledger."""
        body = self.server.ledger.as_json()
        self._head(200, "application/json", {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def do_POST(self) -> None:
        """Complete a chat, token by token."""
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions" or not order.get("stream"):
            self.send_error(400, "this model only streams, from /v1/chat/completions")
            return
        call = self.server.ledger.open(self.headers.get("X-Call", "a call"))
        try:
            self._complete(order, call)
        except (ClientGone, OSError):
            call.gone = self.close_connection = True
        finally:
            self.server.ledger.close(call)

    def _complete(self, order: dict[str, Any], call: Call) -> None:
        thinking = THINKING[order.get("reasoning_effort", "medium")]
        for _ in range(thinking):
            self._make_token(call)
        self._head(200, "text/event-stream", {"Transfer-Encoding": "chunked"})
        self._send(call, {"role": "assistant", "content": ""})
        for number in range(order.get("max_completion_tokens", 64)):
            self._make_token(call)
            self._send(call, {"content": f" {_WORDS[number % len(_WORDS)]}"})
        self._send(call, {}, finish="stop", usage=_usage(len(call.tokens), thinking))
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _make_token(self, call: Call) -> None:
        """Wait until the next token is due, and bill it, unless the client goes first.

        Raises:
            ClientGone: It went.
        """
        due = call.opened + (len(call.tokens) + 1) / self.server.rate
        waiter = select.poll()
        waiter.register(self.connection, _GONE)
        if waiter.poll(max(0.0, due - time.monotonic()) * 1000):
            raise ClientGone
        call.tokens.append(time.monotonic())

    def _send(
        self,
        call: Call,
        delta: dict[str, str],
        *,
        finish: str | None = None,
        usage: dict[str, Any] | None = None,
    ) -> None:
        event = {
            "id": f"chatcmpl-{call.name}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": "demo-thinker",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
            "usage": usage,
        }
        self._chunk(b"data: %s\n\n" % json.dumps(event).encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def _usage(completion: int, thinking: int) -> dict[str, Any]:
    return {
        "prompt_tokens": 1,
        "completion_tokens": completion,
        "total_tokens": completion + 1,
        "completion_tokens_details": {"reasoning_tokens": thinking},
    }


def main(fd: str, rate: str, aloud: str) -> None:
    """Serve on the inherited listener until the parent process closes our stdin."""
    server = Server(socket.socket(fileno=int(fd)), float(rate), aloud=aloud == "aloud")
    stopper = threading.Thread(target=end_with_parent, args=(server.shutdown,), daemon=True)
    stopper.start()
    server.serve_forever(poll_interval=0.05)
    server.server_close()


if __name__ == "__main__":
    main(*sys.argv[1:])
