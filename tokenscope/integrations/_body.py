"""A response body while it is being sent: watched to its last byte, stopped when its request is cancelled.

States: *waiting* for the first chunk -> *begun* -> *drained* or *failed* or *given up* -> *ended* (scope
    left).

What has not begun is answered with the status of its cancel. A begun stream cannot be answered differently any
more. If its client has gone it ends quietly; if not, it must not look whole: an iterator that just stops has
the server write the end mark, so the server is told a `StreamCut`, and tears the connection as it does for
any error of the app's. The client may go as soon as the last byte was handed over (``Content-Length``
reached, or the iterator drained), so the watch ends there: that is no hang-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tokenscope._core.current import check
from tokenscope._core.outcome import one_line
from tokenscope._core.reasons import CancelKind
from tokenscope.integrations._answers import StreamCut, only_cancels

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tokenscope.integrations._answers import Answer
    from tokenscope.integrations._request import Request

__all__ = ["Body", "Head"]


class Head(Protocol):
    """The status line and headers of the response, as far as a body has to do with them."""

    @property
    def status(self) -> int:
        """The app's status, 0 if it has none yet."""

    @property
    def length(self) -> int | None:
        """How many bytes were announced, if they were."""

    @property
    def begun(self) -> bool:
        """Whether it was told, and cannot be replaced any more."""

    def send(self) -> None:
        """Hand the app's status and headers to the server, if that was not done before."""

    def replace(self, answer: Answer) -> None:
        """Tell this instead, if nothing was sent yet."""


class Body:
    """What the server iterates over instead of the app's body. Each step runs in the request's context."""

    __slots__ = ("_begun", "_chunks", "_drained", "_ended", "_head", "_inner", "_request", "_sent")

    def __init__(self, request: Request, inner: Iterable[Any], head: Head) -> None:
        self._ended = True  # until all is in place: `__del__` looks at it
        self._request = request
        self._inner = inner
        self._chunks: Iterator[Any] = iter(inner)
        self._head = head
        self._sent = 0
        self._begun = False
        self._drained = False  # nothing more will come, or is needed
        self._ended = False  # the request's scope has been left

    def __iter__(self) -> Body:
        return self

    def __next__(self) -> Any:
        """The next chunk.

        Raises:
            StreamCut: The response has begun and is cut, and its client still reads.
        """
        return self._request.run(self._next)

    def _next(self) -> Any:
        if self._ended:
            raise StopIteration
        try:
            check()
            chunk = self._request.timed(next, self._chunks)
        except StopIteration:
            self._no_more()
            self._head.send()
            raise
        except BaseException as error:
            raise self._failed(error) from None
        self._deliver(chunk)
        return chunk

    def _deliver(self, chunk: Any) -> None:
        self._sent += len(chunk)
        if self._head.length is not None and self._sent >= self._head.length:
            self._no_more()
        elif not self._begun:
            self._request.hangup.arm()
        if not self._begun:
            self._begun = True
            self._head.send()

    def _no_more(self) -> None:
        self._drained = True
        self._request.hangup.end()

    def _failed(self, error: BaseException) -> Exception:
        """The app's body raised: the request ends here, and a cancel goes no further. What the server is told."""
        begun = self._head.begun
        answer = self._end(error)
        if answer is not None and not begun:
            self._head.replace(answer)
            return StopIteration()
        reason = self._request.cancel_reason
        unread = reason is not None and reason.kind is CancelKind.CLIENT_DISCONNECTED
        if unread or self._drained or self._request.bodiless:
            return StopIteration()
        return StreamCut(f"the response of {self._request.endpoint!r} was cut off after it had begun", reason)

    def close(self) -> None:
        """End the request: the app's body is closed, the children are joined. Idempotent."""
        if not self._ended:
            self._request.run(self._close)

    def _close(self) -> None:
        if not self._drained or (self._request.bodiless and not self._begun):
            self._request.give_up()
        self._end(None)

    def _end(self, error: BaseException | None) -> Answer | None:
        self._ended = True
        close: Any = getattr(self._inner, "close", None)
        if close is not None:
            try:
                self._request.timed(close)
            except BaseException as failure:  # judged with the rest
                error = _weightier(error, failure)
        return self._request.end(error, status=self._head.status, begun=self._head.begun)

    def __del__(self) -> None:
        if not self._ended:
            self._request.drop(drained=self._drained, status=self._head.status, begun=self._head.begun)


def _weightier(error: BaseException | None, later: BaseException) -> BaseException:
    """The first error counts; but what a cancel was the consequence of may be told only when all is closed.

    So a child's failure in a scope inside the body: the step sees a ``Cancelled``, ``close`` raises the failure.
    """
    if error is None or (only_cancels(error) and not only_cancels(later)):
        return later
    error.add_note(f"also when the body was closed: {one_line(later)}")
    return error
