"""Plays contests, round by round, and makes results of what comes out."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
import traceback
from typing import TYPE_CHECKING

from bench._table import Contest, Result, Row, Size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bench._table import Round


def in_turn(passes: int = 1, **contenders: Callable[[], float] | None) -> Round:
    """A round of everybody, one after the other; who begins changes from pass to pass. None: not here.

    Of several passes the best value counts: for what is so short that an interruption is most of what it would measure.
    """
    order = [(name.replace("_", " "), play) for name, play in contenders.items() if play is not None]

    def play_all() -> dict[str, float]:
        values: dict[str, list[float]] = {name: [] for name, _ in order}
        for _ in range(passes):
            order.append(order.pop(0))
            for name, play in order:
                gc.collect()
                values[name].append(play())
        return {name: min(found) for name, found in values.items()}

    return play_all


def woven(blocks: int, **contenders: Callable[[], int]) -> Round:
    """A round of rates: each contender does a block of work ``blocks`` times, alternating; work per second.

    Each returns how much it did. Short blocks, close to each other: other work on the machine hits all alike.
    """
    names = list(contenders)

    def play_all() -> dict[str, float]:
        spent, done = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for turn in range(blocks):
            for name in names if turn % 2 else reversed(names):
                start = time.perf_counter()
                done[name] += contenders[name]()
                spent[name] += time.perf_counter() - start
        return {name: done[name] / spent[name] for name in names}

    return play_all


def per_loop(loop: Callable[[int], object], count: int, scale: float = 1e9) -> Callable[[], float]:
    """Time one turn of ``loop(count)``, in nanoseconds."""

    def once() -> float:
        start = time.perf_counter()
        loop(count)
        return (time.perf_counter() - start) * scale / count

    return once


def percentile(values: Iterable[float], share: float) -> float:
    """The value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(rows: Iterable[Row], size: Size) -> Iterator[Result]:
    """Play the contests of these rows; results in their order."""
    for contest, group in itertools.groupby(rows, key=lambda row: row.contest):
        same = list(group)
        try:
            with contest(size) as made:
                values = _play(made, size)
        except Exception as error:  # one broken row must not hide the others
            traceback.print_exc()
            yield from (Result(row, note=f"broken: {error!r}") for row in same)
            continue
        yield from (_judge(row, values, made) for row in same)


def _play(contest: Contest, size: Size) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for _ in range(min(contest.rounds or size.rounds, size.rounds)):
        gc.collect()
        for name, value in contest.play().items():
            values.setdefault(name, []).append(value)
    return values


def _judge(row: Row, values: dict[str, list[float]], contest: Contest) -> Result:
    medians = {name: statistics.median(found) for name, found in values.items()}
    if row.ours not in medians:
        return Result(row, note=contest.missing[row.ours])
    result = Result(row, ours=medians[row.ours])
    if row.peer in values:
        pairs = zip(values[row.ours], values[row.peer], strict=True)
        result.ratio = statistics.median(ours / peer for ours, peer in pairs)
        result.peer = medians[row.peer]
    result.also = {name: medians[name] for name in row.also if name in medians}
    named = (row.ours, row.peer, *row.also)
    result.rounds = {name: found for name, found in values.items() if name in named}
    result.note = "; ".join(why for name, why in contest.missing.items() if name in named)
    result.met = row.bar.met(result.ours or 0.0, result.ratio)
    return result
