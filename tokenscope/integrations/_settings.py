"""What an app says once about all of its requests, checked when it says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tokenscope._core import clock
from tokenscope._core.scope import ThreadScope
from tokenscope.watch import HalfClose

__all__ = ["Methods", "Settings"]

Methods = Literal["safe", "all"]

#: What a hang-up cancels unasked: they change nothing, so nothing is left half done.
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of an app; see `RequestScopeMiddleware` for what each means.

    Raises:
        ValueError, TypeError: A bad value, named.
    """

    timeout: float | None = None
    half_close: HalfClose = "cancel"
    methods: Methods = "safe"
    max_threads: int | None = None
    grace: float = 5.0
    on_straggler: Literal["wait", "abandon", "interrupt"] = "wait"

    def __post_init__(self) -> None:
        _check_timeout(self.timeout)
        _check_word("half_close", self.half_close, get_args(HalfClose))
        _check_word("methods", self.methods, get_args(Methods))
        self.make_scope("a check of its arguments")

    def make_scope(self, name: str) -> ThreadScope:
        """A scope with these settings."""
        return ThreadScope(
            name=name,
            timeout=self.timeout,
            max_threads=self.max_threads,
            grace=self.grace,
            on_straggler=self.on_straggler,
        )

    def arms(self, method: str) -> bool:
        """Whether a hang-up cancels requests of this method, without the view saying so."""
        return self.methods == "all" or method in SAFE_METHODS


def _check_timeout(timeout: object) -> None:
    if clock.validate_timeout(timeout) == 0:
        raise ValueError("timeout must be more than 0 seconds, or None for no limit: 0 would end every request at once")


def _check_word(name: str, value: object, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ValueError(f"{name} must be {' or '.join(map(repr, words))}, not {value!r}")
