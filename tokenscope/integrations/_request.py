"""One request, as every web integration sees it: its scope, its client, its context.

A server calls the app, then ``next`` and ``close`` of the body, from where it likes; the thread then serves
the next request. So all of these run in one copied ``Context``, in which the scope is entered and left: the
current token is right at every step, and nothing of it is ever seen by the next request on that thread.

How a request ends, in order: scopes left (children joined, still watched: a hang-up shortens this too) ->
watch closed, before the server can end the connection -> outcome judged (`_answers`) -> told.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
from contextvars import Context, ContextVar, copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from tokenscope._core import ambient, clock, events, workers
from tokenscope._core.errors import DeadlineExceeded
from tokenscope._core.reasons import CancelKind
from tokenscope._core.report import ScopeReport, TaskCounts
from tokenscope._core.token import cancel_from_library
from tokenscope.integrations._answers import Answer, answer_for, judge
from tokenscope.integrations._hangup import Hangup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping

    from tokenscope._core.reasons import CancelReason
    from tokenscope._core.scope import ThreadScope
    from tokenscope._core.token import CancellationToken
    from tokenscope.integrations._settings import Settings

__all__ = ["SCOPE_KEY", "Part", "Request", "Swapped", "current_request"]

P = ParamSpec("P")
T = TypeVar("T")

#: Where a request's scope is found in the environ.
SCOPE_KEY = "tokenscope.scope"

_REMEDY = (
    "to stop such work, decorate the view with @cancellable (below the decorator that sets its route),"
    " or let methods be 'all'"
)

#: Cancels by which a scope stops what is left of itself: the request failed or was done, not cancelled.
_HOUSEKEEPING = (CancelKind.BODY_FAILED, CancelKind.SIBLING_FAILED, CancelKind.SCOPE_ENDED)

_current: ContextVar[Request | None] = ContextVar("tokenscope_request", default=None)


def current_request() -> Request | None:
    """The request that this code serves, if an integration guards it."""
    request = _current.get()
    return None if request is None or request.ended else request


class Runner(Protocol):
    """Where the steps of a request run."""

    def run(self, step: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``step`` there."""


class Swapped:
    """The caller's own context, in which only what is ours is different while a step runs.

    For a guard inside of a framework: what the framework has set, and takes back later, must stay in one
    context.
    """

    __slots__ = ("_inside",)

    def __init__(self) -> None:
        self._inside: list[Any] = [var.get() for var in _ours()]

    def run(self, step: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Put ours in, call ``step``, and put back what was there."""
        outside = [var.get() for var in _ours()]
        _put(self._inside)
        try:
            return step(*args, **kwargs)
        finally:
            self._inside = [var.get() for var in _ours()]
            _put(outside)


def _ours() -> tuple[ContextVar[Any], ...]:
    return ambient.token_var, ambient.owner_var, _current


def _put(values: list[Any]) -> None:
    for var, value in zip(_ours(), values, strict=True):
        var.set(value)


class Request:
    """See the module's head. Used by one thread at a time, as a server does; `arm` and its token by any."""

    __slots__ = (
        "_context",
        "_parts",
        "_settings",
        "_work",
        "bodiless",
        "ended",
        "endpoint",
        "hangup",
        "scope",
    )

    def __init__(self, environ: MutableMapping[str, Any], settings: Settings, *, context: Runner | None = None) -> None:
        method = environ.get("REQUEST_METHOD", "GET")
        #: For people: names the scope, the events and the log line. A framework may put its route here.
        self.endpoint = f"{method} {environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        #: Whether only the head of the answer is wanted: what makes its body may stop.
        self.bodiless = method == "HEAD"
        self.scope = settings.make_scope(self.endpoint)
        self.ended = False
        self._settings = settings
        self._context: Context | Runner = copy_context() if context is None else context
        self._parts: list[Part] = []
        self._work = _LateWork()
        self._context.run(self._enter, environ)
        self.hangup = Hangup(self.scope.token)

    def _enter(self, environ: MutableMapping[str, Any]) -> None:
        self.scope.__enter__()
        _current.set(self)
        environ[SCOPE_KEY] = self.scope

    def run(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run one step of the request in its context."""
        return self._context.run(step, *args, **kwargs)

    def watch(self, environ: MutableMapping[str, Any]) -> None:
        """Begin to watch the client. One that has gone already, of an armed request, is noticed at once."""
        if self._settings.arms(environ.get("REQUEST_METHOD", "GET")):
            self.hangup.arm()
        self.hangup.begin(environ, self._settings.half_close)
        self.hangup.look()

    def timed(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call code of the app's; what it does after the cancel is counted."""
        return self.timed_under(self.scope, fn, *args, **kwargs)

    def timed_under(self, scope: ThreadScope | None, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Count what ``fn`` does after the cancel of ``scope``, but not what is timed inside of it.

        None: this is no code of the app's, and nobody counts it.
        """
        with self._work.span(None if scope is None else scope.token):
            return fn(*args, **kwargs)

    def part(self, environ: MutableMapping[str, Any], timeout: float | None) -> Part:
        """Open a scope inside of the request's, in the request's context."""
        made = Part(self, environ, replace(self._settings, timeout=timeout).make_scope(self.endpoint))
        self._parts.append(made)
        return made

    # --- the end
    # ------------------------------------------------------------------------------------------------

    def end(
        self,
        error: BaseException | None,
        *,
        status: int = 0,
        begun: bool = False,
        keep_deadline: bool = False,
    ) -> Answer | None:
        """Leave the request's scope with what came of the app. Runs in the request's context, once.

        Args:
            error: What the app raised, if it did.
            status: What the app answered, for the log.
            begun: That went out already: what comes now does not change it.
            keep_deadline: Raise the request's own `DeadlineExceeded` instead of answering 504. What is made
                of it is then for the caller to `tell`.

        Returns:
            What the client is told instead of the app's own answer, because the request was cancelled; else
            None.

        Raises:
            BaseException: What the app or its children raised, if it was no cancel.
        """
        try:
            error = self._leave(error)
        finally:
            self.ended = True
            self.hangup.end()
        told: int | None = status if begun else _BROKEN_STATUS
        try:
            answer = self._judge(error, keep_deadline=keep_deadline)
            if not begun:
                told = answer.status if answer else status
        except DeadlineExceeded as late:
            if keep_deadline and self.owns(late.reason):
                told = None
            raise
        finally:
            if told is not None:
                self.tell(told)
        return answer

    def _leave(self, error: BaseException | None) -> BaseException | None:
        for part in reversed(self._parts):
            if part.open:  # its response was thrown away before anybody closed it
                part.scope.cancel("the response was discarded", kind=CancelKind.SCOPE_ENDED)
                error = part.leave(error)
        return left(self.scope, error)

    def _judge(self, error: BaseException | None, *, keep_deadline: bool) -> Answer | None:
        if error is not None:
            return judge(error, self._own_reasons(), self.endpoint, keep_deadline=keep_deadline)
        reason = self.scope.token.reason
        return answer_for(reason) if self.scope.cancelled_caught and reason is not None else None

    def give_up(self) -> None:
        """The server closes the body before its end: nobody waits for the rest."""
        gone = self.hangup.armed and not self.bodiless
        kind = CancelKind.CLIENT_DISCONNECTED if gone else CancelKind.SCOPE_ENDED
        cancel_from_library(self.scope.token, "the server closed the response before its end", kind=kind)

    def drop(self, *, drained: bool, status: int, begun: bool) -> None:
        """The body was dropped without ``close()``. For finalizers: another thread leaves the scope.

        Not ``threading.Thread``: its ``start()`` waits for locks that this very thread may hold, in whatever
        the finalizer interrupted.
        """
        self.hangup.end()
        end = functools.partial(self._end_dropped, drained=drained, status=status, begun=begun)
        with contextlib.suppress(RuntimeError):  # no more threads, or the interpreter is on its way out
            _thread.start_new_thread(workers.submit, (end,))

    def _end_dropped(self, *, drained: bool, status: int, begun: bool) -> None:
        if not drained:
            message = "the response was dropped without close()"
            cancel_from_library(self.scope.token, message, kind=CancelKind.SCOPE_ENDED)
        try:
            self.run(functools.partial(self.end, None, status=status, begun=begun))
        except BaseException as error:  # nobody else could be told
            events.emit(events.TaskFailed(self.scope.name, "a dropped response", error))

    # --- telling
    # ------------------------------------------------------------------------------------------------

    def _scopes(self) -> list[ThreadScope]:
        return [self.scope, *(part.scope for part in self._parts)]

    def owns(self, reason: CancelReason | None) -> bool:
        """Whether one of this request's scopes was cancelled with this very reason."""
        return any(reason is mine for mine in self._own_reasons())

    def _own_reasons(self) -> list[CancelReason]:
        return [scope.token.reason for scope in self._scopes() if scope.token.reason is not None]

    @property
    def cancel_reason(self) -> CancelReason | None:
        """Why the request was cancelled, if it was."""
        return next((reason for reason in self._own_reasons() if reason.kind not in _HOUSEKEEPING), None)

    def tell(self, status: int) -> None:
        """Say once how the request ended, if there is something to say. ``status`` is what was sent."""
        self.hangup.complain(self.endpoint, _REMEDY)
        if not self._parts and not self.scope.token.cancelled:
            return
        reason = self.cancel_reason
        if reason is not None and events.wants(events.RequestCancelled):
            events.emit(events.RequestCancelled(self.endpoint, status, self._report(reason)))

    def _report(self, reason: CancelReason) -> ScopeReport:
        """One report for all scopes of the request; the app's own code counts like a child's."""
        reports = [scope.report for scope in self._scopes()]
        first = reports[0]
        return replace(
            first,
            reason=reason,
            tasks=TaskCounts(*(sum(getattr(r.tasks, slot) for r in reports) for slot in TaskCounts.__slots__)),
            errors=tuple({id(error): error for r in reports for error in r.errors}.values()),
            stragglers={name: stack for r in reports for name, stack in r.stragglers.items()},
            orphans=tuple(name for r in reports for name in r.orphans),
            late_events=_sum_up([r.late_events for r in reports]),
            stop_duration=max(0.0, clock.wall() - reason.at),
            post_cancel_work=self._work.seconds + sum(r.post_cancel_work for r in reports),
        )


class _LateWork:
    """Seconds of the app's own code after the cancel. Spans may stand in one another: each second counts once."""

    __slots__ = ("_depth", "_inner", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._inner: list[tuple[float, float]] = []  # the spans that ended inside of the one that is open

    @contextlib.contextmanager
    def span(self, token: CancellationToken | None) -> Iterator[None]:
        """Count this code after the cancel of ``token``, without what is in a span of its own. None: not."""
        start = clock.wall()
        before, self._inner = self._inner, []
        self._depth += 1
        try:
            yield
        finally:
            end = clock.wall()
            reason = None if token is None else token.reason
            if reason is not None:
                self._count(max(start, reason.at), end)
            self._depth -= 1
            self._inner = [*before, (start, end)] if self._depth else []

    def _count(self, start: float, end: float) -> None:
        elsewhere = sum(max(0.0, b - max(a, start)) for a, b in self._inner)
        self.seconds += max(0.0, end - start - elsewhere)


class Part:
    """A scope inside a request's, around what a framework's error handlers guard.

    It may stay open for a stream. While it is open it is what the environ calls the request's scope.
    """

    __slots__ = ("_environ", "_outer", "_request", "open", "scope")

    def __init__(self, request: Request, environ: MutableMapping[str, Any], scope: ThreadScope) -> None:
        self.scope = scope.__enter__()
        self.open = True
        self._request = request
        self._environ = environ
        self._outer = environ.get(SCOPE_KEY, request.scope)
        environ[SCOPE_KEY] = scope

    def timed(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call code of the app's; what it does after this scope's cancel is counted."""
        return self._request.timed_under(self.scope, fn, *args, **kwargs)

    def leave(self, error: BaseException | None) -> BaseException | None:
        """Leave the scope; what came out of it, or None. Once."""
        self.open = False
        self._environ[SCOPE_KEY] = self._outer
        return self._request.timed_under(None, left, self.scope, error)

    def answer(self) -> Answer | None:
        """The status for a scope that was cancelled by itself and absorbed it."""
        reason = self.scope.token.reason
        return answer_for(reason) if self.scope.cancelled_caught and reason is not None else None


_BROKEN_STATUS = 500


def left(scope: ThreadScope, error: BaseException | None) -> BaseException | None:
    """Leave ``scope`` with ``error``; what comes out of it, or None."""
    try:
        absorbed = scope.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
    except BaseException as raised:  # the outcome: whoever called decides what becomes of it
        return raised
    return None if absorbed else error


def _sum_up(counts: list[Any]) -> dict[str, int]:
    return {what: sum(c.get(what, 0) for c in counts) for what in dict.fromkeys(key for c in counts for key in c)}
