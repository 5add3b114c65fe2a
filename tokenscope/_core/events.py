"""What happened, as frozen records handed to listeners. No logger, no exporter.

An event that nobody asked for costs one look into a dictionary: ``if wants(X): emit(X(...))``.

Listeners run on the thread where the thing happened, must be quick, and cannot disturb it: an error in a listener goes
to ``sys.unraisablehook``.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tokenscope._core import _primitives

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tokenscope._core.reasons import CancelReason

__all__ = [
    "PROBLEMS",
    "BackgroundCut",
    "CallbackFailed",
    "CleanupFailed",
    "CleanupOverran",
    "Event",
    "FallbackUsed",
    "ForeignCancel",
    "HangupIgnored",
    "LateEvent",
    "OrphanEnded",
    "Orphaned",
    "RequestCancelled",
    "RestoreRefused",
    "ScopeEnded",
    "ScopeOpened",
    "StragglerSeen",
    "TaskEnded",
    "TaskFailed",
    "TaskInterrupted",
    "TaskSpawned",
    "ThreadFailed",
    "TokenCancelled",
    "WatchUnsupported",
    "emit",
    "subscribe",
    "wants",
]


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events."""


@dataclass(frozen=True, slots=True)
class TokenCancelled(Event):
    """A token was cancelled (told once, for the token where it began)."""

    token: str
    reason: CancelReason


@dataclass(frozen=True, slots=True)
class CallbackFailed(Event):
    """An ``on_cancel`` callback, a thread-release hook or a listener-like function of the user's raised."""

    where: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class ThreadFailed(Event):
    """A thread of the library could not be started, or a piece of library work ended in an error."""

    where: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class ScopeOpened(Event):
    """A scope was entered."""

    scope: str


@dataclass(frozen=True, slots=True)
class ScopeEnded(Event):
    """A scope was left; ``report`` is its `ScopeReport`."""

    scope: str
    report: Any


@dataclass(frozen=True, slots=True)
class TaskSpawned(Event):
    """A task was accepted by a scope."""

    scope: str
    task: str


@dataclass(frozen=True, slots=True)
class TaskEnded(Event):
    """A task ended; ``outcome`` is ``succeeded``, ``failed`` or ``cancelled``."""

    scope: str
    task: str
    outcome: str


@dataclass(frozen=True, slots=True)
class TaskFailed(Event):
    """A task failed where nobody will be told by an exception (background work, an orphan)."""

    scope: str
    task: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class TaskInterrupted(Event):
    """A straggler in which `Cancelled` was raised by force has ended; it had ``swallowed`` so many of them before."""

    scope: str
    task: str
    swallowed: int


@dataclass(frozen=True, slots=True)
class CleanupFailed(Event):
    """A deferred cleanup raised."""

    owner: str
    cleanup: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class CleanupOverran(Event):
    """A cleanup was still running when the time for all cleanups of its owner was up."""

    owner: str
    cleanup: str
    stack: str


@dataclass(frozen=True, slots=True)
class StragglerSeen(Event):
    """A child has not ended ``waited`` seconds after the cancel."""

    scope: str
    task: str
    waited: float
    stack: str


@dataclass(frozen=True, slots=True)
class Orphaned(Event):
    """A scope ended without some of its children."""

    scope: str
    stacks: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BackgroundCut(Event):
    """A background scope was closed before all of its work was done: these tasks were cancelled."""

    scope: str
    running: tuple[str, ...]
    waiting: tuple[str, ...]  # they never start


@dataclass(frozen=True, slots=True)
class OrphanEnded(Event):
    """A child that its scope had given up ended after all."""

    scope: str
    task: str
    late: float


@dataclass(frozen=True, slots=True)
class LateEvent(Event):
    """Something of a scope happened after its cancel: a result, a chunk, a refused spawn, a charge."""

    scope: str
    what: str


@dataclass(frozen=True, slots=True)
class ForeignCancel(Event):
    """A ``Cancelled`` reached a host although nothing of the host's own was cancelled."""

    where: str
    origin: str | None
    reason: CancelReason


@dataclass(frozen=True, slots=True)
class RequestCancelled(Event):
    """A request's scope was cancelled and has ended; ``report`` is its `ScopeReport`."""

    endpoint: str
    status: int
    report: Any


@dataclass(frozen=True, slots=True)
class HangupIgnored(Event):
    """A client hung up on a request that was not armed, and nobody acted on it. Told once per endpoint."""

    endpoint: str
    remedy: str


@dataclass(frozen=True, slots=True)
class WatchUnsupported(Event):
    """Hang-ups cannot be seen here. Told once per server."""

    server: str
    why: str


@dataclass(frozen=True, slots=True)
class FallbackUsed(Event):
    """The system lacks something, and another way is taken. Told once for each ``what``."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class RestoreRefused(Event):
    """An attribute that was instrumented was replaced by somebody else since: it is left to them, and ours is off."""

    attribute: str
    found: str


#: What must never pass in silence; the front door has them logged.
PROBLEMS: tuple[type[Event], ...] = (
    CallbackFailed,
    ThreadFailed,
    TaskFailed,
    TaskInterrupted,
    CleanupFailed,
    CleanupOverran,
    StragglerSeen,
    Orphaned,
    OrphanEnded,
    BackgroundCut,
    ForeignCancel,
    HangupIgnored,
    WatchUnsupported,
    FallbackUsed,
    RestoreRefused,
)

_room = _primitives.Room()  # for the replacement of the tuples below; readers take no lock
_listeners: dict[type[Event], tuple[Callable[[Any], object], ...]] = {}


def wants(kind: type[Event]) -> bool:
    """Whether anybody listens to this kind of event."""
    return kind in _listeners


def subscribe(listener: Callable[[Any], object], *kinds: type[Event]) -> Callable[[], None]:
    """Call ``listener(event)`` for events of these kinds; returns a function that ends it. Thread-safe.

    Raises:
        TypeError: ``listener`` is not callable, or no kind was given.
    """
    if not callable(listener):
        raise TypeError(f"listener must be callable, not {listener!r}")
    if not kinds:
        raise TypeError("subscribe() needs at least one kind of event")
    entry = functools.partial(listener)  # with an identity of its own: a listener may subscribe twice
    _room.run(_add_locked, entry, kinds)

    def unsubscribe() -> None:
        _room.run(_remove_locked, entry, kinds)

    return unsubscribe


def _add_locked(entry: Callable[[Any], object], kinds: tuple[type[Event], ...]) -> None:
    for kind in kinds:
        if entry not in _listeners.get(kind, ()):
            _listeners[kind] = (*_listeners.get(kind, ()), entry)


def _remove_locked(entry: Callable[[Any], object], kinds: tuple[type[Event], ...]) -> None:
    for kind in kinds:
        rest = tuple(other for other in _listeners.get(kind, ()) if other is not entry)
        if rest:
            _listeners[kind] = rest
        else:
            _listeners.pop(kind, None)


def emit(event: Event) -> None:
    """Hand ``event`` to whoever listens to its kind."""
    for listener in _listeners.get(type(event), ()):
        try:
            listener(event)
        except Exception as error:  # a listener must never disturb the work it listens to
            _tell_unraisable(error, listener)


def _tell_unraisable(error: BaseException, where: object) -> None:
    sys.unraisablehook(
        SimpleNamespace(  # the hook's own class cannot be built from Python
            exc_type=type(error), exc_value=error, exc_traceback=error.__traceback__, err_msg=None, object=where
        )
    )


def _tell_late_error(error: BaseException) -> None:
    emit(ThreadFailed("an operation put off by a signal handler", error))


_primitives.on_late_error = _tell_late_error
