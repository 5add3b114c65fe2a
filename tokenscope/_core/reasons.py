"""Why something was cancelled: one frozen value, made once, the same object all the way down."""

from __future__ import annotations

import enum
import pickle
from dataclasses import dataclass, fields
from typing import Any

from tokenscope._core import clock

__all__ = ["CancelKind", "CancelReason", "make_reason", "without_frames"]


class CancelKind(enum.StrEnum):
    """The closed list of reasons. A member equals its word: ``CancelKind.DEADLINE == "deadline"``."""

    MANUAL = "manual"
    CLIENT_DISCONNECTED = "client_disconnected"
    DEADLINE = "deadline"
    SIBLING_FAILED = "sibling_failed"
    BODY_FAILED = "body_failed"
    RACE_LOST = "race_lost"
    SCOPE_ENDED = "scope_ended"
    BUDGET_EXHAUSTED = "budget_exhausted"
    SHUTDOWN = "shutdown"
    INTERRUPTED = "interrupted"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class CancelReason:
    """Why a token was cancelled. The first reason wins; all descendants hold the same object.

    Attributes:
        kind: One of the closed list.
        message: For people; never sent to a client.
        tag: A word of the application's own.
        source: The name of the token or task that caused it.
        cause: The exception behind it, without its frames (a token must not keep a stack alive).
        at: When, in Unix seconds.
    """

    kind: CancelKind
    message: str = ""
    tag: str | None = None
    source: str | None = None
    cause: BaseException | None = None
    at: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.message else str(self.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["cause"] = _picklable(self.cause)
        return _rebuild, (values,)


def _rebuild(values: dict[str, Any]) -> CancelReason:
    return CancelReason(**values)


def _picklable(cause: BaseException | None) -> BaseException | None:
    """The cause if it survives a journey to another process, else its text in a RuntimeError."""
    try:
        pickle.loads(pickle.dumps(cause))  # noqa: S301  # our own bytes
    except Exception:  # whatever a foreign class raises while it is pickled: the text is still worth having
        return RuntimeError(repr(cause))
    return cause


def without_frames(error: BaseException | None) -> BaseException | None:
    """A twin of ``error`` that keeps no stack alive: no traceback, no context, no cause."""
    return None if error is None else _without_frames(error)


def _without_frames(error: BaseException) -> BaseException:
    kind = type(error)
    try:
        if isinstance(error, BaseExceptionGroup):
            return error.derive([_without_frames(inner) for inner in error.exceptions])
        twin = kind.__new__(kind, *error.args)
        twin.args = error.args
        twin.__dict__.update(error.__dict__)
        if isinstance(error, OSError) and isinstance(twin, OSError):
            twin.filename, twin.filename2 = error.filename, error.filename2  # not among its arguments
    except Exception:  # a foreign class with a constructor of its own mind
        return RuntimeError(repr(error))
    return twin


def make_reason(
    kind: str, message: str, *, tag: str | None, source: str | None, cause: BaseException | None
) -> CancelReason:
    """Check a user's words and put them together.

    Raises:
        ValueError: ``kind`` is not one of the closed list.
        TypeError: ``message``, ``tag`` or ``cause`` is of the wrong type.
    """
    if kind not in CancelKind.__members__.values():
        raise ValueError(f"kind must be one of {', '.join(CancelKind)}, not {kind!r}")
    if not isinstance(message, str):
        raise TypeError(f"message must be a str, not {message!r}")
    if tag is not None and not isinstance(tag, str):
        raise TypeError(f"tag must be a str or None, not {tag!r}")
    if cause is not None and not isinstance(cause, BaseException):
        raise TypeError(f"cause must be an exception or None, not {cause!r}")
    return CancelReason(CancelKind(kind), message, tag, source, without_frames(cause), clock.wall())
