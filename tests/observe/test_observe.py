"""The public door to events, and how the log words them."""

from __future__ import annotations

import logging

import pytest

from tokenscope import ThreadScope, observe
from tokenscope._core import events


def test_a_listener_hears_until_it_unsubscribes():
    """`subscribe` is all it takes, and what it returns ends it."""
    heard = []
    unsubscribe = observe.subscribe(heard.append, observe.ScopeEnded)
    with ThreadScope(name="first"):
        pass
    unsubscribe()
    with ThreadScope(name="second"):
        pass
    assert [event.scope for event in heard] == ["first"]


STACK = '  File "a.py", line 1, in f\n    wait()\n'


@pytest.mark.parametrize(
    "event",
    [
        events.StragglerSeen("s", "slow", 5.0, STACK),
        events.CleanupOverran("s", "slow", STACK),
        events.Orphaned("s", {"slow": STACK}),
    ],
    ids=lambda event: type(event).__name__,
)
def test_stacks_are_logged_line_by_line_below_the_words(event, caplog):
    """Who reads the log sees a stack as Python prints it, not in quotes on one line."""
    with caplog.at_level(logging.WARNING, "tokenscope"):
        events.emit(event)
    first, *lines = caplog.messages[0].splitlines()
    assert "slow" in first
    assert "File" not in first
    assert lines[-2:] == STACK.splitlines()


def test_every_kind_of_event_is_at_the_public_door():
    """Whoever subscribes can name each kind that the core emits."""
    kinds = {name for name, kind in vars(events).items() if getattr(kind, "__module__", "") == events.__name__}
    kinds = {name for name in kinds if isinstance(getattr(events, name), type) and not name.startswith("_")}
    assert kinds <= set(observe.__all__)
