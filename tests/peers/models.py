"""A model that speaks the wire formats of OpenAI and of Anthropic, streamed or not, and says what it billed."""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any

from peers.server import Peer

if TYPE_CHECKING:
    from collections.abc import Callable

    from peers.certs import Authority
    from peers.server import Exchange

_SSE = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}
_JSON = {"Content-Type": "application/json"}


class Model(Peer):
    """A server that answers each request as its ``X-Play`` says, as `play` asked of it, and plainly without either.

    - ``"answer"``: three words
    - ``"stall"``: reads the request and falls silent; in a stream, after the three words
    - ``"drop"``: closes the connection without an answer
    - ``"429 30"``, ``"503"``, ``"529 0.01"``: that status, with that Retry-After if one is given

    Attributes:
        billed: How many tokens it made. It makes none for a client that has gone.
        headers: Those of each request.
    """

    def __init__(self, tls: Authority | None = None) -> None:
        super().__init__(self._answer, tls=tls)
        self.billed = 0
        self.headers: list[dict[str, str]] = []
        self._plays: deque[str] = deque()

    def play(self, *plays: str) -> None:
        """Answer the next requests so."""
        self._plays.extend(plays)

    def _answer(self, exchange: Exchange) -> None:
        request = exchange.read_request()
        order = json.loads(request.body)
        self.headers.append(request.headers)
        play = request.headers.get("x-play") or (self._plays.popleft() if self._plays else "answer")
        wire = _WIRES[request.target.partition("?")[0]]
        if play == "drop":
            exchange.sock.close()
        elif play[0].isdigit():
            _refuse(exchange, *play.split())
        elif order.get("stream"):
            self._stream(exchange, wire(), stall=play == "stall")
        elif play == "stall":
            exchange.hang()
        else:
            self.billed += 3
            _send(exchange, "200 OK", wire().whole("one two three"))

    def _stream(self, exchange: Exchange, wire: Wire, *, stall: bool) -> None:
        exchange.send(_head("200 OK", _SSE))
        for event in wire.begin():
            _chunk(exchange, event)
        for word in ("one", " two", " three"):
            self.billed += 1
            _chunk(exchange, wire.token(word))
        if stall:
            exchange.hang()  # the next token is being made; it is billed only to somebody who is still there
        for event in wire.end():
            _chunk(exchange, event)
        exchange.send(b"0\r\n\r\n")


class OpenAIWire:
    """``POST /v1/chat/completions``."""

    def whole(self, text: str) -> dict[str, Any]:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        return {**self._envelope("chat.completion"), "choices": [choice], "usage": usage}

    def begin(self) -> list[bytes]:
        return [self._delta({"role": "assistant", "content": ""})]

    def token(self, text: str) -> bytes:
        return self._delta({"content": text})

    def end(self) -> list[bytes]:
        return [self._delta({}, "stop"), b"data: [DONE]\n\n"]

    def _delta(self, delta: dict[str, str], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return b"data: %s\n\n" % json.dumps({**self._envelope("chat.completion.chunk"), "choices": [choice]}).encode()

    @staticmethod
    def _envelope(kind: str) -> dict[str, Any]:
        return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": "peer"}


class AnthropicWire:
    """``POST /v1/messages``."""

    def whole(self, text: str) -> dict[str, Any]:
        return self._message([{"type": "text", "text": text}], "end_turn")

    def begin(self) -> list[bytes]:
        start = {"index": 0, "content_block": {"type": "text", "text": ""}}
        return [
            self._event("message_start", message=self._message([], None)),
            self._event("content_block_start", **start),
        ]

    def token(self, text: str) -> bytes:
        return self._event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def end(self) -> list[bytes]:
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        return [
            self._event("content_block_stop", index=0),
            self._event("message_delta", delta=delta, usage={"output_tokens": 3}),
            self._event("message_stop"),
        ]

    @staticmethod
    def _message(content: list[dict[str, str]], stop: str | None) -> dict[str, Any]:
        head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "peer"}
        usage = {"input_tokens": 1, "output_tokens": 3}
        return {**head, "content": content, "stop_reason": stop, "stop_sequence": None, "usage": usage}

    @staticmethod
    def _event(kind: str, **fields: Any) -> bytes:
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), json.dumps({"type": kind, **fields}).encode())


Wire = OpenAIWire | AnthropicWire
_WIRES: dict[str, Callable[[], Wire]] = {"/v1/chat/completions": OpenAIWire, "/v1/messages": AnthropicWire}


def _refuse(exchange: Exchange, status: str, retry_after: str = "") -> None:
    headers = {"Retry-After": retry_after} if retry_after else {}
    _send(exchange, f"{status} Refused", {"error": {"type": "peer", "message": "not now"}}, headers)


def _send(exchange: Exchange, status: str, answer: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    body = json.dumps(answer).encode()
    exchange.send(_head(status, {**_JSON, **(headers or {}), "Content-Length": str(len(body))}), body)


def _head(status: str, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode()


def _chunk(exchange: Exchange, data: bytes) -> None:
    exchange.send(b"%x\r\n%s\r\n" % (len(data), data))
