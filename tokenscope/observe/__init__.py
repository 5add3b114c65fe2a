"""What listens to the core's events. Importing ``tokenscope`` attaches `tokenscope.observe.log`, and nothing else.

`subscribe` attaches a listener of your own: ``subscribe(listener, ScopeEnded)``.
"""

from __future__ import annotations

from tokenscope._core.events import (
    PROBLEMS,
    BackgroundCut,
    CallbackFailed,
    CleanupFailed,
    CleanupOverran,
    Event,
    FallbackUsed,
    ForeignCancel,
    HangupIgnored,
    LateEvent,
    Orphaned,
    OrphanEnded,
    RequestCancelled,
    RestoreRefused,
    ScopeEnded,
    ScopeOpened,
    StragglerSeen,
    TaskEnded,
    TaskFailed,
    TaskInterrupted,
    TaskSpawned,
    ThreadFailed,
    TokenCancelled,
    WatchUnsupported,
    subscribe,
)

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
    "subscribe",
]
