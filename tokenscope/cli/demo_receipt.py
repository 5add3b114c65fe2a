"""The receipt of the demo: both runs side by side, the promises, and how they are printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tokenscope.cli.demo_figures import SOON

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope.cli.demo_figures import Figures

__all__ = ["Receipt", "broken_promises"]

#: Milliseconds that the median may take. Far more than it does (the receipt prints what it did): it is judged
#: on whatever else the machine is busy with. On a quiet one it is a few milliseconds.
PROMPT_MS = 250.0
ABORTS_A_DAY = 100_000


ROWS: tuple[tuple[str, Callable[[Figures], float]], ...] = (
    ("tokens billed after the hang-up", lambda f: f.tokens_after),
    ("  per abort", lambda f: f.tokens_after / max(1, f.aborts)),
    ("seconds of work after the hang-up", lambda f: f.seconds_after),
    ("  per abort", lambda f: f.seconds_after / max(1, f.aborts)),
    ("ms from hang-up to upstream closed, p50", lambda f: f.latency_p50_ms),
    ("                                    p99", lambda f: f.latency_p99_ms),
    ("1 s later: upstream connections open", lambda f: f.upstream_open_1s_after),
    ("1 s later: threads at work for nobody", lambda f: f.threads_working_1s_after),
    ("orphans (threads that outlived their request)", lambda f: f.orphans),
    ("requests that learnt why they should stop", lambda f: f.told_why),
    ("clients that wanted the whole answer", lambda f: f.stayed),
    ("  and got it", lambda f: f.complete),
)


@dataclass(frozen=True)
class Receipt:
    """Both runs side by side."""

    server: str
    seed: int
    clients: int
    price: float  # USD for a million tokens
    without: Figures
    scoped: Figures

    @property
    def tokens_saved(self) -> float:
        """Per abort."""
        return (self.without.tokens_after - self.scoped.tokens_after) / max(1, self.without.aborts)

    @property
    def seconds_saved(self) -> float:
        """Per abort, of the app's threads."""
        return (self.without.seconds_after - self.scoped.seconds_after) / max(1, self.without.aborts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "server": self.server,
            "seed": self.seed,
            "clients": self.clients,
            "without": asdict(self.without),
            "with": asdict(self.scoped),
            "saved_per_abort": {"tokens": self.tokens_saved, "seconds": self.seconds_saved},
            "per_day": {
                "aborts": ABORTS_A_DAY,
                "tokens": self.tokens_saved * ABORTS_A_DAY,
                "thread_hours": self.seconds_saved * ABORTS_A_DAY / 3600,
                "usd": self.tokens_saved * ABORTS_A_DAY / 1e6 * self.price,
                "usd_per_million_tokens": self.price,
            },
            "broken_promises": broken_promises(self),
        }

    def as_text(self) -> str:
        """For people."""
        before, after = self.without, self.scoped
        who = f"{before.aborts} hung up, {before.left_while_thinking} of them while the model was thinking"
        lines = [
            f"{self.clients} clients on {self.server}, {who} (seed {self.seed})",
            "",
            _row("", "without", "with"),
            *(_row(what, _number(read(before)), _number(read(after))) for what, read in ROWS),
            "",
            f"Saved per abort: {self.tokens_saved:,.1f} tokens and {self.seconds_saved:,.2f} s of threads.",
            self._a_day(),
            "",
            self._verdict(),
        ]
        return "\n".join(lines)

    def _a_day(self) -> str:
        day = self.as_dict()["per_day"]
        return (
            f"At {ABORTS_A_DAY:,} aborts a day: {day['tokens']:,.0f} tokens"
            f" ({day['usd']:,.0f} USD at {self.price:g} USD a million)"
            f" and {day['thread_hours']:,.1f} hours of threads."
        )

    def _verdict(self) -> str:
        broken = broken_promises(self)
        if broken:
            return "\n".join(["PROMISES BROKEN:", *(f"- {promise}" for promise in broken)])
        return "Promises kept: owned, prompt, told, safe."


def _row(what: str, before: str, after: str) -> str:
    return f"{what:50}{before:>12}{after:>12}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if value >= 10 else f"{value:,.2f}"  # noqa: PLR2004


def broken_promises(receipt: Receipt) -> list[str]:
    """What did not hold with tokenscope, a sentence each; none if all is well."""
    figures = receipt.scoped
    checks = {
        f"owned: upstream connections open {SOON:g} s after the hang-up: {figures.upstream_open_1s_after}":
            figures.upstream_open_1s_after == 0,
        f"owned: threads at work {SOON:g} s after the hang-up: {figures.threads_working_1s_after}":
            figures.threads_working_1s_after == 0,
        f"owned: orphans: {figures.orphans}": figures.orphans == 0,
        f"owned: still running at the end: {figures.still_running_at_the_end}":
            figures.still_running_at_the_end == 0,
        f"prompt: half of the upstream calls took longer than {figures.latency_p50_ms:.1f} ms to close"
        f" (promised: {PROMPT_MS:g} ms)": figures.latency_p50_ms <= PROMPT_MS,
        f"told: {figures.told_why} of {figures.aborts} requests learnt that their client had gone":
            figures.told_why == figures.aborts,
        f"safe: {figures.complete} of the {figures.stayed} clients that stayed got their whole answer":
            figures.complete == figures.stayed,
        f"saved: {figures.tokens_after} tokens billed for nobody, more than half of the usual":
            figures.tokens_after <= receipt.without.tokens_after / 2 + figures.aborts,
        "nobody hung up, so nothing was shown": figures.aborts > 0,
    }  # fmt: skip
    return [promise for promise, held in checks.items() if not held]
