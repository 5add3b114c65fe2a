"""Structured concurrency and cancellation for synchronous, threaded Python: a request owns the work it starts.

The front door: names only. What needs a third-party library is reached by its path, for example
``tokenscope.integrations.requests``.
"""

from tokenscope._core.current import (
    bind,
    check,
    current_scope,
    current_token,
    defer,
    fail_after,
    move_on_after,
    shield,
    sleep,
    use_token,
)
from tokenscope._core.errors import (
    BudgetExceeded,
    Cancelled,
    CommitRefused,
    DeadlineExceeded,
    ScopeClosed,
    StragglersLeft,
    TaskCancelled,
    TokenScopeError,
)
from tokenscope._core.mapping import ScopeMap
from tokenscope._core.reasons import CancelKind, CancelReason
from tokenscope._core.report import ScopeReport, ScopeSnapshot, TaskCounts, TaskSnapshot
from tokenscope._core.scope import ThreadScope
from tokenscope._core.task import Task
from tokenscope._core.token import CancellationToken, Registration
from tokenscope._core.workers import on_thread_release
from tokenscope.background import BackgroundFull, BackgroundScope
from tokenscope.instrument import InstrumentReport, UninstrumentReport, instrument, uninstrument
from tokenscope.observe import log as _log
from tokenscope.waiting import wait_any

__all__ = [
    "BackgroundFull",
    "BackgroundScope",
    "BudgetExceeded",
    "CancelKind",
    "CancelReason",
    "CancellationToken",
    "Cancelled",
    "CommitRefused",
    "DeadlineExceeded",
    "InstrumentReport",
    "Registration",
    "ScopeClosed",
    "ScopeMap",
    "ScopeReport",
    "ScopeSnapshot",
    "StragglersLeft",
    "Task",
    "TaskCancelled",
    "TaskCounts",
    "TaskSnapshot",
    "ThreadScope",
    "TokenScopeError",
    "UninstrumentReport",
    "__version__",
    "bind",
    "check",
    "current_scope",
    "current_token",
    "defer",
    "fail_after",
    "instrument",
    "move_on_after",
    "on_thread_release",
    "shield",
    "sleep",
    "uninstrument",
    "use_token",
    "wait_any",
]

__version__ = "0.1.0"

# Tracebacks and reprs should read `tokenscope.Cancelled`, wherever the class happens to live.
for _public in map(globals().__getitem__, __all__):
    if isinstance(_public, type):
        _public.__module__ = __name__
del _public, _log
