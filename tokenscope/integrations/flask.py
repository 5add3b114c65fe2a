"""A Flask request owns its work: `TokenScope` for an app, `cancellable` for a view.

guarded:      each request, from before ``before_request`` to the last byte of a streamed response
interrupted:  as for WSGI; a view's errors, its children's and its deadline reach the app's error handlers
not:          ``send_file`` (left to the server); teardown functions; what WSGI cannot interrupt either
versions:     flask >=2.3
compat:       gunicorn-sync, gunicorn-gthread, waitress, werkzeug, wsgiref
"""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

from tokenscope._core.current import uninterruptible
from tokenscope._core.errors import DeadlineExceeded
from tokenscope._core.reasons import CancelKind
from tokenscope.integrations._answers import only_error
from tokenscope.integrations._body import Body
from tokenscope.integrations._missing import needs
from tokenscope.integrations._request import Part, Request, Swapped, current_request
from tokenscope.integrations._settings import Settings
from tokenscope.integrations.wsgi import RequestScopeMiddleware

with needs("flask", extra="flask"):
    import flask
    from werkzeug.exceptions import GatewayTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tokenscope.integrations._answers import Answer

__all__ = ["TokenScope", "cancellable"]

View = TypeVar("View", bound="Callable[..., Any]")

_PREFIX = "TOKENSCOPE_"
_TEARDOWN_TIMEOUT = 30.0  # seconds, as for the cleanups of a scope


class TokenScope:
    """The extension: ``TokenScope(app)``, or ``init_app(app)`` in an application factory.

    Every request gets a scope; inside of it `tokenscope.current_scope` is what a view spawns into, with
    ``flask.request`` and ``flask.g`` at hand in the children. Teardown functions are cleanups: no cancel of the
    request reaches them, and their waits end after 30 seconds with `DeadlineExceeded`.
    Configuration, read once by ``init_app``:

    - ``TOKENSCOPE_TIMEOUT``: seconds for a view and its streamed response. `DeadlineExceeded` then goes to
      the app's error handlers; without one the answer is a 504.
    - ``TOKENSCOPE_METHODS``, ``TOKENSCOPE_HALF_CLOSE``, ``TOKENSCOPE_MAX_THREADS``, ``TOKENSCOPE_GRACE``,
      ``TOKENSCOPE_ON_STRAGGLER``: as for `RequestScopeMiddleware`.

    Raises:
        ValueError, TypeError: An unknown ``TOKENSCOPE_`` key, or a bad value; an ``app`` that is none of Flask's.
        RuntimeError: The app was initialised before.
    """

    def __init__(self, app: flask.Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: flask.Flask) -> None:
        """Guard all requests of ``app``. Call it after the configuration was loaded. Raises as the class."""
        if not isinstance(app, flask.Flask):
            raise TypeError(f"app must be a flask.Flask, not {app!r}")
        if "tokenscope" in app.extensions:
            raise RuntimeError(f"TokenScope was set up for {app!r} before")
        settings = _settings_of(app)
        app.extensions["tokenscope"] = self
        # The deadline belongs to the scope around dispatch, where the app's error handlers can see it.
        options = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "timeout"}
        app.wsgi_app = RequestScopeMiddleware(app.wsgi_app, **options)  # type: ignore[method-assign]
        dispatch = functools.partial(_dispatch, app, app.dispatch_request, settings.timeout)
        app.dispatch_request = dispatch  # type: ignore[method-assign]
        _shelter_teardown(app)


@overload
def cancellable(view: View, /) -> View: ...
@overload
def cancellable(*, timeout: float | None = None) -> Callable[[View], View]: ...
def cancellable(view: Any = None, /, *, timeout: float | None = None) -> Any:
    """Let a hang-up cancel this view, whatever the method; with ``timeout``, so many seconds do, too.

    Below the route: ``@app.post("/chat")``, then ``@cancellable``. Shares the request's scope if `TokenScope`
    or `RequestScopeMiddleware` is there, and opens one if not. On cancel the client (if it is there) gets a
    bare status; a deadline is a `DeadlineExceeded` for the app's error handlers, or a 504.

    Args:
        view: The view.
        timeout: Seconds for the view and its streamed response; never later than the app's own timeout.

    Raises:
        ValueError, TypeError: A bad ``timeout``, or a view that is not callable.
    """
    settings = Settings(timeout=timeout)
    if view is None:
        return functools.partial(_decorate, timeout=settings.timeout)
    return _decorate(view, timeout=settings.timeout)


def _decorate(view: Any, *, timeout: float | None) -> Any:
    if not callable(view):
        raise TypeError(f"cancellable() decorates a view function, not {view!r}")

    @functools.wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        app = flask.current_app
        _shelter_teardown(app)
        call = functools.partial(app.ensure_sync(view), *args, **kwargs)
        request = current_request()
        if request is None:
            return _alone(app, call, timeout)
        request.hangup.arm()
        return call() if timeout is None else _in_part(app, request, call, timeout)

    return guarded


# --- inside of the middleware
# ---------------------------------------------------------------------------------------


def _dispatch(app: flask.Flask, dispatch: Callable[..., Any], timeout: float | None, *args: Any) -> Any:
    """``app.dispatch_request``, in a scope of its own."""
    request = current_request()
    if request is None:  # a request context that was pushed by hand
        return dispatch(*args)
    if flask.request.url_rule is not None:
        mounted = flask.request.environ.get("SCRIPT_NAME", "")
        request.endpoint = f"{flask.request.method} {mounted}{flask.request.url_rule}"
    return _in_part(app, request, functools.partial(dispatch, *args), timeout)


def _shelter_teardown(app: flask.Flask) -> None:
    """Have `_tear_down` run the teardown functions of ``app``. Idempotent, thread-safe."""
    mark = object()
    if app.extensions.setdefault("tokenscope.teardown", mark) is not mark:
        return
    for name in ("do_teardown_request", "do_teardown_appcontext"):
        setattr(app, name, functools.partial(_tear_down, getattr(app, name)))


def _tear_down(functions: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run the app's teardown functions out of reach of the cancel that they clean up after."""
    if current_request() is None:  # a context that was pushed by hand
        functions(*args, **kwargs)
        return
    with uninterruptible(_TEARDOWN_TIMEOUT):
        functions(*args, **kwargs)


def _in_part(app: flask.Flask, request: Request, call: Callable[[], Any], timeout: float | None) -> Any:
    part = request.part(flask.request.environ, timeout)
    try:
        response = _as_response(app, part.timed(call))
        if _streams(response):
            response.response = _PartBody(part, response.response)
            return response
    except BaseException as error:  # the scope decides what becomes of it
        return _concluded(app, request, part, part.leave(error))
    return _concluded(app, request, part, part.leave(None)) or response


def _concluded(app: flask.Flask, request: Request, part: Part, error: BaseException | None) -> flask.Response | None:
    if error is None:
        return _bare(app, part.answer())
    if isinstance(error, DeadlineExceeded) and request.owns(error.reason):
        return _too_late(app, error)
    raise only_error(error)


class _PartBody:
    """A streamed response that keeps the scope of its view open until it is closed."""

    def __init__(self, part: Part, inner: Iterable[Any]) -> None:
        self._part = part
        self._inner = inner
        self._chunks = iter(inner)
        self._drained = False
        self._error: BaseException | None = None

    def __iter__(self) -> _PartBody:
        return self

    def __next__(self) -> Any:
        try:
            return self._part.timed(next, self._chunks)
        except StopIteration:
            self._drained = True
            raise
        except BaseException as error:  # remembered for the scope, and on its way
            self._error = error
            raise

    def close(self) -> None:
        """Close what streams, then leave the scope."""
        if not self._part.open:
            return
        if not self._drained and self._error is None:
            self._part.scope.cancel("nobody reads the rest of the response", kind=CancelKind.SCOPE_ENDED)
        try:
            self._part.timed(_close, self._inner)
        except BaseException as error:  # judged with the rest; the first error is the one that counts
            self._error = self._error or error
        outcome = self._part.leave(self._error)
        if outcome is not None:
            raise only_error(outcome)


# --- without the middleware
# -----------------------------------------------------------------------------------------


def _alone(app: flask.Flask, call: Callable[[], Any], timeout: float | None) -> Any:
    """Serve a view that is all there is of tokenscope in its app."""
    environ = flask.request.environ
    settings = _settings_of(app)
    settings = settings if timeout is None else replace(settings, timeout=timeout)
    request = Request(environ, settings, context=Swapped())  # Flask's own variables stay where they are
    request.hangup.arm()
    return request.run(_serve_alone, app, request, environ, call)


def _serve_alone(app: flask.Flask, request: Request, environ: dict[str, Any], call: Callable[[], Any]) -> Any:
    try:
        request.watch(environ)
        request.scope.token.check()
        response = _as_response(app, request.timed(call))
        if _streams(response):
            response.response = Body(request, response.response, _SentHead(response))
            return response
    except BaseException as error:  # the scope decides what becomes of it
        return _ended_alone(app, request, error, 0)
    return _ended_alone(app, request, None, response.status_code) or response


def _ended_alone(app: flask.Flask, request: Request, error: BaseException | None, status: int) -> flask.Response | None:
    try:
        return _bare(app, request.end(error, status=status, keep_deadline=True))
    except DeadlineExceeded as late:
        if not request.owns(late.reason):
            raise
        return _told_late(app, request, late)
    except BaseExceptionGroup as group:
        raise only_error(group) from None


def _told_late(app: flask.Flask, request: Request, late: DeadlineExceeded) -> flask.Response:
    status = GatewayTimeout.code
    try:
        response = _too_late(app, late)
        status = response.status_code
    finally:
        request.tell(status)
    return response


class _SentHead:
    """The head of a response that Flask sends: too late to be replaced when its body begins."""

    def __init__(self, response: flask.Response) -> None:
        self._response = response

    @property
    def status(self) -> int:
        return self._response.status_code

    @property
    def length(self) -> int | None:
        return self._response.content_length

    @property
    def begun(self) -> bool:
        """Always."""
        return True

    def send(self) -> None:
        """Flask does."""

    def replace(self, answer: Answer) -> None:
        """Flask has told another status before it asked for the first chunk."""


# --- the steps
# ----------------------------------------------------------------------------------------------------


def _as_response(app: flask.Flask, value: Any) -> flask.Response:
    return app.make_response(value)


def _streams(response: flask.Response) -> bool:
    return response.is_streamed and not response.direct_passthrough


def _bare(app: flask.Flask, answer: Answer | None) -> flask.Response | None:
    return None if answer is None else app.response_class(status=answer.line)


def _too_late(app: flask.Flask, late: DeadlineExceeded) -> flask.Response:
    """What the app's error handlers make of it; without one, a 504 (for which the app may have one, too)."""
    try:
        return app.make_response(_handled(app, late))
    except DeadlineExceeded as error:
        if error is not late:
            raise
        raise GatewayTimeout from late


def _handled(app: flask.Flask, error: Exception) -> Any:
    try:
        raise error
    except type(error) as raised:  # Flask looks for the exception that is being handled
        return app.handle_user_exception(raised)


def _close(thing: Any) -> None:
    close = getattr(thing, "close", None)
    if close is not None:
        close()


def _settings_of(app: flask.Flask) -> Settings:
    options = {key[len(_PREFIX) :].lower(): value for key, value in _ours(app.config).items()}
    known = [f.name for f in fields(Settings)]
    for name in options:
        if name not in known:
            keys = ", ".join(f"{_PREFIX}{known_name.upper()}" for known_name in known)
            raise ValueError(f"unknown configuration key {_PREFIX}{name.upper()}; there are {keys}")
    try:
        return Settings(**options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"in the {_PREFIX} keys of the app's configuration: {error}") from error


def _ours(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key.startswith(_PREFIX)}
