"""What a host is told instead of a `Cancelled`.

The law: no ``Cancelled``, and no group of nothing but ``Cancelled``, ever leaves a host's boundary; as a
BaseException it would end a whole worker process in some servers. A cancel of the request's own becomes a
status, a foreign one becomes a 500 and an event that names its origin. Everything else passes unchanged.
Where a status comes too late, because the response has begun, it becomes a `StreamCut`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenscope._core import events
from tokenscope._core.errors import Cancelled, DeadlineExceeded, TokenScopeError
from tokenscope._core.reasons import CancelKind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from tokenscope._core.reasons import CancelReason

__all__ = ["CLIENT_CLOSED", "Answer", "StreamCut", "answer_for", "judge", "only_cancels", "only_error"]


class StreamCut(TokenScopeError):
    """A response that had begun was cut by a cancel. Raised to the server, so that the response does not look whole.

    Attributes:
        reason: Why the request was cancelled; None if it was not (a ``Cancelled`` of somebody else's came out).
    """

    def __init__(self, message: str, reason: CancelReason | None = None) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.reason})" if self.reason else str(self.args[0])


@dataclass(frozen=True, slots=True)
class Answer:
    """A status line, and no more: why something was cancelled is not the client's business."""

    status: int
    phrase: str

    @property
    def line(self) -> str:
        """As WSGI wants it."""
        return f"{self.status} {self.phrase}"


#: nginx's number for a client that left; nobody but the access log reads it.
CLIENT_CLOSED = Answer(499, "Client Closed Request")
_UNAVAILABLE = Answer(503, "Service Unavailable")
_TOO_LATE = Answer(504, "Gateway Timeout")
_BROKEN = Answer(500, "Internal Server Error")

_BY_KIND = {
    CancelKind.CLIENT_DISCONNECTED: CLIENT_CLOSED,
    CancelKind.STOPPED: CLIENT_CLOSED,
    CancelKind.MANUAL: CLIENT_CLOSED,
    CancelKind.SCOPE_ENDED: CLIENT_CLOSED,
    CancelKind.SHUTDOWN: _UNAVAILABLE,
    CancelKind.BUDGET_EXHAUSTED: _UNAVAILABLE,
    CancelKind.DEADLINE: _TOO_LATE,
}


def answer_for(reason: CancelReason) -> Answer:
    """The status for a request that was cancelled for this reason."""
    return _BY_KIND.get(reason.kind, _BROKEN)


def judge(error: BaseException, own: Collection[CancelReason], where: str, *, keep_deadline: bool = False) -> Answer:
    """The answer for what came out of a request's scope.

    Args:
        error: What came out.
        own: The reasons with which scopes of this request were cancelled; compared by identity.
        where: The endpoint, for the event.
        keep_deadline: Let the request's own `DeadlineExceeded` pass, for a framework with error handlers.

    Raises:
        BaseException: ``error`` itself, if it is neither a cancel nor the request's own deadline; a group
            that also holds cancels is raised without them.
    """
    if isinstance(error, DeadlineExceeded) and _is_in(error.reason, own) and not keep_deadline:
        return _TOO_LATE
    cancels = list(_cancels(error))
    if not cancels:
        raise error
    for cancel in cancels:
        if not _is_in(cancel.reason, own):
            events.emit(events.ForeignCancel(where, cancel.origin, cancel.reason))
    if isinstance(error, BaseExceptionGroup):
        rest = error.split(Cancelled)[1]
        if rest is not None:
            raise rest from error
    if all(_is_in(cancel.reason, own) for cancel in cancels):
        return answer_for(cancels[0].reason)
    return _BROKEN


def only_cancels(error: BaseException) -> bool:
    """Whether ``error`` is a `Cancelled`, or a group of nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(Cancelled)[1] is None
    return isinstance(error, Cancelled)


def only_error(error: BaseException) -> BaseException:
    """The one error in a group of one, however deep; anything else as it is."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _cancels(error: BaseException) -> Iterator[Cancelled]:
    """Every `Cancelled` in ``error``; no recursion, groups may be deep."""
    pile = [error]
    while pile:
        here = pile.pop()
        if isinstance(here, Cancelled):
            yield here
        elif isinstance(here, BaseExceptionGroup):
            pile.extend(reversed(here.exceptions))


def _is_in(reason: CancelReason | None, own: Collection[CancelReason]) -> bool:
    return any(reason is mine for mine in own)
