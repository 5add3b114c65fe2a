"""Cancellable gRPC: `cancellable(channel)` is that channel, with calls that end with the current token.

guarded:      calls of all four kinds, `future` and `with_call` too: connecting, waiting for a ready channel, for the
    answer, for each message of a stream; what a request iterator waits for runs under the token as well
interrupted:  the call is cancelled; the server is told, and its handler's context ends
not:          `grpc.channel_ready_future`; what a request iterator is blocked in, unless that listens to the token;
    `grpc.aio` is refused
versions:     grpcio >=1.60,<2
compat:       grpcio-1.60.0, grpcio-latest, tests/integrations/test_grpc.py
"""

from __future__ import annotations

import contextlib
import weakref
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, NoReturn, Self

from tokenscope._core import token as tokens
from tokenscope._core.current import effective_token, standing_back, use_token
from tokenscope._core.errors import Cancelled
from tokenscope.integrations._binding import check_token, decide
from tokenscope.integrations._missing import needs

with needs("grpc", extra="grpc"):
    import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextvars import Context

    from tokenscope._core.token import CancellationToken

__all__ = ["CancellableChannel", "cancellable"]


def cancellable(channel: grpc.Channel, *, token: CancellationToken | None = None) -> CancellableChannel:
    """``channel``, with calls that end with the current token. Give the result to your stubs.

    On a cancel the blocked call raises `Cancelled` with the token's reason and gRPC's error as its ``__cause__``, and
    the server is told. Whether it has carried out what was asked is not known. The time in seconds that the token has
    left is sent along as the call's deadline, if it is less than ``timeout=``. Outside any scope nothing changes.
    Thread-safe, as the channel is; closing either closes both.

    Args:
        channel: What `grpc.insecure_channel`, `grpc.secure_channel` or `grpc.intercept_channel` made.
        token: Cancels every call too; it is added to the token that is current when a call begins.

    Raises:
        TypeError: ``channel`` is no such channel, but an asynchronous one for example; or ``token`` is no token.
    """
    if not isinstance(channel, grpc.Channel):
        raise TypeError(
            f"channel must be a grpc.Channel, not {channel!r} (with grpc.aio, cancel the asyncio task that awaits it)"
        )
    check_token(token)
    return CancellableChannel(channel, token)


class CancellableChannel(grpc.Channel):
    """See `cancellable`."""

    def __init__(self, channel: grpc.Channel, token: CancellationToken | None) -> None:
        self._channel = channel
        self._token = token

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        """As of the channel."""
        return _Unary(self._channel.unary_unary(*args, **options), self._token)

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        """As of the channel."""
        return _Unary(self._channel.stream_unary(*args, **options), self._token, sends_stream=True)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        """As of the channel."""
        return _Streaming(self._channel.unary_stream(*args, **options), self._token)

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        """As of the channel."""
        return _Streaming(self._channel.stream_stream(*args, **options), self._token, sends_stream=True)

    def subscribe(self, *args: Any, **options: Any) -> None:
        """As of the channel."""
        self._channel.subscribe(*args, **options)

    def unsubscribe(self, callback: Callable[..., Any]) -> None:
        """As of the channel."""
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Method:
    """A method of a server, as a stub calls it."""

    def __init__(self, inner: Any, token: CancellationToken | None, *, sends_stream: bool = False) -> None:
        self._inner = inner
        self._explicit = token
        self._sends_stream = sends_stream

    def _begin(self, start: Callable[..., Any], request: Any, timeout: float | None, options: Any) -> _Running:
        """Start a call under the token.

        Raises:
            Cancelled: It is cancelled: nothing was sent.
        """
        token = effective_token(self._explicit)
        token.check()
        if self._sends_stream:
            request = _Requests(request, token)
        left = token.remaining()
        limit = timeout if left is None or (timeout is not None and timeout <= left) else left
        return _Running(start(request, limit, *options[0], **options[1]), token, is_own_limit=limit == timeout)


class _Unary(_Method):
    """One answer."""

    def __call__(self, request: Any, timeout: float | None = None, *args: Any, **options: Any) -> Any:
        if self._is_free():
            return self._inner(request, timeout, *args, **options)
        return self._begin(self._inner.future, request, timeout, (args, options)).result()

    def with_call(self, request: Any, timeout: float | None = None, *args: Any, **options: Any) -> Any:
        """The answer, and the call it came by."""
        if self._is_free():
            return self._inner.with_call(request, timeout, *args, **options)
        call = self._begin(self._inner.future, request, timeout, (args, options))
        return call.result(), call

    def future(self, request: Any, timeout: float | None = None, *args: Any, **options: Any) -> Any:
        """A call that goes on meanwhile. Its token is the one that is current now."""
        if self._is_free():
            return self._inner.future(request, timeout, *args, **options)
        return self._begin(self._inner.future, request, timeout, (args, options))

    def _is_free(self) -> bool:
        """Whether nothing could cancel it."""
        return standing_back() or effective_token(self._explicit) is tokens.NEVER


class _Streaming(_Method):
    """Many answers."""

    def __call__(self, request: Any, timeout: float | None = None, *args: Any, **options: Any) -> Any:
        if standing_back() or effective_token(self._explicit) is tokens.NEVER:
            return self._inner(request, timeout, *args, **options)
        return self._begin(self._inner, request, timeout, (args, options))


class _Running:
    """A call that was begun: what gRPC returned for it, and the token that it is bound to, whoever reads it.

    The token knows the call weakly: a stream that is dropped is cancelled by gRPC, as ever.
    """

    def __init__(self, call: Any, token: CancellationToken, *, is_own_limit: bool) -> None:
        self._call = call
        self._token = token
        self._is_own_limit = is_own_limit
        registration = token.on_cancel(_cancel, weakref.ref(call))
        if not call.add_callback(lambda: registration.close(wait=False)):
            registration.close(wait=False)  # it has ended already

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self._guarded(next, self._call)

    def result(self, timeout: float | None = None) -> Any:
        """The answer."""
        return self._guarded(self._call.result, timeout)

    def exception(self, timeout: float | None = None) -> Any:
        """What the call failed with."""
        return self._guarded(self._call.exception, timeout)

    def traceback(self, timeout: float | None = None) -> Any:
        """Where it failed."""
        return self._guarded(self._call.traceback, timeout)

    def initial_metadata(self) -> Any:
        """What the server said first."""
        return self._guarded(self._call.initial_metadata)

    def _guarded(self, wait: Callable[..., Any], *args: Any) -> Any:
        """A blocked call, and what its end means: the token decides."""
        try:
            answer = wait(*args)
        except (grpc.RpcError, grpc.FutureCancelledError, grpc.FutureTimeoutError) as error:
            self._judge(error)
        self._token.check()
        return answer

    def _judge(self, error: Exception) -> NoReturn:
        if not self._is_own_limit and self._call.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._token.wait(1)  # the time was the token's own: its clock says so in a moment
        decide(self._token, error)
        raise error


def _cancel(call: weakref.ref[Any]) -> None:
    found = call()
    if found is not None:
        found.cancel()


class _Requests:
    """The messages that a caller sends; gRPC draws them on a thread of its own. Here they are drawn under the token."""

    def __init__(self, messages: Iterable[Any], token: CancellationToken) -> None:
        self._messages: Iterator[Any] = iter(messages)
        self._token = token
        self._context: Context = copy_context()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self._context.run(self._draw)

    def _draw(self) -> Any:
        with contextlib.suppress(Cancelled), use_token(self._token):  # that thread is gRPC's, and knows no `Cancelled`
            return next(self._messages)
        raise StopIteration


grpc.Call.register(_Running)
grpc.Future.register(_Running)
