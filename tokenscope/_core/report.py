"""What a scope tells when it has ended."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenscope._core.reasons import CancelReason

__all__ = ["ScopeReport", "ScopeSnapshot", "TaskCounts", "TaskSnapshot"]


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """How many tasks a scope had, and how they ended."""

    spawned: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    never_started: int = 0


@dataclass(frozen=True, slots=True)
class ScopeReport:
    """The receipt of a scope. Times in seconds.

    Attributes:
        name: The scope's name.
        outcome: ``succeeded``, ``failed``, ``cancelled``, ``deadline``, ``interrupted``; ``running`` before the end.
        reason: Why it was cancelled, if it was (also when the cancel came too late to cut anything short).
        tasks: How many, and how they ended.
        errors: Everything that was raised by body, children and cleanups, in full.
        effects: Writes to the outside that upper floors registered.
        stragglers: Tasks that were late after the cancel, with their stacks then.
        orphans: Those that were given up.
        interrupted: Those in whose functions `Cancelled` was raised by force, which may be stragglers or not.
        late_events: What happened after the cancel, by kind: results, chunks, spawns, charges.
        duration: From entering to leaving.
        stop_duration: From the cancel to the end of the last child; None without a cancel.
        post_cancel_work: Summed run time of the children's own code after the cancel, cleanups excluded.
    """

    name: str
    outcome: str
    reason: CancelReason | None = None
    tasks: TaskCounts = field(default_factory=TaskCounts)
    errors: tuple[BaseException, ...] = ()
    effects: tuple[Any, ...] = ()
    stragglers: Mapping[str, str] = field(default_factory=dict)
    orphans: tuple[str, ...] = ()
    interrupted: tuple[str, ...] = ()
    late_events: Mapping[str, int] = field(default_factory=dict)
    duration: float = 0.0
    stop_duration: float | None = None
    post_cancel_work: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for a log or JSON; exceptions as their text, ``post_cancel_work`` also in milliseconds."""
        reason = self.reason
        return {
            "name": self.name,
            "outcome": self.outcome,
            "reason": reason and {"kind": str(reason.kind), "tag": reason.tag, "source": reason.source},
            "tasks": {slot: getattr(self.tasks, slot) for slot in TaskCounts.__slots__},
            "errors": [repr(error) for error in self.errors],
            "effects": [str(effect) for effect in self.effects],
            "stragglers": sorted(self.stragglers),
            "orphans": list(self.orphans),
            "interrupted": list(self.interrupted),
            "late_events": dict(self.late_events),
            "duration": self.duration,
            "stop_duration": self.stop_duration,
            "post_cancel_work_ms": self.post_cancel_work * 1000,
        }

    def to_json(self) -> str:
        """`as_dict` as one line of JSON."""
        return json.dumps(self.as_dict(), sort_keys=True)


@dataclass(frozen=True, slots=True)
class TaskSnapshot:
    """A task as it was at one moment; ``age`` in seconds since it started to run, None while it is queued."""

    name: str
    kind: str | None
    state: str
    age: float | None


@dataclass(frozen=True, slots=True)
class ScopeSnapshot:
    """A scope and its tasks as they were at one moment; ``remaining`` in seconds."""

    name: str
    state: str
    reason: CancelReason | None
    remaining: float | None
    tasks: tuple[TaskSnapshot, ...]
