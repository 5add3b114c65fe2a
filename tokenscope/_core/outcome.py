"""How a scope's end becomes one outcome. A pure function of what happened; the first rule that matches wins.

1. An interrupt (``KeyboardInterrupt``, ``SystemExit``, ``GeneratorExit``) in body, join or cleanup: exactly it.
2. A cancel from above cut work short: `Cancelled`.
3. Failures of body, children, cleanups, stragglers: the body's own unchanged if it is the only one, a lone
   `StragglersLeft` bare, else one group with each failure once, the body's first.
4. The scope's own deadline cut work short: `DeadlineExceeded`; failures that began after it are notes.
5. Its own ``cancel()`` cut work short: absorbed.
6. A return.

Whatever is not raised is told: as a note on what is raised, and in the report.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenscope._core.errors import Cancelled, DeadlineExceeded, StragglersLeft
from tokenscope._core.reasons import CancelKind
from tokenscope._core.token import is_cut_of

if TYPE_CHECKING:
    from tokenscope._core.tree import Cut

__all__ = ["INTERRUPTS", "Ending", "Failure", "Verdict", "decide", "foresee", "one_line"]

INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)


@dataclass(frozen=True, slots=True)
class Failure:
    """One error, whose it is, and whether it began after the scope was cancelled."""

    source: str
    error: BaseException
    late: bool = False


@dataclass(slots=True)
class Ending:
    """All that matters for the outcome."""

    name: str
    body: BaseException | None = None
    interrupt: BaseException | None = None
    cut: Cut | None = None
    own: bool = False  # the cut began at the scope's own token
    cut_short: bool = False
    failures: list[Failure] = field(default_factory=list)  # children, cleanups, stragglers; in order

    @property
    def own_deadline(self) -> bool:
        """Whether the scope's own deadline cut its work short."""
        return self.own and self.cut_short and self.cut is not None and self.cut.reason.kind is CancelKind.DEADLINE


@dataclass(frozen=True, slots=True)
class Verdict:
    """``error`` is to be raised (None: nothing); ``absorbed`` if a cancel of the scope's own ended here."""

    word: str
    error: BaseException | None = None
    absorbed: bool = False


_SUCCEEDED = Verdict("succeeded")


def decide(ending: Ending) -> Verdict:
    """Apply the rules. Adds notes to the error that it picks. May be applied again when more has happened."""
    verdict = foresee(ending)
    if verdict.error is not None:
        _note_the_rest(verdict.error, ending)
    return verdict


def foresee(ending: Ending) -> Verdict:
    """The verdict as things stand, without notes: what cleanups are told."""
    if ending.body is None and ending.cut is None and ending.interrupt is None and not ending.failures:
        return _SUCCEEDED
    ending.body = _without_cancels(ending.body, ending.cut)
    interrupt = ending.interrupt or (ending.body if isinstance(ending.body, INTERRUPTS) else None)
    if interrupt is not None:
        return Verdict("interrupted", interrupt)
    cut = ending.cut
    if cut is not None and ending.cut_short and not ending.own:
        return Verdict("cancelled", _as_cancelled(ending.body, cut))
    failures = _failures_that_count(ending)
    if failures:
        return Verdict("failed", _as_one(failures, ending))
    if cut is not None and ending.own_deadline:
        late = DeadlineExceeded(f"scope {ending.name!r} was cut short by its deadline", cut.reason)
        late.__cause__ = ending.body
        return Verdict("deadline", late)
    if cut is not None and ending.cut_short:
        return Verdict("cancelled", absorbed=True)
    return Verdict("succeeded")


def _without_cancels(error: BaseException | None, cut: Cut | None) -> BaseException | None:
    """A group that mixes failures with this very cancel: the failures."""
    if not isinstance(error, BaseExceptionGroup) or is_cut_of(error, cut):
        return error
    _cancels, rest = error.split(lambda inner: is_cut_of(inner, cut))
    return rest


def _as_cancelled(body: BaseException | None, cut: Cut) -> BaseException:
    """The body's own `Cancelled`, or a new one; one made from a group of them names it as its cause."""
    if isinstance(body, Cancelled) and is_cut_of(body, cut):
        return body
    error = cut.as_error()
    if is_cut_of(body, cut):
        error.__cause__ = body
    return error


def _failures_that_count(ending: Ending) -> list[BaseException]:
    """Each failure once, the body's first; without those that only followed from the scope's own deadline."""
    errors = [f.error for f in ending.failures if not (f.late and ending.own_deadline)]
    if ending.body is not None and not is_cut_of(ending.body, ending.cut):
        errors.insert(0, ending.body)
    return list({id(error): error for error in errors}.values())


def _as_one(errors: list[BaseException], ending: Ending) -> BaseException:
    if len(errors) == 1 and (errors[0] is ending.body or isinstance(errors[0], StragglersLeft)):
        return errors[0]
    what = "1 failure" if len(errors) == 1 else f"{len(errors)} failures"
    return BaseExceptionGroup(f"{what} in scope {ending.name!r}", errors)


def _note_the_rest(error: BaseException, ending: Ending) -> None:
    told = {id(error)}
    if isinstance(error, BaseExceptionGroup):
        told.update(id(inner) for inner in error.exceptions)
    for failure in ending.failures:
        if id(failure.error) not in told:
            _add_note(error, f"also in scope {ending.name!r}: {failure.source}: {one_line(failure.error)}")
    if ending.body is not None and id(ending.body) not in told and not is_cut_of(ending.body, ending.cut):
        _add_note(error, f"also in scope {ending.name!r}: body: {one_line(ending.body)}")


def one_line(error: BaseException) -> str:
    """What it is, what it says and where it was raised: for a note, where a traceback would be too long."""
    said = str(error).partition("\n")[0]
    words = f"{type(error).__name__}: {said}" if said else type(error).__name__
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:  # it was never raised, or comes from another process
        return words
    frame, line = frames[-1]
    return f"{words} ({frame.f_code.co_filename}:{line} in {frame.f_code.co_qualname})"


def _add_note(error: BaseException, note: str) -> None:
    if note not in getattr(error, "__notes__", ()):  # a step that was cut off by an interrupt is done again
        error.add_note(note)
