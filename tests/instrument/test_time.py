"""`instrument("time")`: `time.sleep` inside of scopes, by name only, and exactly Python's own everywhere else."""

from __future__ import annotations

import math
import sys
import threading
import time
import types
from unittest import mock

import pytest
from peers import Attempt, blocked_in, wait_until

import tokenscope
from tokenscope import CancellationToken, Cancelled, shield, use_token

PLAIN = time.sleep


class Indexed:
    """A number that is neither int nor float, which `time.sleep` takes."""

    def __init__(self, value):
        self._value = value

    def __index__(self):
        return self._value


class Lazy:
    """Sets itself up when it is asked for anything, like Django's settings, and here it cannot."""

    def __getattribute__(self, name):
        raise RuntimeError(f"asked for {name}, and there is nothing to set it up with")


@pytest.fixture(autouse=True)
def _restored():
    yield
    tokenscope.uninstrument()
    assert time.sleep is PLAIN


def test_it_is_turned_on_by_name_only():
    """Without its name nothing of it is touched; with it the report says so, with Python's version."""
    assert "time" not in tokenscope.instrument().turned_on
    assert time.sleep is PLAIN
    report = tokenscope.instrument("time")
    assert report.turned_on == ("time",)
    assert report.versions["time"] == ".".join(str(number) for number in sys.version_info[:3])
    assert tokenscope.instrument("time").already_on == ("time",)
    assert time.sleep is not PLAIN
    assert tokenscope.uninstrument("time").turned_off == ("time",)
    assert time.sleep is PLAIN


@pytest.mark.parametrize("seconds", [3600, 3600.0, Indexed(3600), True], ids=["int", "float", "index", "bool"])
def test_a_sleep_under_a_token_ends_with_it(seconds):
    """It raises at the moment of the cancel, whatever kind of number it was given."""
    tokenscope.instrument("time")
    token = CancellationToken()
    attempt = Attempt(lambda: [time.sleep(seconds) for _ in range(3600)], token)
    wait_until(lambda: blocked_in(attempt.thread, "sleep"))
    token.cancel("stop")
    error = attempt.failure(3)
    assert isinstance(error, Cancelled)
    assert error.reason is token.reason


def test_it_is_a_checkpoint_even_for_no_time():
    """A legacy loop that polls with `sleep(0)` is stopped, too."""
    tokenscope.instrument("time")
    with use_token(CancellationToken()) as token:
        assert time.sleep(0) is None
        token.cancel("stop")
        with pytest.raises(Cancelled):
            time.sleep(0)
        with shield():
            time.sleep(0)


def test_it_sleeps_as_long_as_it_was_told():
    """Under a live token it is still a sleep."""
    tokenscope.instrument("time")
    with use_token(CancellationToken()):
        begun = time.monotonic()
        time.sleep(0.02)
        assert time.monotonic() - begun >= 0.02


def test_outside_of_any_scope_it_is_pythons_own():
    """Called with what it was given: no token's sleep stands between."""
    tokenscope.instrument("time")
    attempt = Attempt(lambda: time.sleep(0.2))
    wait_until(lambda: blocked_in(attempt.thread, "sleep"))
    assert not blocked_in(attempt.thread, "wait")
    assert attempt.value() is None


BAD = [-1, -0.001, math.nan, math.inf, 2**63, 10**400, "1", None, 1j, [], types.SimpleNamespace()]


@pytest.mark.parametrize("arguments", [*[(bad,) for bad in BAD], (), (1, 2)], ids=repr)
@pytest.mark.parametrize("token", [None, CancellationToken()], ids=["outside", "inside"])
def test_bad_arguments_get_pythons_own_errors(arguments, token):
    """The same type and the same words, inside of scopes and outside."""
    with pytest.raises((TypeError, ValueError, OverflowError)) as plain:
        PLAIN(*arguments)
    tokenscope.instrument("time")
    attempt = Attempt(lambda: time.sleep(*arguments), token)
    error = attempt.failure()
    assert (type(error), str(error)) == (type(plain.value), str(plain.value))


def test_a_keyword_is_refused_as_ever():
    """`time.sleep` takes none, inside of scopes neither."""
    tokenscope.instrument("time")
    with use_token(CancellationToken()), pytest.raises(TypeError, match="keyword"):
        time.sleep(seconds=0)


def test_it_still_looks_like_what_it_replaces():
    """Name, module and text are those of `time.sleep`, for whoever looks at them."""
    tokenscope.instrument("time")
    assert (time.sleep.__name__, time.sleep.__module__, time.sleep.__doc__) == ("sleep", "time", PLAIN.__doc__)


def test_names_that_were_bound_before_are_told(monkeypatch):
    """`from time import sleep` cannot be reached; the report and its line for the log name it."""
    legacy = types.ModuleType("legacy_of_ten_years_ago")
    exec("from time import sleep as nap", vars(legacy))
    monkeypatch.setitem(sys.modules, legacy.__name__, legacy)
    monkeypatch.setitem(sys.modules, "something_odd", None)
    report = tokenscope.instrument("time")
    assert "legacy_of_ten_years_ago.nap" in report.not_reached
    assert "not reached:" in str(report)
    assert "time.sleep" not in report.not_reached
    assert legacy.nap is PLAIN
    assert tokenscope.instrument("urllib3").not_reached == ()


def test_looking_for_such_names_wakes_nothing_lazy(monkeypatch):
    """A module may hold an object that must not be touched before its time."""
    holder = types.ModuleType("holder_of_a_lazy_object")
    holder.settings = Lazy()
    monkeypatch.setitem(sys.modules, holder.__name__, holder)
    assert tokenscope.instrument("time").turned_on == ("time",)


def test_a_name_bound_while_it_is_on_does_nothing_when_it_is_off():
    """Whoever imported our sleep keeps it: after `uninstrument` it is Python's in all but identity."""
    tokenscope.instrument("time")
    kept = time.sleep
    tokenscope.uninstrument()
    with use_token(CancellationToken()) as token:
        token.cancel("nobody listens")
        kept(0)


def test_a_sleep_that_somebody_had_replaced_before_is_called():
    """A mock counts its calls and is slept by nobody, between two checkpoints; and it is given back."""
    with mock.patch("time.sleep") as theirs:
        tokenscope.instrument("time")
        with use_token(CancellationToken()) as token:
            time.sleep(3600)
            theirs.side_effect = lambda _: token.cancel("meanwhile")
            with pytest.raises(Cancelled):
                time.sleep(3600)
            with pytest.raises(Cancelled):
                time.sleep(3600)
        assert theirs.call_count == 2
        tokenscope.uninstrument()
        assert time.sleep is theirs


def test_a_patch_on_top_of_ours_stays_and_is_told(caplog):
    """It is refused in the report and in the log, and ours below does nothing any more."""
    tokenscope.instrument("time")
    with mock.patch("time.sleep", wraps=time.sleep) as theirs:
        report = tokenscope.uninstrument("time")
        assert list(report.refused) == ["time.sleep"]
        assert "RestoreRefused" in caplog.text
        assert time.sleep is theirs
        with use_token(CancellationToken()) as token:
            token.cancel("nobody listens")
            time.sleep(0)
    tokenscope.uninstrument()  # the stranger has gone: now ours goes, too


def test_sleepers_wake_while_others_turn_it_on_and_off():
    """Flipping it beside running sleeps harms none: each ends with its token or in time."""
    token = CancellationToken()
    stop = threading.Event()

    def flip():
        for _ in range(20):
            tokenscope.instrument("time")
            tokenscope.uninstrument("time")

    def nap():
        while not stop.is_set():
            time.sleep(0.0005)

    napping = [Attempt(nap, token) for _ in range(3)]
    flipping = [Attempt(flip) for _ in range(2)]
    try:
        for attempt in flipping:
            attempt.value(30)
    finally:
        stop.set()
    for attempt in napping:
        attempt.value(5)
