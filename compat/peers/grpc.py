"""grpcio: calls with one answer and with many, against a server of the bench's own; messages are plain bytes."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc

from tokenscope.integrations.grpc import cancellable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Error = (grpc.RpcError, grpc.FutureCancelledError)

_HANDLERS = 8


class Server:
    """The server, as the story sees it: its methods work until their call has ended."""

    def __init__(self) -> None:
        self._gate = threading.Event()
        self._lock = threading.Lock()
        self._working = 0
        self._executor = ThreadPoolExecutor(_HANDLERS)
        together = threading.Barrier(_HANDLERS)  # all threads now, so that none appears in the middle of the story
        for started in [self._executor.submit(together.wait) for _ in range(_HANDLERS)]:
            started.result()
        self._server = grpc.server(self._executor)
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(lambda request, _context: request),
            "Brief": grpc.unary_unary_rpc_method_handler(self._brief),
            "Gate": grpc.unary_unary_rpc_method_handler(self._wait_for_gate),
            "Hang": grpc.unary_unary_rpc_method_handler(self._hang),
            "Drip": grpc.unary_stream_rpc_method_handler(self._drip),
            "Talk": grpc.stream_stream_rpc_method_handler(self._drip),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer", handlers),))
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def close(self) -> None:
        self._gate.set()
        self._server.stop(None).wait()
        self._executor.shutdown()

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        with cancellable(grpc.insecure_channel(f"127.0.0.1:{self._port}")) as channel:
            yield channel

    def working(self) -> int:
        """How many calls hang in a method."""
        with self._lock:
            return self._working

    def connections(self) -> list[str]:
        """The library tells of calls only; its channels are not to be seen from outside."""
        return [f"{self.working()} calls"] if self.working() else []

    def open_gate(self) -> None:
        self._gate.set()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._lock:
            self._working += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1

    def _hang(self, _request: bytes, context: Any) -> bytes:
        ended = threading.Event()
        with self._at_work():
            if context.add_callback(ended.set):
                ended.wait()
        return b"nobody ever waits this long"

    def _drip(self, request: Any, context: Any) -> Iterator[bytes]:
        yield b"first"
        self._hang(request, context)

    def _brief(self, request: bytes, _context: Any) -> bytes:
        time.sleep(0.003)
        return request

    def _wait_for_gate(self, request: bytes, _context: Any) -> bytes:
        with self._at_work():
            self._gate.wait()
        return request


def ask(channel: Any, text: str) -> str:
    """Let the server say it."""
    return bytes(channel.unary_unary("/peer/Echo")(text.encode())).decode()


def brief(channel: Any) -> None:
    """A call that takes about as long as a cancel needs."""
    assert channel.unary_unary("/peer/Brief")(b"brief") == b"brief"


def wait_for_gate(channel: Any) -> None:
    """Wait for `open_gate`."""
    assert channel.unary_unary("/peer/Gate")(b"open") == b"open"


def one_answer(channel: Any) -> None:
    channel.unary_unary("/peer/Hang")(b"")


def many_answers(channel: Any) -> None:
    for _answer in channel.unary_stream("/peer/Drip")(b""):
        pass


def both_ways(channel: Any) -> None:
    for _answer in channel.stream_stream("/peer/Talk")(iter([b""])):
        pass


def later(channel: Any) -> None:
    channel.unary_unary("/peer/Hang").future(b"").result()


CALLS: Mapping[str, Callable[[Any], object]] = {
    call.__name__: call for call in (one_answer, many_answers, both_ways, later)
}
