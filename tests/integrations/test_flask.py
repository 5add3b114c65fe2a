"""The Flask extension and its decorator, with the middleware and alone."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import flask
import pytest
from exchange import Exchange
from peers import Peer
from peers import scripts as play
from werkzeug.exceptions import GatewayTimeout

import tokenscope
from tokenscope import DeadlineExceeded, current_scope, current_token
from tokenscope._core import events
from tokenscope.integrations.flask import TokenScope, cancellable
from tokenscope.integrations.requests import Session
from tokenscope.integrations.wsgi import RequestScopeMiddleware, StreamCut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 10.0
OUTSIDE = current_token()

# How tokenscope comes to a view: all of it, the decorator in somebody's middleware, the decorator alone.
SETUPS = ("extension", "middleware", "alone")


@pytest.fixture(params=SETUPS)
def setup(request: pytest.FixtureRequest) -> str:
    """Each way in turn."""
    return request.param


def make(setup: str = "extension", **config: Any) -> flask.Flask:
    """An app without views."""
    app = flask.Flask(__name__)
    app.config.update(config)
    if setup == "extension":
        TokenScope(app)
    elif setup == "middleware":
        app.wsgi_app = RequestScopeMiddleware(app.wsgi_app)
    return app


def serving(
    setup: str,
    view: Callable[[], Any],
    decorate: Callable[..., Any] = cancellable,
    *,
    method: str = "POST",
    **config: Any,
) -> Exchange:
    """An exchange with one decorated view at /."""
    app = make(setup, **config)
    app.add_url_rule("/", "view", decorate(view), methods=[method])
    return Exchange(app, method)


def block() -> None:
    """Hang until cancelled."""
    tokenscope.sleep(PATIENCE)
    raise AssertionError("nobody cancelled this")


def hang_up_in_a_moment(ask: Exchange) -> threading.Event:
    """Have the client leave as soon as the returned event is set."""
    now = threading.Event()

    def leave() -> None:
        assert now.wait(PATIENCE)
        ask.hang_up()

    threading.Thread(target=leave).start()
    return now


# --- views --------------------------------------------------------------------------------------------------


def test_a_hang_up_stops_a_cancellable_view(setup: str) -> None:
    """A blocked POST view is woken, torn down, and answered with a bare 499."""
    torn_down = []
    with serving(setup, lambda: (now.set(), block())) as ask:
        ask.app.teardown_request(torn_down.append)
        now = hang_up_in_a_moment(ask)
        assert ask.serve() == b""
        assert ask.status == "499 Client Closed Request"
    assert len(torn_down) == 1
    assert current_token() is OUTSIDE


def test_without_the_decorator_only_safe_methods_are_stopped() -> None:
    """The extension arms a GET; a POST runs on."""

    def view() -> str:
        ask.hang_up()
        return str(current_token().wait(0.05))

    for method, expected in (("GET", ""), ("POST", "False")):

        def patient() -> str:
            answer = view()
            tokenscope.check()
            return answer

        with serving("extension", patient, lambda f: f, method=method) as ask:
            assert ask.serve().decode() == expected


def test_everybody_means_the_same_scope(setup: str) -> None:
    """current_scope() in the view and in its children is the scope in the environ."""
    seen = []

    def view() -> str:
        seen.extend([current_scope(), flask.request.environ["tokenscope.scope"]])
        seen.append(current_scope().spawn(current_scope).result())
        return "x"

    with serving(setup, view) as ask:
        assert ask.serve() == b"x"
    assert seen[0] is seen[1] is seen[2]


def test_the_decorator_opens_no_scope_of_its_own_beside_a_middleware() -> None:
    """What a before_request function finds in somebody's middleware is what the decorated view finds."""
    scopes = []
    with serving("middleware", lambda: (scopes.append(current_scope()), "x")[1]) as ask:
        ask.app.before_request(lambda: scopes.append(current_scope()))
        ask.serve()
    assert scopes[0] is scopes[1]


def test_request_and_g_work_in_children(setup: str) -> None:
    """A spawned child reads flask.request and flask.g as the view does."""

    def view() -> str:
        flask.g.user = "ada"
        child = current_scope().spawn(lambda: f"{flask.g.user} at {flask.request.path}")
        return child.result()

    with serving(setup, view) as ask:
        assert ask.serve() == b"ada at /"


def test_children_are_joined_before_the_answer(setup: str) -> None:
    """A view that returns while its children run is answered when they are done."""
    done = []

    def view() -> str:
        current_scope().spawn(lambda: (threading.Event().wait(0.03), done.append(1)))
        return "x"

    with serving(setup, view) as ask:
        assert ask.serve() == b"x"
    assert done == [1]


def test_http_errors_and_the_apps_own_are_untouched(setup: str) -> None:
    """abort(404) is a 404, and a view's own exception reaches its handler as the same object."""
    error = ValueError("mine")

    def raising() -> None:
        raise error

    with serving(setup, lambda: flask.abort(404)) as ask:
        ask.serve()
        assert ask.status == "404 NOT FOUND"
    with serving(setup, raising) as ask:
        ask.app.register_error_handler(ValueError, lambda e: ("same" if e is error else "other", 418))
        assert ask.serve() == b"same"


@pytest.mark.parametrize("setup", ["extension", "alone"])
@pytest.mark.parametrize("waits", [True, False])
def test_a_childs_error_reaches_the_apps_error_handlers(setup: str, waits: bool) -> None:
    """A group of one error is handled as that error, whether the view waited for the child or not."""
    error = ValueError("in a child")

    def fail() -> None:
        raise error

    def view() -> str:
        current_scope().spawn(fail)
        if waits:
            block()
        return "looks fine"

    with serving(setup, view) as ask:
        ask.app.register_error_handler(ValueError, lambda e: (f"handled {e is error}", 418))
        assert ask.serve() == b"handled True"
        assert ask.status == "418 I'M A TEAPOT"


@pytest.mark.parametrize("setup", ["extension", "alone"])
def test_a_group_of_two_reaches_them_as_a_group(setup: str) -> None:
    """Two failures are not narrowed down to one."""
    both = threading.Barrier(2)

    def fail() -> None:
        both.wait(PATIENCE)
        raise ValueError

    def view() -> None:
        current_scope().spawn(fail)
        current_scope().spawn(fail)
        current_scope().join()

    with serving(setup, view) as ask:
        ask.app.register_error_handler(ExceptionGroup, lambda e: (str(len(e.exceptions)), 500))
        assert ask.serve() == b"2"


@pytest.mark.parametrize("setup", ["extension", "alone"])
def test_a_stopped_request_is_answered_by_the_app(setup: str) -> None:
    """Somebody presses Stop: the view's own scope absorbs it, and the bare 499 passes after_request."""

    def view() -> None:
        flask.request.environ["tokenscope.scope"].cancel(kind="stopped")
        block()

    def mark(response: flask.Response) -> flask.Response:
        response.headers["X-After"] = "yes"
        return response

    with serving(setup, view) as ask:
        ask.app.after_request(mark)
        assert ask.serve() == b""
        assert ask.status == "499 Client Closed Request"
        assert ask.headers["X-After"] == "yes"


def test_a_foreign_cancel_never_reaches_the_server(setup: str) -> None:
    """A Cancelled of somebody else's token is a 500 and an event, in every setup."""
    told: list[Any] = []
    unsubscribe = events.subscribe(told.append, events.ForeignCancel)

    def view() -> None:
        token = tokenscope.CancellationToken(name="elsewhere")
        token.cancel()
        token.check()

    try:
        with serving(setup, view) as ask:
            assert ask.serve() == b""
            assert ask.status.lower() == "500 internal server error"
    finally:
        unsubscribe()
    assert [event.origin for event in told] == ["elsewhere"]


def test_events_name_the_route_not_the_path() -> None:
    """A log line per route can be counted; one per path cannot."""
    told: list[Any] = []
    app = make()

    @app.get("/users/<int:user>")
    def view(user: int) -> None:
        current_scope().cancel()
        block()

    unsubscribe = events.subscribe(told.append, events.RequestCancelled)
    try:
        with Exchange(app, path="/users/7") as ask:
            ask.serve()
    finally:
        unsubscribe()
    assert [(event.endpoint, event.status) for event in told] == [("GET /users/<int:user>", 499)]


def test_events_name_where_the_app_is_mounted() -> None:
    """Two apps in one process may have the same route; a complaint about one does not silence the other."""
    told: list[Any] = []
    unsubscribe = events.subscribe(told.append, events.RequestCancelled)
    try:
        with serving("extension", lambda: (current_scope().cancel(), block())) as ask:
            ask.environ["SCRIPT_NAME"] = "/shop"
            ask.serve()
    finally:
        unsubscribe()
    assert [event.endpoint for event in told] == ["POST /shop/"]


@pytest.mark.parametrize("waits_for", ["child", "cleanup"])
@pytest.mark.parametrize("streams", [False, True])
def test_waiting_for_children_and_cleanups_is_no_work_of_the_views(setup: str, waits_for: str, streams: bool) -> None:
    """A view that stops at once has done nothing after the cancel, however long its scope takes to end."""

    def linger() -> None:
        threading.Event().wait(0.2)

    asks: list[Exchange] = []

    def view() -> Any:
        asks.append(flask.request.environ["exchange"])
        if waits_for == "child":
            current_scope().spawn(lambda: (started.set(), linger()))
            assert started.wait(PATIENCE)
        else:
            tokenscope.defer(linger)
        return chunks() if streams else stop()

    def chunks() -> Iterator[str]:
        yield "first"
        stop()

    def stop() -> None:
        asks[0].hang_up()
        block()

    started = threading.Event()
    (report,) = (event.report for event in cancelled_by(setup, view))
    assert report.stop_duration > 0.15
    lingering = 1 if waits_for == "child" else 0  # the child's own work counts, and once
    assert report.post_cancel_work < 0.1 + 0.2 * lingering


def test_what_a_view_does_after_its_own_deadline_is_work_after_the_cancel(setup: str) -> None:
    """The deadline belongs to a scope inside of the request's; late work is counted against that."""

    def view() -> None:
        assert current_token().wait(PATIENCE)
        threading.Event().wait(0.1)
        tokenscope.check()

    (event,) = cancelled_by(setup, view, cancellable(timeout=0.02))
    assert 0.08 < event.report.post_cancel_work < 0.18
    assert event.status == 504


def cancelled_by(setup: str, view: Callable[[], Any], decorate: Callable[..., Any] = cancellable) -> list[Any]:
    """What is told of one request."""
    told: list[Any] = []
    unsubscribe = events.subscribe(told.append, events.RequestCancelled)
    try:
        with serving(setup, view, decorate) as ask:
            ask.environ["exchange"] = ask
            ask.serve()
    finally:
        unsubscribe()
    return told


# --- deadlines ----------------------------------------------------------------------------------------------


def deadline_cases() -> list[Any]:
    """By configuration, by decorator, by both (the shorter one wins)."""
    timed = cancellable(timeout=0.02)
    return [
        pytest.param("extension", cancellable, {"TOKENSCOPE_TIMEOUT": 0.02}, id="configured"),
        pytest.param("extension", timed, {"TOKENSCOPE_TIMEOUT": 60}, id="both"),
        pytest.param("extension", timed, {}, id="extension"),
        pytest.param("middleware", timed, {}, id="middleware"),
        pytest.param("alone", timed, {}, id="alone"),
        pytest.param("alone", cancellable, {"TOKENSCOPE_TIMEOUT": 0.02}, id="alone-configured"),
    ]


@pytest.mark.parametrize(("setup", "decorate", "config"), deadline_cases())
@pytest.mark.parametrize("handled", [None, DeadlineExceeded, TimeoutError, 504])
def test_a_deadline_reaches_the_apps_error_handlers(
    setup: str, decorate: Any, config: dict[str, Any], handled: Any
) -> None:
    """DeadlineExceeded is handled like any error; without a handler it is a 504, which may have one too."""
    caught = []

    def handle(error: Exception) -> tuple[str, int]:
        caught.append(error)
        return "too slow", 503

    with serving(setup, block, decorate, **config) as ask:
        if handled is not None:
            ask.app.register_error_handler(handled, handle)
        body = ask.serve()
    if handled is None:
        assert ask.status == "504 GATEWAY TIMEOUT"
    else:
        assert (ask.status, body) == ("503 SERVICE UNAVAILABLE", b"too slow")
        assert isinstance(caught[0], GatewayTimeout if handled == 504 else DeadlineExceeded)


def test_a_deadline_stops_the_views_children(setup: str) -> None:
    """The children of a view with a timeout are under it, and joined before its error is handled."""
    stopped = []

    started = threading.Event()

    def child() -> None:
        started.set()
        try:
            block()
        finally:
            stopped.append(current_token().reason.kind)

    def view() -> None:
        current_scope().spawn(child)
        assert started.wait(PATIENCE)
        current_scope().join()

    with serving(setup, view, cancellable(timeout=0.05)) as ask:
        ask.app.register_error_handler(DeadlineExceeded, lambda _: (" ".join(stopped), 504))
        assert ask.serve() == b"deadline"


def test_an_error_of_a_deadline_handler_is_its_own(setup: str) -> None:
    """A handler that raises a DeadlineExceeded of another deadline is not answered for."""

    def handle(_: Exception) -> None:
        raise DeadlineExceeded("another one")

    with serving(setup, block, cancellable(timeout=0.02)) as ask:
        ask.app.register_error_handler(DeadlineExceeded, handle)
        ask.serve()
        assert ask.status == "500 INTERNAL SERVER ERROR"


def test_another_deadline_inside_the_view_is_the_views_own_error(setup: str) -> None:
    """A DeadlineExceeded that the view lets out of a fail_after is not turned into a 504."""

    def view() -> None:
        with tokenscope.fail_after(0.01):
            block()

    with serving(setup, view) as ask:
        ask.serve()
        assert ask.status == "500 INTERNAL SERVER ERROR"


# --- streams ------------------------------------------------------------------------------------------------


def test_a_streaming_view_is_watched_to_its_last_byte(setup: str) -> None:
    """The client leaves between two chunks: generator and children are stopped, the body ends quietly."""
    ended = []

    def view() -> flask.Response:
        child = current_scope().spawn(block)

        def chunks() -> Iterator[str]:
            try:
                yield f"hello {flask.request.path} "
                assert current_scope().token.reason is None
                now.set()
                block()
            finally:
                ended.append(child.done() or current_token().cancelled)

        return flask.Response(flask.stream_with_context(chunks()))

    with serving(setup, view) as ask:
        now = hang_up_in_a_moment(ask)
        assert ask.serve() == b"hello / "
    assert ended == [True]
    assert current_token() is OUTSIDE


@pytest.mark.parametrize("form", ["generator", "tuple", "response"])
def test_any_form_of_stream_keeps_its_scope_open(setup: str, form: str) -> None:
    """A view may return a generator, a tuple with one, or a response: its children live to the last byte."""
    scopes = []

    def view() -> Any:
        scopes.append(current_scope())
        hello = current_scope().spawn(lambda: "hello")
        chunks = (word for word in [hello.result(), " ", "world"])
        if form == "tuple":
            return chunks, 201
        return flask.Response(chunks) if form == "response" else chunks

    with serving(setup, view) as ask:
        ask.call()
        assert scopes[0].report.outcome == "running"
        assert ask.rest() == b"hello world"
    assert scopes[0].report.outcome == "succeeded"
    assert ask.status.startswith("201" if form == "tuple" else "200")


def test_a_deadline_holds_for_the_stream(setup: str) -> None:
    """A begun stream is cut at the view's deadline, and does not look whole; nothing of its scope is left open."""
    scopes = []

    def view() -> Iterator[str]:
        scopes.append(current_scope())
        current_scope().spawn(block)
        return (block() if index else "first" for index in range(2))

    with serving(setup, view, cancellable(timeout=0.05)) as ask, pytest.raises(StreamCut, match="deadline"):
        ask.serve()
    assert ask.status.startswith("200")  # what was sent
    assert scopes[0].report.outcome == "deadline"


def test_a_stream_cut_before_its_first_byte_is_not_for_the_error_handlers(setup: str) -> None:
    """They have run by then: a bare 504; the decorator alone cannot change the status, so the server is told."""

    def view() -> Iterator[str]:
        return (str(block()) for _ in range(1))

    with serving(setup, view, cancellable(timeout=0.02)) as ask:
        ask.app.register_error_handler(DeadlineExceeded, lambda _: pytest.fail("was asked"))
        with pytest.raises(StreamCut) if setup == "alone" else contextlib.nullcontext():
            assert ask.serve() == b""
        assert ask.status == ("200 OK" if setup == "alone" else "504 Gateway Timeout")


def test_a_deadline_is_logged_with_the_status_of_its_handler(setup: str) -> None:
    """The log has what was sent, whoever decided it."""
    told: list[Any] = []
    unsubscribe = events.subscribe(told.append, events.RequestCancelled)
    try:
        with serving(setup, block, cancellable(timeout=0.02)) as ask:
            ask.app.register_error_handler(DeadlineExceeded, lambda _: ("late", 503))
            ask.serve()
    finally:
        unsubscribe()
    assert [event.status for event in told] == [503]


def test_an_error_in_a_stream_reaches_the_server_unchanged(setup: str) -> None:
    """The generator's own exception goes on, after its children were stopped."""
    scopes = []

    def chunks() -> Iterator[str]:
        yield "first"
        raise ValueError("in the stream")

    def view() -> Iterator[str]:
        scopes.append(current_scope())
        current_scope().spawn(block)
        return chunks()

    with serving(setup, view) as ask, pytest.raises(ValueError, match="in the stream"):
        ask.serve()
    assert scopes[0].report.outcome == "failed"


@pytest.mark.parametrize("setup", ["extension", "alone"])
def test_a_childs_error_at_the_end_of_a_stream_is_told_at_close(setup: str) -> None:
    """Too late for an error handler: the server gets it from close()."""
    go = threading.Event()

    def fail() -> None:
        assert go.wait(PATIENCE)
        raise ValueError("in a child")

    def view() -> Iterator[str]:
        current_scope().spawn(fail)
        return iter(["all"])

    with serving(setup, view) as ask:
        ask.call()
        assert list(ask.body) == [b"all"]
        go.set()
        with pytest.raises((ValueError, ExceptionGroup)):
            ask.close()


@pytest.mark.parametrize("begun", [True, False])
def test_a_childs_error_in_the_middle_of_a_stream_reaches_the_server(setup: str, begun: bool) -> None:
    """The generator is stopped by a cancel, and what the server gets is the failure: no stream looks whole."""

    def fail() -> None:
        raise ValueError("in a child")

    def chunks() -> Iterator[str]:
        if begun:
            yield "a"
        current_scope().spawn(fail)
        block()
        yield "b"

    with serving(setup, chunks) as ask:
        ask.call()
        with pytest.raises((ValueError, ExceptionGroup)) as caught:
            b"".join(ask.body)
    assert "in a child" in repr(caught.value)


def test_a_stream_nobody_reads_ends_with_its_children(setup: str) -> None:
    """HEAD, or a server that gives up: close() before the first chunk stops what the stream was made of."""
    scopes = []

    def view() -> Iterator[str]:
        scopes.append(current_scope())
        current_scope().spawn(block)
        return iter(["never"])

    with serving(setup, view, method="GET") as ask:
        ask.environ["REQUEST_METHOD"] = "HEAD"
        ask.serve()
    assert scopes[0].report.outcome in {"cancelled", "succeeded"}
    assert scopes[0].report.tasks.spawned == 1


@pytest.mark.parametrize("setup", ["extension"])
def test_a_stream_that_after_request_throws_away_ends_too(setup: str) -> None:
    """A response that never reaches the server does not keep its scope open for ever."""
    scopes = []

    def view() -> Iterator[str]:
        scopes.append(current_scope())
        current_scope().spawn(block)
        return iter(["never"])

    with serving(setup, view) as ask:
        ask.app.after_request(lambda _: flask.Response("another"))
        assert ask.serve() == b"another"
    assert scopes[0].report.outcome == "cancelled"


def test_a_stream_that_after_request_closes_ends_its_children() -> None:
    """Closed before its end, by the app itself: nobody reads the rest, so what makes it is not waited for."""
    scopes = []

    def view() -> Iterator[str]:
        scopes.append(current_scope())
        current_scope().spawn(block)
        return iter(["never"])

    def replace(response: flask.Response) -> flask.Response:
        response.response.close()  # type: ignore[union-attr]
        return flask.Response("another")

    with serving("extension", view) as ask:
        ask.app.after_request(replace)
        assert ask.serve() == b"another"
    assert scopes[0].report.reason.kind == "scope_ended"
    assert scopes[0].report.tasks.finished == 0


def test_a_stream_that_after_request_reads_is_whole(setup: str) -> None:
    """An after_request that turns the stream into data gets all of it, and closes it."""
    scopes = []

    def view() -> Iterator[str]:
        scopes.append(current_scope())
        return (word for word in ["a", "b"])

    def read(response: flask.Response) -> flask.Response:
        response.set_data(response.get_data().upper())
        return response

    with serving(setup, view) as ask:
        ask.app.after_request(read)
        assert ask.serve() == b"AB"
    assert scopes[0].report.outcome == "succeeded"


def test_send_file_is_left_to_the_server(setup: str) -> None:
    """A file response is not wrapped; its scope ends with the view."""
    scopes = []

    def view() -> flask.Response:
        scopes.append(current_scope())
        return flask.send_file(io.BytesIO(b"content"), mimetype="text/plain")

    with serving(setup, view) as ask:
        assert ask.serve() == b"content"
    assert scopes[0].report.outcome == "succeeded"


# --- setting up ---------------------------------------------------------------------------------------------


def test_init_app_later_and_only_once() -> None:
    """An application factory calls init_app; a second time is an error, not a second watch."""
    extension, app = TokenScope(), flask.Flask(__name__)
    extension.init_app(app)
    assert app.extensions["tokenscope"] is extension
    with pytest.raises(RuntimeError, match="before"):
        TokenScope(app)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"TOKENSCOPE_TIMEOUT": -1}, ValueError, "TOKENSCOPE_ keys.*timeout must be 0 or more"),
        ({"TOKENSCOPE_TIMEOUT": "5"}, TypeError, "timeout must be a number"),
        ({"TOKENSCOPE_METHODS": "unsafe"}, ValueError, "methods must be 'safe' or 'all'"),
        ({"TOKENSCOPE_HALF_CLOSE": None}, ValueError, "half_close must be"),
        (
            {"TOKENSCOPE_TIME_OUT": 5},
            ValueError,
            "unknown configuration key TOKENSCOPE_TIME_OUT; there are .*TIMEOUT",
        ),
    ],
)
def test_configuration_is_checked_when_the_app_is_set_up(
    config: dict[str, Any], error: type[Exception], words: str
) -> None:
    """A bad value and a misspelt key are told at once, with what was meant."""
    with pytest.raises(error, match=words):
        make(**config)


def test_an_app_that_is_none_of_flasks_is_refused() -> None:
    """A WSGI app of another kind (or a wrapper around Flask's) is named, with what is wanted."""
    with pytest.raises(TypeError, match=r"app must be a flask\.Flask, not <function"):
        TokenScope(lambda environ, start_response: [])  # type: ignore[arg-type]


def test_configuration_reaches_the_requests() -> None:
    """TOKENSCOPE_METHODS="all" arms a POST without a decorator."""
    with serving("extension", lambda: (now.set(), block()), lambda f: f, TOKENSCOPE_METHODS="all") as ask:
        now = hang_up_in_a_moment(ask)
        ask.serve()
        assert ask.status.startswith("499")


def test_the_decorator_refuses_bad_arguments() -> None:
    """A bad timeout, and something that is no view, are told where they stand."""
    with pytest.raises(ValueError, match="timeout must be"):
        cancellable(timeout=-1)
    with pytest.raises(ValueError, match="more than 0"):
        cancellable(timeout=0)
    with pytest.raises(TypeError, match="view function, not 5"):
        cancellable(5)  # type: ignore[type-var]


def test_the_decorator_keeps_the_views_name() -> None:
    """Flask names endpoints after the function."""

    def chat() -> None:
        """Docs."""

    assert cancellable(chat).__name__ == cancellable(timeout=5)(chat).__name__ == "chat"


def test_a_hand_pushed_request_context_dispatches_as_ever() -> None:
    """dispatch_request outside of a served request (a test of somebody's) is Flask's own."""
    app = make()
    app.add_url_rule("/", "view", lambda: "x")
    with app.test_request_context("/"):
        assert app.dispatch_request() == "x"


def test_the_test_client_works() -> None:
    """Without a socket there is a scope all the same."""
    app = make()
    app.add_url_rule("/", "view", lambda: current_scope().name)
    assert app.test_client().get("/").text == "GET /"


def test_without_flask_the_import_says_what_to_install() -> None:
    """A missing library is one clear error that names the extra."""
    program = "import sys; sys.modules['flask'] = None\nimport tokenscope.integrations.flask"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "pip install 'tokenscope-threads[flask]'" in done.stderr


@pytest.mark.parametrize("streams", [False, True], ids=["view", "stream"])
@pytest.mark.parametrize("where", ["teardown_request", "teardown_appcontext"])
def test_teardown_functions_are_out_of_reach_of_the_hang_up(setup: str, streams: bool, where: str) -> None:
    """They look at their token and call another service, although their request was cancelled."""
    begun: list[object] = []  # once more at the end of a stream: Flask tears down each time
    told: list[object] = []

    def hang() -> Iterator[bytes]:
        now.set()
        block()
        yield b""

    def view() -> Any:
        return flask.Response(flask.stream_with_context(hang())) if streams else list(hang())

    def tear_down(error: BaseException | None) -> None:
        begun.append(error)
        tokenscope.check()
        told.append(session.get(peer.url()).text)

    with Peer(play.answers(b"cleaned")) as peer, Session() as session, serving(setup, view) as ask:
        session.trust_env = False
        getattr(ask.app, where)(tear_down)
        now = hang_up_in_a_moment(ask)
        ask.serve()
    assert begun
    assert told == ["cleaned"] * len(begun)
