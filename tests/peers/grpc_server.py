"""A gRPC server whose methods hang on cue; messages are plain bytes, so no generated code is needed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HANDLERS = 8


class GrpcServer:
    """Serves `METHODS` under ``/peer/``. A context manager.

    Attributes:
        reached: Set when a handler has begun to hang.
        gone: Set when a call has ended in whose handler it hung.
        calls: The names of the methods that were called, in order.
        left: The seconds that the last call had left when it arrived; None without a deadline.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.left: float | None = None
        self.refresh()
        self._executor = ThreadPoolExecutor(_HANDLERS, thread_name_prefix="grpc-handler")
        self._server = grpc.server(self._executor)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer", self._handlers()),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def refresh(self) -> None:
        """Forget what has happened."""
        self.calls.clear()
        self.reached = threading.Event()
        self.gone = threading.Event()

    def __enter__(self) -> Self:
        together = threading.Barrier(_HANDLERS)  # all threads now, so that none appears in the middle of a test
        for started in [self._executor.submit(together.wait, 10) for _ in range(_HANDLERS)]:
            started.result()
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait(10)
        self._executor.shutdown()

    def _handlers(self) -> dict[str, Any]:
        return {
            name: getattr(grpc, f"{kind}_rpc_method_handler")(self._counting(name, method))
            for name, (kind, method) in METHODS.items()
        }

    def _counting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def handler(request: Any, context: Any) -> Any:
            self.calls.append(name)
            self.left = context.time_remaining()
            return method(self, request, context)

        return handler

    def hang(self, context: Any) -> None:
        """Until the call has ended."""
        ended = threading.Event()
        if context.add_callback(ended.set):
            self.reached.set()
            assert ended.wait(30)
        self.gone.set()


def _answer(_server: GrpcServer, request: bytes, _context: Any) -> bytes:
    return b"answer to " + request


def _refuse(_server: GrpcServer, _request: bytes, context: Any) -> bytes:
    return bytes(context.abort(grpc.StatusCode.NOT_FOUND, "no such thing"))


def _hang(server: GrpcServer, _request: bytes, context: Any) -> bytes:
    server.hang(context)
    return b"too late"


def _count(_server: GrpcServer, request: bytes, _context: Any) -> Iterator[bytes]:
    for number in range(int(request)):
        yield b"%d" % number


def _drip(server: GrpcServer, _request: bytes, context: Any) -> Iterator[bytes]:
    yield b"one"
    server.hang(context)


def _hang_first(server: GrpcServer, _request: bytes, context: Any) -> Iterator[bytes]:
    server.hang(context)
    yield b"too late"


def _join(_server: GrpcServer, requests: Iterator[bytes], _context: Any) -> bytes:
    return b"+".join(requests)


def _echo(_server: GrpcServer, requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
    yield from requests


METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    "Answer": ("unary_unary", _answer),
    "Refuse": ("unary_unary", _refuse),
    "Hang": ("unary_unary", _hang),
    "Count": ("unary_stream", _count),
    "Drip": ("unary_stream", _drip),
    "HangFirst": ("unary_stream", _hang_first),
    "Join": ("stream_unary", _join),
    "Echo": ("stream_stream", _echo),
}


def method(channel: Any, name: str) -> Any:
    """What a generated stub would have under this name."""
    kind, _function = METHODS[name]
    return getattr(channel, kind)(f"/peer/{name}")
