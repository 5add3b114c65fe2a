"""The middleware, step by step; with real servers: `test_wsgi_servers.py`."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import pickle
import threading
import time
import traceback
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest
from exchange import Exchange

import tokenscope
from tokenscope import CancellationToken, Cancelled, current_scope, current_token
from tokenscope._core import events
from tokenscope.integrations import _hangup
from tokenscope.integrations.wsgi import RequestScopeMiddleware, StreamCut, cancellable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 10.0
OUTSIDE = current_token()
TEXT = [("Content-Type", "text/plain")]


@pytest.fixture(autouse=True)
def _told_nothing_yet() -> Iterator[None]:
    """What is told once per process is told once per test."""
    for told in (_hangup._told_endpoints, _hangup._told_servers):
        told.clear()
    yield
    for told in (_hangup._told_endpoints, _hangup._told_servers):
        told.clear()


@contextlib.contextmanager
def heard(kind: type[events.Event]) -> Iterator[list[Any]]:
    """The events of a kind that happen meanwhile."""
    seen: list[Any] = []
    unsubscribe = events.subscribe(seen.append, kind)
    try:
        yield seen
    finally:
        unsubscribe()


def app_of(view: Callable[[], Any], **options: Any) -> RequestScopeMiddleware:
    """A guarded app of one view, whose result is the body."""

    def app(_environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("X-App", "yes")])
        return view()

    return RequestScopeMiddleware(app, **options)


def block() -> None:
    """Hang until cancelled."""
    tokenscope.sleep(PATIENCE)
    raise AssertionError("nobody cancelled this")


def stopped(report: tokenscope.ScopeReport) -> int:
    """How many tasks were stopped, started or not."""
    return report.tasks.cancelled + report.tasks.never_started


def hang_up_in_a_moment(ask: Exchange) -> threading.Event:
    """Have the client leave as soon as the returned event is set."""
    now = threading.Event()

    def leave() -> None:
        assert now.wait(PATIENCE)
        ask.hang_up()

    threading.Thread(target=leave).start()
    return now


# --- the scope ----------------------------------------------------------------------------------------------


def test_the_scope_is_in_the_environ_and_current() -> None:
    """The app finds one scope in both places, and children spawned in it run under it."""
    seen = {}

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen["environ"], seen["current"] = environ["tokenscope.scope"], current_scope()
        seen["child"] = current_scope().spawn(current_scope).result()
        start_response("200 OK", TEXT)
        return [b"x"]

    with Exchange(RequestScopeMiddleware(app), path="/a") as ask:
        assert ask.serve() == b"x"
    assert seen["environ"] is seen["current"] is seen["child"]
    assert seen["current"].name == "GET /a"
    assert seen["current"].report.outcome == "succeeded"


def test_nothing_of_a_request_is_seen_by_the_next_on_that_thread() -> None:
    """After each step of a request the thread is as it was, also while the stream is open."""

    def view() -> Iterator[bytes]:
        assert current_token() is not OUTSIDE
        yield b"1"
        yield b"2"

    with Exchange(app_of(view)) as ask:
        ask.call()
        assert current_token() is OUTSIDE
        assert next(iter(ask.body)) == b"1"
        assert current_token() is OUTSIDE
        ask.close()
        assert current_token() is OUTSIDE


def test_each_step_of_a_stream_sees_its_own_token_whatever_thread_takes_it() -> None:
    """The steps of two streams, interleaved and on other threads, each see their own request's scope."""
    seen: dict[str, list[Any]] = {"/a": [], "/b": []}

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        for _ in range(3):
            seen[environ["PATH_INFO"]].append(current_scope())
            yield b"."

    guarded = RequestScopeMiddleware(app)
    with Exchange(guarded, path="/a") as one, Exchange(guarded, path="/b") as two:
        one.call()
        two.call()
        for _ in range(3):
            for ask in (one, two):
                thread = threading.Thread(target=lambda ask=ask: next(iter(ask.body)))
                thread.start()
                thread.join(PATIENCE)
    for path, scopes in seen.items():
        assert len(scopes) == 3
        assert {scope.name for scope in scopes} == {f"GET {path}"}


def test_the_steps_of_a_request_share_one_context() -> None:
    """A context variable that the app sets is there in the next step, on any thread, and nowhere else."""
    mine: ContextVar[str] = ContextVar("mine", default="unset")
    seen = []

    def view() -> Iterator[bytes]:
        mine.set("set")
        for _ in range(2):
            seen.append(mine.get())
            yield b"."

    with Exchange(app_of(view)) as ask:
        ask.call()
        next(iter(ask.body))
        thread = threading.Thread(target=lambda: next(iter(ask.body)))
        thread.start()
        thread.join(PATIENCE)
    assert seen == ["set", "set"]
    assert mine.get() == "unset"


def test_two_middlewares_share_one_scope() -> None:
    """Guarding twice opens one scope, watches once and answers once."""
    scopes = []

    def view() -> list[bytes]:
        scopes.append(current_scope())
        return [b"x"]

    inner = app_of(view)

    def between(environ: dict[str, Any], start_response: Any) -> Any:
        scopes.append(environ["tokenscope.scope"])
        return inner(environ, start_response)

    with Exchange(RequestScopeMiddleware(between)) as ask:
        assert ask.serve() == b"x"
    assert scopes[0] is scopes[1]


def test_an_inner_middleware_arms_the_methods_it_names() -> None:
    """methods="all" of an app counts also where somebody guarded everything around it with the defaults."""
    inner = app_of(lambda: (now.set(), block()), methods="all")
    with Exchange(RequestScopeMiddleware(inner), "POST") as ask:
        now = hang_up_in_a_moment(ask)
        assert ask.serve() == b""
        assert ask.status.startswith("499")


def test_a_request_made_up_inside_of_a_view_arms_nothing() -> None:
    """A POST view that calls another guarded app with a GET of its own is not armed by that."""
    inner = app_of(lambda: [b"x"])

    def view() -> list[bytes]:
        body = inner({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda *_: None)
        ask.hang_up()
        assert not current_token().wait(0.05)
        return list(body)

    with Exchange(app_of(view), "POST") as ask:
        assert ask.serve() == b"x"


def test_it_speaks_wsgi_by_the_book() -> None:
    """The validator of wsgiref, on both sides of the middleware, has nothing to say."""

    def app(_environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", TEXT)
        return [b"a", b"b"]

    guarded = validator(RequestScopeMiddleware(validator(app)))
    environ = {"QUERY_STRING": "", "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO()}
    with Exchange(guarded, **environ) as ask:
        ask.call()
        assert b"".join(ask.body) == b"ab"


# --- hang-ups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_a_hang_up_cancels_a_safe_method(method: str) -> None:
    """The blocked view is woken, and the answer that nobody reads is a bare 499."""
    with heard(events.RequestCancelled) as cancelled:
        ask = Exchange(app_of(lambda: (now.set(), block())), method)
        with ask:
            now = hang_up_in_a_moment(ask)
            assert ask.serve() == b""
        assert ask.status == "499 Client Closed Request"
        assert ask.headers["Content-Length"] == "0"
        assert "X-App" not in ask.headers
    assert [(event.status, event.report.reason.kind) for event in cancelled] == [(499, "client_disconnected")]


def test_a_hang_up_does_not_cancel_other_methods_and_says_once_what_to_do() -> None:
    """A POST runs on; that nobody acted on the hang-up is told once for the endpoint, with the remedy."""

    def view() -> list[bytes]:
        ask.hang_up()
        assert not current_token().wait(0.05)
        return [b"done"]

    with heard(events.HangupIgnored) as ignored:
        for _ in range(2):
            with Exchange(app_of(view), "POST", "/pay") as ask:
                assert ask.serve() == b"done"
                assert ask.status == "200 OK"
    assert [event.endpoint for event in ignored] == ["POST /pay"]
    assert "@cancellable" in ignored[0].remedy


def test_after_very_many_endpoints_one_last_line_says_that_no_more_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Paths that never repeat do not fill the memory or the log, nor do they silence what else is told once."""
    monkeypatch.setattr(_hangup, "_MOST_TOLD", 2)

    def view() -> list[bytes]:
        ask.hang_up()
        assert not current_token().wait(0.05)
        return [b"done"]

    with heard(events.HangupIgnored) as ignored, heard(events.WatchUnsupported) as unwatched:
        for number in range(4):
            with Exchange(app_of(view), "POST", f"/{number}") as ask:
                ask.serve()
        with Exchange(app_of(lambda: [b"x"]), **{"tokenscope.connection_fd": None}) as ask:
            ask.serve()
    assert [event.endpoint for event in ignored] == ["POST /0", "POST /1", "any endpoint after these 2"]
    assert len(unwatched) == 1


def test_a_view_opts_in_whatever_its_method() -> None:
    """@cancellable arms the request, even if the client left before the view began."""

    @cancellable
    def view() -> None:
        now.set()
        block()

    def late() -> None:
        ask.hang_up()
        assert not current_token().wait(0.05)
        cancellable(block)()

    for body in (view, late):
        with Exchange(app_of(body), "POST") as ask:
            now = hang_up_in_a_moment(ask)
            assert ask.serve() == b""
            assert ask.status.startswith("499")
            now.set()


def test_an_app_opts_in_for_all_methods() -> None:
    """methods="all" arms a DELETE."""
    with Exchange(app_of(lambda: (now.set(), block()), methods="all"), "DELETE") as ask:
        now = hang_up_in_a_moment(ask)
        ask.serve()
        assert ask.status.startswith("499")


def test_cancellable_without_the_middleware_says_what_is_missing() -> None:
    """A decorator that cannot do anything is an error that names the middleware."""
    with pytest.raises(LookupError, match="RequestScopeMiddleware"):
        cancellable(lambda: None)()
    with pytest.raises(TypeError, match="callable"):
        cancellable(7)  # type: ignore[type-var]


def test_a_client_that_left_while_its_request_was_queued_is_not_served() -> None:
    """The app is not even called."""
    with Exchange(app_of(lambda: pytest.fail("was called"))) as ask:
        ask.hang_up()
        assert ask.serve() == b""
        assert ask.status.startswith("499")


def test_a_half_close_can_be_ignored() -> None:
    """half_close="ignore" reaches the watch: a client that stopped sending gets its answer."""
    with Exchange(app_of(lambda: [b"x"], half_close="ignore")) as ask:
        ask.client.shutdown(1)
        assert ask.serve() == b"x"


def test_a_server_that_hides_its_socket_is_told_once_and_served_all_the_same() -> None:
    """Without a socket the scope works, and one event says that hang-ups cannot be seen."""
    with heard(events.WatchUnsupported) as told:
        for _ in range(2):
            environ = {"tokenscope.connection_fd": None, "SERVER_SOFTWARE": "mystery/1.0"}
            with Exchange(app_of(lambda: [current_scope().name.encode()]), **environ) as ask:
                assert ask.serve() == b"GET /"
    assert [(event.server, event.why) for event in told] == [
        ("mystery/1.0", "this server does not show the client's socket")
    ]


def test_a_wrong_explicit_socket_is_told_and_does_not_break_the_request() -> None:
    """A descriptor that is no socket is named in the event; the request is served."""
    with heard(events.WatchUnsupported) as told:
        with Exchange(app_of(lambda: [b"x"]), **{"tokenscope.connection_fd": 0}) as ask:
            assert ask.serve() == b"x"
    assert "tokenscope.connection_fd" in told[0].why


def test_a_cancel_that_came_too_late_changes_nothing() -> None:
    """A view that had finished its work when the client left is answered as it wanted."""

    def view() -> list[bytes]:
        ask.hang_up()
        assert current_token().wait(PATIENCE)
        return [b"finished"]

    with Exchange(app_of(view)) as ask:
        assert ask.serve() == b"finished"
        assert ask.status == "200 OK"


# --- endings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("stopped", "499 Client Closed Request"),
        ("manual", "499 Client Closed Request"),
        ("client_disconnected", "499 Client Closed Request"),
        ("shutdown", "503 Service Unavailable"),
        ("budget_exhausted", "503 Service Unavailable"),
        ("deadline", "504 Gateway Timeout"),
    ],
)
def test_an_own_cancel_becomes_a_status(kind: str, status: str) -> None:
    """The reason's kind picks the status; its words are not the client's business."""

    def view() -> None:
        current_scope().cancel("secret words", kind=kind)
        block()

    with Exchange(app_of(view)) as ask:
        assert ask.serve() == b""
        assert ask.status == status
        assert "secret" not in str(ask.headers)


def test_the_timeout_becomes_a_504() -> None:
    """A request that takes too long is cut short by its own scope."""
    with Exchange(app_of(block, timeout=0.02)) as ask:
        assert ask.serve() == b""
        assert ask.status == "504 Gateway Timeout"


def test_a_cancel_from_above_becomes_a_status_too() -> None:
    """A token around the server (the process is shut down) reaches the request, and stops there."""
    process = CancellationToken(name="process")

    def view() -> None:
        process.cancel(kind="shutdown")
        block()

    with tokenscope.use_token(process), Exchange(app_of(view)) as ask:
        ask.serve()
        assert ask.status == "503 Service Unavailable"


def foreign() -> None:
    """Raise a cancel that has nothing to do with the request."""
    token = CancellationToken(name="elsewhere")
    token.cancel()
    token.check()


def group(*raisers: Callable[[], object]) -> None:
    """Raise what they raise, as one group."""
    errors = []
    for raiser in raisers:
        try:
            raiser()
        except BaseException as error:
            errors.append(error)
    raise BaseExceptionGroup("several", errors)


@pytest.mark.parametrize("view", [foreign, lambda: group(foreign), lambda: group(lambda: group(foreign, foreign))])
def test_a_foreign_cancel_becomes_a_500_and_an_event(view: Callable[[], None]) -> None:
    """A Cancelled that is not the request's own stops here, and the event names where it came from."""
    with heard(events.ForeignCancel) as told, Exchange(app_of(view), path="/f") as ask:
        assert ask.serve() == b""
        assert ask.status == "500 Internal Server Error"
    assert {(event.where, event.origin) for event in told} == {("GET /f", "elsewhere")}


def test_a_group_of_own_cancels_becomes_their_status() -> None:
    """A group of nothing but Cancelled is a Cancelled."""

    def view() -> None:
        current_scope().cancel()
        group(tokenscope.check, lambda: group(tokenscope.check))

    with Exchange(app_of(view)) as ask:
        ask.serve()
        assert ask.status.startswith("499")


def test_a_cancel_among_failures_is_taken_out() -> None:
    """What leaves of a mixed group are its failures, as an Exception that a server survives."""

    def fail() -> None:
        raise ValueError("real")

    with Exchange(app_of(lambda: group(foreign, fail))) as ask, pytest.raises(ExceptionGroup) as caught:
        ask.serve()
    assert [str(error) for error in caught.value.exceptions] == ["real"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, tokenscope.TaskCancelled])
def test_every_other_exception_goes_on_unchanged(kind: type[BaseException]) -> None:
    """The very object that the app raised reaches the server."""
    error = kind("the app's")

    def view() -> None:
        raise error

    with Exchange(app_of(view)) as ask, pytest.raises(kind) as caught:
        ask.serve()
    assert caught.value is error


def test_a_deadline_of_the_apps_own_goes_on_unchanged() -> None:
    """Only the request's own deadline is a 504; one inside the app is the app's error."""

    def view() -> None:
        with tokenscope.fail_after(0.01):
            block()

    with Exchange(app_of(view)) as ask, pytest.raises(tokenscope.DeadlineExceeded):
        ask.serve()


def test_one_log_line_per_cancelled_request(caplog: pytest.LogCaptureFixture) -> None:
    """The line has the reason, the stop time, the work after the cancel, orphans and late events."""

    def view() -> None:
        current_scope().spawn(lambda: (now.set(), threading.Event().wait(0.05))).result()

    with caplog.at_level(logging.INFO, "tokenscope"), Exchange(app_of(view), path="/l") as ask:
        now = hang_up_in_a_moment(ask)
        ask.serve()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    for part in (
        "endpoint=GET /l",
        "status=499",
        "client_disconnected",
        "stop_ms=",
        "orphans=0",
        "late_events=",
    ):
        assert part in lines[0]
    assert float(lines[0].split("post_cancel_work_ms=")[1].split()[0]) > 10


def test_a_request_that_failed_is_not_logged_as_cancelled() -> None:
    """A failing view stops its children by a cancel; that is housekeeping, not a cancelled request."""

    def view() -> None:
        current_scope().spawn(block)
        raise ValueError

    with heard(events.RequestCancelled) as told, Exchange(app_of(view)) as ask:
        with pytest.raises(ValueError):
            ask.serve()
    assert not told


# --- bodies -------------------------------------------------------------------------------------------------


def test_a_list_leaves_untouched_and_after_the_children() -> None:
    """The very list reaches the server, once every child was joined and nothing is watched any more."""
    body = [b"a", b"b"]
    done = []

    def view() -> list[bytes]:
        current_scope().spawn(lambda: (threading.Event().wait(0.03), done.append(1)))
        return body

    with Exchange(app_of(view)) as ask:
        ask.call()
        assert ask.body is body
        assert done == [1]
        assert ask.status == "200 OK"


def test_a_childs_failure_fails_the_request() -> None:
    """A list body does not leave if a child failed; the server sees the failure."""

    def fail() -> None:
        raise ValueError("in a child")

    def view() -> list[bytes]:
        current_scope().spawn(fail)
        return [b"looks fine"]

    with Exchange(app_of(view)) as ask, pytest.raises(ExceptionGroup) as caught:
        ask.serve()
    assert str(caught.value.exceptions[0]) == "in a child"
    assert ask.told == 0


def test_a_hang_up_while_the_children_are_joined_counts() -> None:
    """The view is done, its children are not: the client is still watched, and its leaving stops them."""

    def view() -> list[bytes]:
        current_scope().spawn(lambda: (now.set(), block()))
        return [b"x"]

    with Exchange(app_of(view)) as ask:
        now = hang_up_in_a_moment(ask)
        assert ask.serve() == b""
        assert ask.status.startswith("499")


def test_a_file_wrapper_leaves_untouched() -> None:
    """What the server may send with sendfile is not wrapped; when it is not sent, it is closed."""
    file = io.BytesIO(b"content")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", TEXT)
        return environ["wsgi.file_wrapper"](file)

    with Exchange(RequestScopeMiddleware(app), **{"wsgi.file_wrapper": FileWrapper}) as ask:
        ask.call()
        assert isinstance(ask.body, FileWrapper)
        assert ask.rest() == b"content"

    unsent = io.BytesIO(b"never sent")

    def view() -> Any:
        current_scope().spawn(block)
        current_scope().cancel()
        return FileWrapper(unsent)

    with Exchange(app_of(view), **{"wsgi.file_wrapper": FileWrapper}) as ask:
        assert ask.serve() == b""
    assert unsent.closed


def test_a_stream_is_armed_from_its_first_byte_whatever_the_method() -> None:
    """A hang-up before the first byte of a POST's stream does not stop it; from then on it does."""
    produced = []

    def view() -> Iterator[bytes]:
        ask.hang_up()
        assert not current_token().wait(0.05)
        produced.append("first")
        yield b"first"
        produced.append("second")
        yield b"second"

    with Exchange(app_of(view), "POST") as ask:
        assert ask.serve() == b"first"
        assert ask.status == "200 OK"
    assert produced == ["first"]


def test_a_begun_stream_whose_client_left_ends_quietly() -> None:
    """A generator blocked between two chunks is woken and closed, and the server sees the end of the body."""
    closed = []

    def view() -> Iterator[bytes]:
        try:
            yield b"first"
            now.set()
            block()
        finally:
            closed.append(current_scope().token.reason.kind)

    with heard(events.RequestCancelled) as told, Exchange(app_of(view), "POST") as ask:
        now = hang_up_in_a_moment(ask)
        assert ask.serve() == b"first"
    assert closed == ["client_disconnected"]
    assert [event.status for event in told] == [200]  # what was sent


def test_a_stream_that_has_not_begun_is_answered() -> None:
    """Cancelled before its first chunk, a stream is answered with the status: headers were kept back."""

    def view() -> Iterator[bytes]:
        now.set()
        block()
        yield b""

    with Exchange(app_of(view)) as ask:
        now = hang_up_in_a_moment(ask)
        assert ask.serve() == b""
        assert ask.status.startswith("499")
        assert ask.told == 1


def test_a_deadline_before_the_first_byte_of_a_stream_is_a_504() -> None:
    """Nothing was sent yet, so the client can still be told."""

    def view() -> Iterator[bytes]:
        block()
        yield b"never"

    with heard(events.RequestCancelled) as told, Exchange(app_of(view, timeout=0.03)) as ask:
        assert ask.serve() == b""
        assert ask.status == "504 Gateway Timeout"
    assert [event.status for event in told] == [504]


@pytest.mark.parametrize("kind", ["deadline", "shutdown", "stopped"])
def test_a_begun_stream_that_is_cut_does_not_look_whole(kind: str) -> None:
    """The server is told an error where a bare end would have it write the end mark."""
    closed = []

    def view() -> Iterator[bytes]:
        try:
            yield b"first"
            if kind != "deadline":
                current_scope().cancel(kind=kind)
            block()
        finally:
            closed.append(True)

    with heard(events.RequestCancelled) as told, Exchange(app_of(view, timeout=0.03)) as ask:
        steps = iter(ask.call().body)
        assert next(steps) == b"first"
        with pytest.raises(StreamCut, match=kind) as caught:
            next(steps)
        assert closed == [True]
        assert list(steps) == []
    assert [(event.status, event.report.reason) for event in told] == [(200, caught.value.reason)]


def test_a_cut_bears_the_address_that_the_guide_gives() -> None:
    """Error trackers ignore an exception by its full name: the one in tracebacks is the public one, also by pickle."""
    cut = StreamCut("it was cut")
    assert "".join(traceback.format_exception_only(cut)) == "tokenscope.integrations.wsgi.StreamCut: it was cut\n"
    assert type(pickle.loads(pickle.dumps(cut))) is StreamCut


@pytest.mark.parametrize(("method", "length"), [("GET", "5"), ("HEAD", None)])
def test_a_response_that_is_whole_is_not_torn(method: str, length: str | None) -> None:
    """All that was announced has been sent, or nobody wants a body: what is cut after that does not show."""

    def app(_environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [*TEXT, *([("Content-Length", length)] if length else [])])
        yield b"first"
        current_scope().cancel(kind="shutdown")
        block()

    with Exchange(RequestScopeMiddleware(app), method) as ask:
        assert ask.serve() == b"first"


def test_a_response_begun_by_write_is_logged_with_the_status_that_went_out() -> None:
    """A cancel after the old write() cannot change the status, neither for the client nor in the log."""

    def app(_environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("201 Created", TEXT)(b"one")
        current_scope().cancel()
        tokenscope.check()
        return []

    with heard(events.RequestCancelled) as told, Exchange(RequestScopeMiddleware(app), "POST") as ask:
        assert ask.serve() == b""
    assert (ask.status, [event.status for event in told]) == ("201 Created", [201])


def test_a_dropped_stream_is_logged_with_the_status_that_went_out() -> None:
    """A finalizer ends the request, and still knows what the client was told."""

    def view() -> Iterator[bytes]:
        yield b"x"
        yield b"y"

    with heard(events.RequestCancelled) as told, Exchange(app_of(view)) as ask:
        ask.call()
        next(iter(ask.body))
        ask.environ["tokenscope.scope"].cancel()
        ask.body = ()
        gc.collect()
        end = time.monotonic() + PATIENCE
        while not told and time.monotonic() < end:
            threading.Event().wait(0.001)
    assert [event.status for event in told] == [200]


def test_a_foreign_cancel_in_a_stream_stops_there() -> None:
    """The server is told an error of the usual kind, and the event names the origin."""

    def view() -> Iterator[bytes]:
        yield b"first"
        foreign()

    with heard(events.ForeignCancel) as told, Exchange(app_of(view)) as ask, pytest.raises(StreamCut) as caught:
        ask.serve()
    assert caught.value.reason is None
    assert [event.origin for event in told] == ["elsewhere"]


def test_an_error_in_a_stream_goes_on_unchanged() -> None:
    """The server gets the generator's own exception, after the children were stopped and joined."""
    error = ValueError("the app's")
    scopes = []

    def view() -> Iterator[bytes]:
        scopes.append(current_scope())
        current_scope().spawn(block)
        yield b"first"
        raise error

    with Exchange(app_of(view)) as ask, pytest.raises(ValueError) as caught:
        ask.serve()
    assert caught.value is error
    assert stopped(scopes[0].report) == 1


def test_a_stream_ends_its_scope_at_close() -> None:
    """Children spawned by a stream are joined when the server closes it, and their failure is told there."""
    scopes = []
    go = threading.Event()

    def fail() -> None:
        assert go.wait(PATIENCE)
        raise ValueError("in a child")

    def view() -> Iterator[bytes]:
        scopes.append(current_scope())
        current_scope().spawn(fail)
        yield b"all"

    with Exchange(app_of(view)) as ask:
        ask.call()
        assert list(ask.body) == [b"all"]
        assert scopes[0].report.outcome == "running"
        go.set()
        with pytest.raises(ExceptionGroup):
            ask.close()
    assert scopes[0].report.outcome == "failed"


def test_after_the_last_byte_the_client_may_go() -> None:
    """Whoever has read all of the Content-Length, or the end of the stream, is no leaver."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [*TEXT, ("Content-Length", "4")] if environ["PATH_INFO"] == "/4" else TEXT)
        yield b"1234"
        ask.hang_up()
        late.append(current_token().wait(0.05))

    for path, cancelled in (("/4", False), ("/chunked", True)):
        late: list[bool] = []
        with Exchange(RequestScopeMiddleware(app), path=path) as ask:
            assert ask.serve() == b"1234"
        assert late == [cancelled]

    with heard(events.RequestCancelled) as told, Exchange(app_of(lambda: iter([b"1"]))) as ask:
        ask.call()
        assert list(ask.body) == [b"1"]
        ask.hang_up()
        ask.close()
    assert not told


def test_a_body_closed_before_its_end_stops_what_made_it() -> None:
    """A server that gives up (its write failed) ends generator and children, though no hang-up was seen."""
    closed = []

    def view() -> Iterator[bytes]:
        current_scope().spawn(block)
        try:
            while True:
                yield b"more"
        finally:
            closed.append(current_token().cancelled)

    with heard(events.RequestCancelled) as told, Exchange(app_of(view)) as ask:
        ask.call()
        assert next(iter(ask.body)) == b"more"
        ask.close()
        ask.close()
        assert next(iter(ask.body), None) is None
    assert closed == [True]
    assert [event.report.reason.kind for event in told] == ["client_disconnected"]
    assert stopped(told[0].report) == 1


def test_a_body_that_was_never_begun_is_closed_without_a_word() -> None:
    """Servers do not read the body of a HEAD: the children end, and that is no cancelled request."""

    def view() -> Iterator[bytes]:
        current_scope().spawn(block)
        return iter([b"never"])

    with heard(events.RequestCancelled) as told, Exchange(app_of(view), "POST") as ask:
        ask.call().close()
    assert not told


def test_a_body_that_is_dropped_gives_its_watch_back() -> None:
    """A server that forgets close() leaves no descriptor watched and no child running."""
    started, ended = threading.Event(), threading.Event()

    def child() -> None:
        started.set()
        try:
            block()
        finally:
            ended.set()

    def view() -> Iterator[bytes]:
        current_scope().spawn(child)
        assert started.wait(PATIENCE)
        yield b"x"

    with Exchange(app_of(view)) as ask:
        ask.call()
        next(iter(ask.body))
        scope = ask.environ["tokenscope.scope"]
        ask.body = ()
        gc.collect()
        assert ended.wait(PATIENCE)
        wait_for_the_end(scope)
    assert scope.report.outcome == "cancelled"


def wait_for_the_end(scope: tokenscope.ThreadScope) -> None:
    """Wait until a worker has left the scope."""
    end = time.monotonic() + PATIENCE
    while scope.report.outcome == "running" and time.monotonic() < end:
        threading.Event().wait(0.001)


def test_a_whole_body_that_is_dropped_ends_as_it_should() -> None:
    """A client of a test that reads everything and forgets close() leaves no scope open and no warning."""

    def fail() -> None:
        assert go.wait(PATIENCE)
        raise ValueError("in a child")

    def view() -> Iterator[bytes]:
        current_scope().spawn(fail)
        yield b"x"

    with heard(events.TaskFailed) as told:
        for failing in (False, True):
            go = threading.Event()
            with Exchange(app_of(view if failing else lambda: iter([b"x"]))) as ask:
                scope = ask.call().environ["tokenscope.scope"]
                assert list(ask.body) == [b"x"]
                ask.body = ()
                gc.collect()
                go.set()
                wait_for_the_end(scope)
            assert scope.report.outcome == ("failed" if failing else "succeeded")
        unsent = time.monotonic() + PATIENCE
        while not told and time.monotonic() < unsent:
            threading.Event().wait(0.001)
    assert [event.task for event in told] == ["a dropped response"]


def test_what_a_body_raises_in_close_is_judged_like_the_rest() -> None:
    """A checkpoint in a body's close() stops here, a failure goes on, a second one is a note."""

    class Closes:
        def __init__(self, chunks: list[Any], closing: Callable[[], object]) -> None:
            self.chunks = iter(chunks)
            self.close = closing

        def __iter__(self) -> Any:
            return (chunk() if callable(chunk) else chunk for chunk in self.chunks)

    def fail(words: str = "closing") -> None:
        raise ValueError(words)

    def stop() -> None:
        current_scope().cancel()
        tokenscope.check()

    with Exchange(app_of(lambda: Closes([b"x"], stop))) as ask:
        assert ask.serve() == b"x"
    with Exchange(app_of(lambda: Closes([b"x"], fail))) as ask, pytest.raises(ValueError, match="closing"):
        ask.serve()
    ask = Exchange(app_of(lambda: Closes([b"x", lambda: fail("first")], fail)))
    with ask, pytest.raises(ValueError, match="first") as caught:
        ask.serve()
    assert "closing" in caught.value.__notes__[0]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_failure_told_in_close_outweighs_the_cancel_it_caused(grouped: bool) -> None:
    """A body with a scope inside: the step saw only a cancel, close() has the child's failure, which goes on."""

    class Scoped:
        def __iter__(self) -> Iterator[bytes]:
            yield b"a"
            current_scope().cancel()
            if grouped:
                group(tokenscope.check)
            tokenscope.check()

        def close(self) -> None:
            raise ZeroDivisionError

    with Exchange(app_of(Scoped)) as ask, pytest.raises(ZeroDivisionError):
        ask.serve()


def test_write_begins_the_response_too() -> None:
    """The old write() callable sends the kept-back headers and arms the request."""

    def app(_environ: dict[str, Any], start_response: Any) -> list[bytes]:
        write = start_response("200 OK", TEXT)
        assert ask.told == 0
        write(b"one")
        write(b"two")
        assert ask.told == 1
        now.set()
        block()
        return []

    with Exchange(RequestScopeMiddleware(app), "POST") as ask:
        now = hang_up_in_a_moment(ask)
        assert ask.serve() == b""
        assert (ask.status, ask.written) == ("200 OK", b"onetwo")


def test_start_response_again() -> None:
    """With exc_info the app may change its mind until the first chunk; without it, or later, it is told."""

    def changing(_environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        start_response("418 Changed", TEXT, (ValueError, ValueError(), None))
        yield b"x"
        with pytest.raises(AssertionError):
            start_response("200 OK", TEXT)
        start_response("500 Too late", TEXT, (ValueError, ValueError(), None))

    with Exchange(RequestScopeMiddleware(changing)) as ask:
        ask.call()
        assert next(iter(ask.body)) == b"x"
        assert ask.status == "418 Changed"
        assert list(ask.body) == []
        assert ask.status == "500 Too late"  # our server does not mind; a real one raises the exc_info


def test_an_app_that_says_nothing_is_left_to_the_server() -> None:
    """An app that never calls start_response is not spoken for."""
    with Exchange(RequestScopeMiddleware(lambda *_: [b"x"])) as ask:
        assert ask.serve() == b"x"
        assert ask.told == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"timeout": -1}, ValueError, "timeout must be 0 or more seconds, not -1"),
        ({"timeout": 0}, ValueError, "timeout must be more than 0"),
        ({"timeout": "5"}, TypeError, "timeout must be a number of seconds"),
        ({"timeout": float("nan")}, ValueError, "timeout must be"),
        ({"half_close": "maybe"}, ValueError, "half_close must be 'cancel' or 'ignore', not 'maybe'"),
        ({"methods": ["GET"]}, ValueError, "methods must be 'safe' or 'all'"),
        ({"max_threads": 0}, ValueError, "max_threads must be 1 or more"),
        ({"grace": 0}, ValueError, "grace must be more than 0"),
        ({"on_straggler": "kill"}, ValueError, "on_straggler must be"),
        ({"app": None}, TypeError, "app must be a WSGI application, not None"),
    ],
)
def test_bad_arguments_are_refused_at_construction(options: dict, error: type[Exception], words: str) -> None:
    """Each bad argument is named with its value, when the app starts and not with its first request."""
    with pytest.raises(error, match=words):
        RequestScopeMiddleware(**{"app": lambda *_: [], **options})


def test_an_endless_timeout_is_none() -> None:
    """Inf means no limit."""
    with Exchange(app_of(lambda: [repr(current_token().deadline).encode()], timeout=float("inf"))) as ask:
        assert ask.serve() == b"None"


def test_cancelled_is_what_was_imported() -> None:
    """The exception that views see is the public one."""

    def view() -> list[bytes]:
        current_scope().cancel()
        with pytest.raises(Cancelled):
            tokenscope.check()
        return [b"swallowed"]

    with Exchange(app_of(view)) as ask:
        assert ask.serve() == b""  # a swallowed cancel is no success
