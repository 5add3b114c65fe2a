"""Patches of other people's attributes: given back exactly, and never taken from a stranger."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from unittest import mock

import pytest

from tokenscope import observe
from tokenscope.integrations._patch import Patch, Patches, bound


class Victim:
    """Somebody else's class; its own answer is "theirs"."""

    def greet(self):
        return "theirs"


ORIGINAL = vars(Victim)["greet"]


@pytest.fixture
def patches():
    """Return patches by which `greet` answers "ours" around whatever was there; all is restored at the end."""

    def wrap(around):
        def greet(victim):
            inner = bound(around, victim)()
            return f"ours({inner})" if made.on else inner

        return greet

    made = Patches(Patch(Victim, "greet", wrap))
    yield made
    made.turn_off("test")
    Victim.greet = ORIGINAL


@contextmanager
def hearing():
    heard = []
    end = observe.subscribe(heard.append, observe.RestoreRefused)
    yield heard
    end()


def stranger(around):
    return lambda victim: f"stranger({around(victim)})"


def test_what_was_there_is_there_again(patches):
    """The very object, not one that looks like it; and turning off twice is turning off once."""
    assert patches.turn_on("test") is True
    assert patches.turn_on("test") is False
    assert Victim().greet() == "ours(theirs)"
    assert Victim.greet.__name__ == "greet"
    assert patches.turn_off("test") == (True, {})
    assert vars(Victim)["greet"] is ORIGINAL
    assert patches.turn_off("test") == (False, {})


def test_they_stay_while_anybody_holds_them(patches):
    """Two holders, and the first to go takes nothing from the second."""
    patches.turn_on("one")
    patches.turn_on("two")
    assert patches.turn_off("one") == (True, {})
    assert Victim().greet() == "ours(theirs)"
    patches.turn_off("two")
    assert vars(Victim)["greet"] is ORIGINAL


def test_a_stranger_on_top_is_left_there_and_told(patches):
    """Refused openly: returned, emitted once; and ours below theirs does nothing any more."""
    patches.turn_on("test")
    theirs = Victim.greet = stranger(Victim.greet)
    with hearing() as heard:
        held, refused = patches.turn_off("test")
        assert patches.turn_off("test") == (False, {})
    assert held
    assert list(refused) == [f"{__name__}.Victim.greet"]
    assert [(event.attribute, event.found) for event in heard] == list(refused.items())
    assert vars(Victim)["greet"] is theirs
    assert Victim().greet() == "stranger(theirs)"


def test_a_stranger_who_leaves_later_leaves_nothing_of_ours(patches):
    """They put ours back when they go; it is off, and the next turning off takes it away."""
    patches.turn_on("test")
    ours = Victim.greet
    Victim.greet = stranger(ours)
    patches.turn_off("test")
    Victim.greet = ours
    assert Victim().greet() == "theirs"
    patches.turn_off("test")
    assert vars(Victim)["greet"] is ORIGINAL


def test_what_was_uncovered_can_be_turned_on_again(patches):
    """One layer, used again, and gone for good after it."""
    patches.turn_on("test")
    ours = Victim.greet
    Victim.greet = stranger(ours)
    patches.turn_off("test")
    Victim.greet = ours
    patches.turn_on("test")
    assert Victim().greet() == "ours(theirs)"
    assert patches.turn_off("test") == (True, {})
    assert vars(Victim)["greet"] is ORIGINAL


def test_a_mock_that_came_and_went_is_no_stranger(patches):
    """Turned on before a mock and inside of it: on after it, and given back exactly."""
    patches.turn_on("test")
    with mock.patch.object(Victim, "greet", return_value="mocked"):
        assert Victim().greet() == "mocked"
        patches.turn_on("test")
        assert Victim().greet() == "ours(mocked)"
    assert Victim().greet() == "ours(theirs)"
    assert patches.turn_off("test") == (True, {})
    assert vars(Victim)["greet"] is ORIGINAL


def test_who_gives_the_original_back_for_us_is_no_stranger(patches):
    """Then there is nothing to restore, and nothing to complain about."""
    patches.turn_on("test")
    Victim.greet = ORIGINAL
    assert patches.turn_off("test") == (True, {})
    assert vars(Victim)["greet"] is ORIGINAL


def test_many_threads_turn_on_and_off(patches):
    """However they interleave, the last to go leaves the original."""
    gate = threading.Barrier(8)

    def flip(name):
        gate.wait(10)
        for _ in range(100):
            patches.turn_on(name)
            assert "theirs" in Victim().greet()
            patches.turn_off(name)

    threads = [threading.Thread(target=flip, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert vars(Victim)["greet"] is ORIGINAL
    assert not patches.on
