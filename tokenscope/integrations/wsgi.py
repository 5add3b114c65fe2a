"""A WSGI request owns its work: `RequestScopeMiddleware` gives it a scope, a watch and an ending.

guarded:      the app's call, every step of its body, and all that was spawned in the request's scope
interrupted:  a hang-up, the timeout or a shutdown cancels the scope's token, which wakes what blocks under it
not:          code without checkpoints; a client that vanished without a packet; servers that hide the socket
versions:     gunicorn >=21.2 (sync, gthread), waitress >=3.0, werkzeug >=2.3, wsgiref
compat:       gunicorn-sync, gunicorn-gthread, waitress, werkzeug, wsgiref
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from tokenscope.integrations._answers import StreamCut
from tokenscope.integrations._body import Body
from tokenscope.integrations._request import SCOPE_KEY, Request, current_request
from tokenscope.integrations._settings import Methods, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from tokenscope.integrations._answers import Answer
    from tokenscope.watch import HalfClose

    ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]

__all__ = ["SCOPE_KEY", "RequestScopeMiddleware", "StreamCut", "cancellable"]

P = ParamSpec("P")
T = TypeVar("T")

# In tracebacks it has the address by which logs and error trackers are told to ignore it.
StreamCut.__module__ = __name__


class RequestScopeMiddleware:
    """Put it outermost, before anything replaces ``wsgi.input``.

    Each request gets a `ThreadScope`: in ``environ["tokenscope.scope"]``, and current wherever the app's code
    runs, also in the steps of a streamed body. When the client hangs up, the scope is cancelled with
    ``client_disconnected``. A list body leaves once the scope's children were joined; a streamed one ends the
    scope in its ``close()``. Thread-safe.

    No `Cancelled` leaves it. The request's own becomes a bare status, 499 (client gone, stopped), 503
    (shutdown) or 504 (deadline); a foreign one becomes a 500 and an event. A stream that has begun ends if its
    client has gone; else the server is told a `StreamCut`, and tears the connection. Every other exception
    goes on unchanged.

    Args:
        app: The WSGI app to guard.
        timeout: Seconds for each request, streaming included. None: no limit.
        half_close: Whether a client that only stops sending counts as gone: ``"cancel"`` or ``"ignore"``.
        methods: What a hang-up cancels: ``"safe"`` (GET, HEAD, OPTIONS) or ``"all"``. A view opts in with
            `cancellable`; a streamed body always is, from its first byte.
        max_threads: How many children of one request run at a time. None: all.
        grace: Seconds after a cancel before a child counts as a straggler.
        on_straggler: ``"wait"`` for it, ``"abandon"`` it (the server then answers 500), or ``"interrupt"`` it; as for
            `ThreadScope`. The view itself is no child: it is never given up and never interrupted.

    Raises:
        TypeError, ValueError: A bad argument, named.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        timeout: float | None = None,
        half_close: HalfClose = "cancel",
        methods: Methods = "safe",
        max_threads: int | None = None,
        grace: float = 5.0,
        on_straggler: Literal["wait", "abandon", "interrupt"] = "wait",
    ) -> None:
        if not callable(app):
            raise TypeError(f"app must be a WSGI application, not {app!r}")
        self._app = app
        self._settings = Settings(timeout, half_close, methods, max_threads, grace, on_straggler)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        outer = current_request()
        if outer is not None:  # another one is around us: they share its scope
            if SCOPE_KEY in environ and self._settings.arms(environ.get("REQUEST_METHOD", "GET")):
                outer.hangup.arm()  # not for a request that a view makes up to call an app
            return self._app(environ, start_response)
        request = Request(environ, self._settings)
        head = _DeferredHead(start_response, request.hangup.arm)
        return request.run(self._serve, request, environ, head)

    def _serve(self, request: Request, environ: WSGIEnvironment, head: _DeferredHead) -> Iterable[bytes]:
        body: Iterable[bytes] = ()
        try:
            request.watch(environ)
            request.scope.token.check()
            body = request.timed(self._app, environ, head.start)
            if not _goes_untouched(body, environ):
                return Body(request, body, head)
        except BaseException as error:
            return _answered(request.end(error, status=head.status, begun=head.begun), head)
        return _whole(request, body, head)


def cancellable(view: Callable[P, T]) -> Callable[P, T]:
    """Let a hang-up cancel the requests that this view serves, whatever their method.

    For any function that runs inside of `RequestScopeMiddleware`; Flask has a ``cancellable`` of its own.

    Raises:
        TypeError: ``view`` is not callable.
        LookupError: At the call: there is no `RequestScopeMiddleware` around it.
    """
    if not callable(view):
        raise TypeError(f"cancellable() decorates a callable, not {view!r}")

    @functools.wraps(view)
    def armed(*args: P.args, **kwargs: P.kwargs) -> T:
        request = current_request()
        if request is None:
            raise LookupError("@cancellable needs a RequestScopeMiddleware around the app; there is none here")
        request.hangup.arm()
        return view(*args, **kwargs)

    return armed


class _DeferredHead:
    """Status and headers, kept back until the first chunk is there, as for an app that is a generator.

    So a request that is cancelled before its first byte can still be answered, on every server (some do not
    forget the first headers when they are told others).
    """

    __slots__ = ("_begin", "_said", "_start_response", "_write", "length", "status")

    def __init__(self, start_response: StartResponse, begin: Callable[[], object]) -> None:
        self._start_response = start_response
        self._begin = begin  # called when the app sends its first byte by ``write()``
        self._said: tuple[str, list[tuple[str, str]]] | None = None
        self._write: Callable[[bytes], object] | None = None  # the server's; there once it was told
        self.length: int | None = None
        self.status = 0

    def start(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        """What the app calls as ``start_response``."""
        if self._said is not None and exc_info is None:
            raise AssertionError("start_response() was called a second time without exc_info")
        if self._write is not None:
            return self._start_response(status, headers, exc_info)  # too late: the server raises it
        self._said = (status, headers)
        self.status = _number(status[:3]) or 0
        self.length = _announced(headers)
        return self._old_write

    @property
    def begun(self) -> bool:
        """See `Head`."""
        return self._write is not None

    def send(self) -> None:
        """See `Head`."""
        if self._write is None and self._said is not None:
            self._write = self._start_response(*self._said)

    def replace(self, answer: Answer) -> None:
        """See `Head`."""
        if self._write is None:
            self._said = (answer.line, [("Content-Type", "text/plain"), ("Content-Length", "0")])
            self.send()

    def _old_write(self, data: bytes) -> object:
        """The old way of sending; it begins the response as a first chunk does."""
        self.send()
        self._begin()
        assert self._write is not None
        return self._write(data)


def _goes_untouched(body: Iterable[bytes], environ: WSGIEnvironment) -> bool:
    """Whether servers look at its type: a list tells the Content-Length, a file wrapper asks for sendfile."""
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(body, list | tuple) or (isinstance(wrapper, type) and isinstance(body, wrapper))


def _whole(request: Request, body: Iterable[bytes], head: _DeferredHead) -> Iterable[bytes]:
    """A body that leaves as it is, once nothing of the request runs any more."""
    answer = None
    failed = True
    try:
        answer = request.end(None, status=head.status, begun=head.begun)
        failed = False
    finally:
        if failed or answer is not None:
            _close(body)
    if answer is not None:
        return _answered(answer, head)
    head.send()
    return body


def _answered(answer: Answer | None, head: _DeferredHead) -> list[bytes]:
    assert answer is not None, "an error was neither answered nor raised"
    head.replace(answer)
    return []


def _close(body: Iterable[bytes]) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()


def _announced(headers: list[tuple[str, str]]) -> int | None:
    return next((_number(value) for name, value in headers if name.lower() == "content-length"), None)


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
