"""Problems are logged: whatever is not raised to anybody must at least be readable.

Logger ``tokenscope``. Everything that went wrong where no caller could be told is an error or a warning there; one
line per cancelled request is an info. To silence or redirect it, configure that logger.
"""

from __future__ import annotations

import logging
from typing import Any

from tokenscope._core import events

__all__ = ["logger"]

logger = logging.getLogger("tokenscope")


def _log_problem(event: Any) -> None:
    error = getattr(event, "error", None)
    level = logging.ERROR if error is not None else logging.WARNING
    trace = (type(error), error, error.__traceback__) if error is not None else None
    logger.log(level, "%s", _describe(event), exc_info=trace)


def _describe(event: Any) -> str:
    """The words of the event: its kind, every field that is not the error itself, and below them the stacks."""
    names = (name for name in type(event).__slots__ if name not in ("error", "stack", "stacks"))
    fields = [f"{name}={getattr(event, name)}" for name in names]
    stacks = getattr(event, "stacks", {})
    if stacks:
        fields.append(f"tasks={', '.join(stacks)}")
    lines = [f"{type(event).__name__}: {' '.join(fields)}"]
    if hasattr(event, "stack"):
        lines.append(event.stack.rstrip())
    lines += [f"--- {task}\n{stack.rstrip()}" for task, stack in stacks.items()]
    return "\n".join(lines)


def _log_request(event: events.RequestCancelled) -> None:
    report = event.report
    reason = report.reason
    logger.info(
        "request cancelled: endpoint=%s status=%d reason=%s stop_ms=%.1f post_cancel_work_ms=%.1f orphans=%d"
        " late_events=%d",
        event.endpoint,
        event.status,
        reason.kind if reason is not None else None,
        (report.stop_duration or 0.0) * 1000,
        report.post_cancel_work * 1000,
        len(report.orphans),
        sum(report.late_events.values()),
    )


events.subscribe(_log_problem, *events.PROBLEMS)
events.subscribe(_log_request, events.RequestCancelled)
