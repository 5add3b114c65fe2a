"""The app of the demo: a chat view as it is usually written, and the same view with tokenscope.

Both read the model's stream with `requests` and pass it on to the browser; beside it a second thread asks the
model what the user might want to know next. Compare `plain_chat` with `scoped_chat`: the rest is the same.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import tokenscope
from tokenscope.cli.demo_desk import Desk, Order, client_of, event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    import requests

__all__ = ["make_app"]

STREAM = [("Content-Type", "text/event-stream")]


# --- the app as it is usually written ---


def plain_chat(desk: Desk, environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    """Stream the answer, then the suggestions."""
    order = Order.of(environ)
    suggestions: list[str] = []
    helper = threading.Thread(target=lambda: suggestions.append(desk.suggest(order)), daemon=True)
    helper.start()
    start_response("200 OK", STREAM)
    for word in desk.words("chat", order):
        yield event(word)
    helper.join()
    yield event(suggestions[0])
    yield event("[DONE]")


# --- the app with tokenscope ---


def scoped_chat(desk: Desk, environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    """Stream the answer, then the suggestions."""
    order = Order.of(environ)
    scope = tokenscope.current_scope()
    scope.defer(desk.tell, order, scope.token)
    helper = scope.spawn(desk.suggest, order)
    start_response("200 OK", STREAM)
    for word in desk.words("chat", order):
        yield event(word)
    yield event(helper.result())
    yield event("[DONE]")


# --- putting it together ---


class Recorded:
    """A response body that tells when it ended. Outside of everything else, so the same for both apps."""

    def __init__(self, doing: contextlib.AbstractContextManager[None], serve: Callable[[], Iterable[bytes]]) -> None:
        self._doing = contextlib.ExitStack()
        self._doing.enter_context(doing)
        try:
            self._body = serve()
        except BaseException:
            self._doing.close()
            raise

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        """Close the body, then record it."""
        with self._doing:
            getattr(self._body, "close", lambda: None)()


def make_app(model: str, *, scoped: bool) -> WSGIApplication:
    """The app: ``POST /chat/<client>``, and ``GET /desk`` for the record."""
    desk = Desk(make_session(scoped=scoped), model)
    chat = make_chat(desk, scoped=scoped)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/desk":
            body = desk.as_json()
            length = str(len(body))
            start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", length)])
            return [body]
        doing = desk.doing(f"{client_of(environ)}.chat")
        return Recorded(doing, lambda: chat(environ, start_response))

    return app


def make_session(*, scoped: bool) -> requests.Session:
    """The session for the calls of the model: here is the first change."""
    import requests  # noqa: PLC0415  # the command line must start without it

    from tokenscope.integrations.requests import Session  # noqa: PLC0415

    return Session() if scoped else requests.Session()


def make_chat(desk: Desk, *, scoped: bool) -> WSGIApplication:
    """The chat view as an app of its own: here is the second."""
    from tokenscope.integrations.wsgi import RequestScopeMiddleware, cancellable  # noqa: PLC0415

    if not scoped:
        return lambda environ, start_response: plain_chat(desk, environ, start_response)

    @cancellable
    def chat(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return scoped_chat(desk, environ, start_response)

    return RequestScopeMiddleware(chat)
