"""Reasons and errors: they pickle, they say what they mean, and bad input is refused at the call."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import decimal
import fractions
import pickle

import pytest

import tokenscope
from tokenscope import (
    BudgetExceeded,
    CancelKind,
    CancellationToken,
    Cancelled,
    CancelReason,
    CommitRefused,
    DeadlineExceeded,
    ScopeClosed,
    StragglersLeft,
    TaskCancelled,
    TokenScopeError,
)
from tokenscope._core.current import uninterruptible
from tokenscope._core.reasons import without_frames
from tokenscope.testing import drain


def raised_by(token):
    with pytest.raises(Cancelled) as caught:
        token.check()
    return caught.value


def cancelled_token(**how):
    token = CancellationToken(name="job")
    token.cancel("why", **how)
    return token


# --- reasons -------------------------------------------------------------------------------------------------------


def test_the_kinds_are_the_closed_list():
    """The kinds are these and no others, each equal to its word."""
    words = (
        "manual client_disconnected deadline sibling_failed body_failed race_lost scope_ended budget_exhausted shutdown"
        " interrupted stopped"
    )
    assert [str(kind) for kind in CancelKind] == words.split()
    assert CancelKind.DEADLINE == "deadline"


def test_a_reason_is_frozen_and_reads_well():
    """A reason cannot be changed, and its text is kind and message."""
    reason = cancelled_token().reason
    with pytest.raises(AttributeError):
        reason.message = "other"
    assert str(reason) == "manual: why"
    assert str(CancelReason(CancelKind.SHUTDOWN)) == "shutdown"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reasons_pickle(protocol):
    """A reason travels to another process whole."""
    reason = cancelled_token(kind="stopped", tag="t", cause=ValueError("v")).reason
    twin = pickle.loads(pickle.dumps(reason, protocol))
    assert isinstance(twin, CancelReason)
    assert (twin.kind, twin.message, twin.tag, twin.source, twin.at) == ("stopped", "why", "t", "job", reason.at)
    assert twin.cause.args == ("v",)
    assert copy.deepcopy(reason).message == "why"


class Unpicklable(Exception):
    """An error that holds something which cannot travel."""

    def __init__(self):
        super().__init__("local")
        self.handle = lambda: None


class Stubborn(Exception):
    """An error with a constructor of its own mind."""

    def __new__(cls, *, code):
        return super().__new__(cls)

    def __init__(self, *, code):
        self.code = code

    def __repr__(self):
        return f"Stubborn({self.code})"


def test_a_cause_that_cannot_travel_becomes_its_text():
    """A reason with an unpicklable cause pickles nevertheless, and says what it was."""
    reason = cancelled_token(cause=Unpicklable()).reason
    assert type(reason.cause) is Unpicklable
    twin = pickle.loads(pickle.dumps(reason))
    assert type(twin.cause) is RuntimeError
    assert "Unpicklable" in str(twin.cause)


def test_a_cause_is_kept_without_its_frames():
    """The twin of an error has its type, arguments and attributes, but no traceback, context or cause."""
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise OSError(2, "gone", "file") from inner
    except OSError as error:
        error.hint = "look elsewhere"
        twin = without_frames(error)
    assert (type(twin), twin.args, twin.errno, twin.filename, twin.hint) == (
        FileNotFoundError,
        (2, "gone"),
        2,
        "file",
        "look elsewhere",
    )
    assert twin.__traceback__ is twin.__context__ is twin.__cause__ is None
    assert without_frames(None) is None


def test_a_cause_that_cannot_be_copied_becomes_its_text():
    """An error class that refuses to be made again is told by its repr."""
    assert str(without_frames(Stubborn(code=7))) == "Stubborn(7)"


# --- errors --------------------------------------------------------------------------------------------------------


def errors():
    """One of each, as the library raises them."""
    reason = cancelled_token(cause=ValueError("v")).reason
    token = cancelled_token()
    return {
        "Cancelled": raised_by(token),
        "TokenScopeError": TokenScopeError("m"),
        "ScopeClosed": ScopeClosed("closed", reason),
        "TaskCancelled": TaskCancelled("task", reason),
        "StragglersLeft": StragglersLeft("left", {"a": "stack a"}),
        "BudgetExceeded": BudgetExceeded("b"),
        "CommitRefused": CommitRefused("c"),
        "DeadlineExceeded": DeadlineExceeded("late", reason),
    }


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("name", errors())
def test_errors_pickle(name, protocol):
    """Every error travels to another process, with reason, origin, stacks, notes and attributes."""
    error = errors()[name]
    error.add_note("a note")
    twin = pickle.loads(pickle.dumps(error, protocol))
    assert type(twin) is type(error) is getattr(tokenscope, name)
    assert str(twin) == str(error)
    assert twin.__notes__ == ["a note"]
    for field in ("origin", "stacks", "names"):
        assert getattr(twin, field, None) == getattr(error, field, None)
    if hasattr(error, "reason"):
        assert str(twin.reason) == str(error.reason)
        assert twin.reason.at == error.reason.at


def test_groups_of_cancelled_pickle():
    """A group with a Cancelled inside travels as well."""
    group = BaseExceptionGroup("all", [raised_by(cancelled_token()), ValueError(1)])
    twin = pickle.loads(pickle.dumps(group))
    assert [type(error) for error in twin.exceptions] == [Cancelled, ValueError]


def test_a_cancelled_from_another_process_is_nobodys():
    """A pickled Cancelled is not taken for the cancel of a token here, even of the one that it came from."""
    token = cancelled_token()
    error = pickle.loads(pickle.dumps(raised_by(token)))
    with pytest.raises(Cancelled):
        with token:
            raise error


def test_the_family_tree_of_errors():
    """Cancelled is no Exception; the others are; each is what its neighbours in the standard library expect."""
    assert not issubclass(Cancelled, Exception)
    for kind in (ScopeClosed, TaskCancelled, StragglersLeft, BudgetExceeded, CommitRefused):
        assert issubclass(kind, TokenScopeError)
    assert issubclass(TaskCancelled, concurrent.futures.CancelledError)
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert not issubclass(DeadlineExceeded, TokenScopeError)
    assert not issubclass(Cancelled, asyncio.CancelledError)


def test_errors_say_why():
    """Their texts contain the reason, the names and the stacks."""
    told = errors()
    assert str(told["Cancelled"]) == "manual: why"
    assert "manual: why" in str(told["ScopeClosed"])
    assert "manual: why" in str(told["TaskCancelled"])
    assert str(ScopeClosed("ended")) == "ended"
    assert str(TaskCancelled("ended")) == "ended"
    assert told["StragglersLeft"].names == ("a",)
    assert "stack a" in str(told["StragglersLeft"])


def test_tracebacks_name_the_front_door():
    """Errors show as tokenscope.Name, wherever their class lives."""
    for name in errors():
        assert getattr(tokenscope, name).__module__ == "tokenscope"


# --- bad input -----------------------------------------------------------------------------------------------------

DURATIONS = {
    "CancellationToken(timeout=...)": lambda value: CancellationToken(timeout=value),
    "child(timeout=...)": lambda value: CancellationToken().child(timeout=value),
    "NEVER.child(timeout=...)": lambda value: tokenscope.current_token().child(timeout=value),
    "linked(timeout=...)": lambda value: CancellationToken.linked(CancellationToken(), timeout=value),
    "wait(...)": CancellationToken().wait,
    "wait(...) of a cancelled token": lambda value: cancelled_token().wait(value),
    "sleep(...)": tokenscope.sleep,
    "token.sleep(...)": lambda value: CancellationToken().sleep(value),
    "fail_after(...)": tokenscope.fail_after,
    "move_on_after(...)": tokenscope.move_on_after,
    "shield(...)": tokenscope.shield,
    "uninterruptible(...)": uninterruptible,
    "drain(...)": drain,
}


@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("-inf"), -(10**400)], ids=str)
@pytest.mark.parametrize("where", DURATIONS)
def test_a_duration_that_is_none_is_refused_by_value(where, value):
    """Negative and NaN durations are a ValueError that shows the value, wherever a duration is taken."""
    with pytest.raises(ValueError, match="seconds"):
        DURATIONS[where](value)


@pytest.mark.parametrize("value", ["1", True, False, b"1", [1], 1j, decimal.Decimal(1), object], ids=str)
@pytest.mark.parametrize("where", DURATIONS)
def test_a_duration_that_is_no_number_is_refused_by_type(where, value):
    """What is no real number, a bool included, is a TypeError that shows the value."""
    with pytest.raises(TypeError, match="must be a number of seconds"):
        DURATIONS[where](value)


def test_any_real_number_is_a_duration():
    """Integers, floats and fractions will do."""
    assert 1 < CancellationToken(timeout=fractions.Fraction(5, 2)).remaining() <= 2.5
    assert CancellationToken(timeout=-0.0).cancelled


@pytest.mark.parametrize("where", ["sleep(...)", "token.sleep(...)"])
def test_a_sleep_needs_a_length(where):
    """sleep(None) is refused: for ever is wait()."""
    with pytest.raises(TypeError, match="None"):
        DURATIONS[where](None)


BAD = {
    "a name that is no str": (TypeError, lambda: CancellationToken(name=3)),
    "a child's name that is no str": (TypeError, lambda: CancellationToken().child(name=3)),
    "a linked token's name that is no str": (TypeError, lambda: CancellationToken.linked(name=3)),
    "linked() of something else": (TypeError, lambda: CancellationToken.linked(CancellationToken(), None)),
    "an unknown kind": (ValueError, lambda: CancellationToken().cancel(kind="bored")),
    "a kind that is no word": (ValueError, lambda: CancellationToken().cancel(kind=3)),
    "a kind that cannot be hashed": (ValueError, lambda: CancellationToken().cancel(kind=[])),
    "a message that is no str": (TypeError, lambda: CancellationToken().cancel(3)),
    "a tag that is no str": (TypeError, lambda: CancellationToken().cancel(tag=3)),
    "a cause that is no exception": (TypeError, lambda: CancellationToken().cancel(cause="e")),
    "a cause that is a class": (TypeError, lambda: CancellationToken().cancel(cause=ValueError)),
    "on_cancel of nothing": (TypeError, lambda: CancellationToken().on_cancel(None)),
    "on_cancel of a result": (TypeError, lambda: CancellationToken().on_cancel(3)),
    "on_cancel outside of all scopes": (TypeError, lambda: tokenscope.current_token().on_cancel(3)),
    "guard of no iterable": (TypeError, lambda: CancellationToken().guard(3)),
    "a limit's name that is no str": (TypeError, lambda: tokenscope.fail_after(1, name=3)),
    "another limit's name that is no str": (TypeError, lambda: tokenscope.move_on_after(1, name=3)),
    "use_token of no token": (TypeError, lambda: tokenscope.use_token(None)),
    "bind of no callable": (TypeError, lambda: tokenscope.bind(3)),
    "bind to no token": (TypeError, lambda: tokenscope.bind(print, "token")),
    "a positional timeout": (TypeError, lambda: CancellationToken(3)),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_at_the_call(what):
    """Wrong types and unknown words are errors of the call that brings them."""
    kind, call = BAD[what]
    with pytest.raises(kind):
        call()


def test_what_cannot_be_iterated_is_named_with_its_value():
    """Python's own words for it name neither the call nor the value."""
    with pytest.raises(TypeError, match=r"guard\(\) takes an iterable, not 3"):
        CancellationToken().guard(3)


def test_a_refused_cancel_cancels_nothing():
    """A cancel with a bad argument leaves the token live, and is refused on a cancelled token too."""
    token = CancellationToken()
    with pytest.raises(ValueError, match="client_disconnected"):
        token.cancel(kind="bored")
    assert not token.cancelled
    token.cancel()
    with pytest.raises(ValueError, match="bored"):
        token.cancel(kind="bored")
