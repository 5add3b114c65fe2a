"""What the ledgers of one run add up to: a column of the receipt."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tokenscope.cli.demo_clients import Visit
    from tokenscope.cli.demo_desk import Job
    from tokenscope.cli.demo_model import Call

__all__ = ["SOON", "Figures", "Run", "figures_of"]

#: Seconds after a hang-up at which all work for that client should be over.
SOON = 1.0


@dataclass(frozen=True)
class Run:
    """What was recorded in one run, by clients, model and app."""

    visits: Sequence[Visit]
    calls: Sequence[Call]
    jobs: Sequence[Job]
    told: dict[int, str | None] = field(default_factory=dict)
    until: float = 0.0  # when it was over, monotonic


@dataclass(frozen=True)
class Figures:
    """One column of the receipt. ``after``: after the hang-up of the client concerned."""

    aborts: int
    left_while_thinking: int
    tokens_billed: int
    tokens_after: int
    seconds_after: float
    latency_p50_ms: float
    latency_p99_ms: float
    upstream_open_1s_after: int
    threads_working_1s_after: int
    orphans: int
    still_running_at_the_end: int
    stayed: int
    complete: int
    told_why: int


def figures_of(run: Run) -> Figures:
    """Add up one run."""
    left = {visit.plan.number: visit.hung_up for visit in run.visits if visit.hung_up is not None}
    stayed = [visit for visit in run.visits if visit.plan.leaves is None]
    calls = [(call, left[owner]) for call in run.calls if (owner := _owner(call.name)) in left]
    jobs = [(job, left[owner]) for job in run.jobs if (owner := _owner(job.name)) in left]
    latencies = sorted(_late(call.closed, gone, run.until) * 1000 for call, gone in calls)
    return Figures(
        aborts=len(left),
        left_while_thinking=sum(v.hung_up is not None and not v.saw_words for v in run.visits),
        tokens_billed=sum(len(call.tokens) for call in run.calls),
        tokens_after=sum(made > gone for call, gone in calls for made in call.tokens),
        seconds_after=sum(_late(job.ended, gone, run.until) for job, gone in jobs),
        latency_p50_ms=_percentile(latencies, 50),
        latency_p99_ms=_percentile(latencies, 99),
        upstream_open_1s_after=sum(_late(call.closed, gone, run.until) > SOON for call, gone in calls),
        threads_working_1s_after=sum(_late(job.ended, gone, run.until) > SOON for job, gone in jobs),
        orphans=_orphans(run.jobs),
        still_running_at_the_end=sum(job.ended is None for job in run.jobs)
        + sum(call.closed is None for call in run.calls),
        stayed=len(stayed),
        complete=sum(visit.complete for visit in stayed),
        told_why=sum(run.told.get(number) == "client_disconnected" for number in left),
    )


def _owner(name: str) -> int:
    """The client that a call or job is for."""
    return int(name.partition(".")[0])


def _late(ended: float | None, gone: float, until: float) -> float:
    """Seconds from the hang-up to the end, or to the end of the run for what did not end."""
    return max(0.0, (until if ended is None else ended) - gone)


def _percentile(values: Sequence[float], percent: int) -> float:
    """By nearest rank; 0 for nothing."""
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else 0.0


def _orphans(jobs: Iterable[Job]) -> int:
    """Helper threads that ran on after the request that started them had ended."""
    requests = {_owner(job.name): job.ended for job in jobs if job.name.endswith(".chat")}
    helpers = [job for job in jobs if job.name.endswith(".suggest")]
    ends = [(helper.ended, requests.get(_owner(helper.name))) for helper in helpers]
    return sum(request is not None and (helper is None or helper > request) for helper, request in ends)
