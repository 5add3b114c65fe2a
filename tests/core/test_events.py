"""Events: frozen records handed to whoever asked, at no risk to what they tell of."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from actors import hearing

from tokenscope import CancellationToken
from tokenscope._core import events


def test_a_listener_hears_the_kinds_it_asked_for():
    """Only the kinds named at subscribe() arrive, and none after unsubscribing."""
    heard = []
    unsubscribe = events.subscribe(heard.append, events.ScopeOpened, events.CallbackFailed)
    events.emit(events.ScopeOpened("a"))
    events.emit(events.TaskSpawned("a", "b"))
    unsubscribe()
    unsubscribe()
    events.emit(events.ScopeOpened("b"))
    assert heard == [events.ScopeOpened("a")]


def test_a_listener_that_subscribed_twice_hears_twice_and_leaves_one_by_one():
    """Each subscription is its own, whatever the listener."""
    heard = []
    first = events.subscribe(heard.append, events.ScopeOpened)
    second = events.subscribe(heard.append, events.ScopeOpened)
    events.emit(events.ScopeOpened("both"))
    first()
    first()
    events.emit(events.ScopeOpened("one"))
    second()
    events.emit(events.ScopeOpened("none"))
    assert [event.scope for event in heard] == ["both", "both", "one"]


def test_nobody_listening_costs_one_look():
    """wants() tells whether an event need be made at all."""
    assert not events.wants(events.TokenCancelled)
    with hearing(events.TokenCancelled):
        assert events.wants(events.TokenCancelled)
    assert not events.wants(events.TokenCancelled)


def test_a_cancel_is_told_once_where_it_began():
    """TokenCancelled names the token that was cancelled and carries the reason, once for the whole subtree."""
    root = CancellationToken(name="root")
    children = [root.child() for _ in range(3)]
    with hearing(events.TokenCancelled) as heard:
        root.cancel("why")
        children[0].cancel()
    (event,) = heard.queue
    assert (event.token, event.reason) == ("root", root.reason)


def test_an_error_in_a_listener_disturbs_nobody(monkeypatch):
    """It goes to sys.unraisablehook; the other listeners hear the event, and what it tells of goes on."""
    told, heard = [], []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    def fail(_event):
        raise ValueError("listener")

    ends = [events.subscribe(fail, events.TokenCancelled), events.subscribe(heard.append, events.TokenCancelled)]
    token = CancellationToken()
    assert token.cancel() is True
    for end in ends:
        end()
    assert [str(hook.exc_value) for hook in told] == ["listener"]
    assert len(heard) == 1


@pytest.mark.parametrize(("listener", "kinds"), [("no", (events.ScopeOpened,)), (print, ())])
def test_a_bad_subscription_is_refused(listener, kinds):
    """A listener must be callable, and say what it wants to hear."""
    with pytest.raises(TypeError):
        events.subscribe(listener, *kinds)


def test_events_are_frozen():
    """A listener cannot change what the next one hears."""
    event = events.ScopeOpened("a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.scope = "b"


def test_every_event_is_exported_and_says_what_it_means():
    """Each kind is in __all__ and has a docstring; what must not pass in silence is among them."""
    kinds = [v for v in vars(events).values() if isinstance(v, type) and issubclass(v, events.Event)]
    assert len(kinds) > 10
    for kind in kinds:
        assert kind.__name__ in events.__all__
        assert kind.__doc__
        assert not kind.__doc__.startswith(kind.__name__ + "(")
    assert set(events.PROBLEMS) <= set(kinds)


def test_an_error_in_what_was_put_off_is_told():
    """What a signal handler wanted, done after it has returned, cannot raise there: it becomes an event."""
    token = CancellationToken()

    def fail():
        raise ValueError("late")

    token._tree.inbox.append(fail)
    with hearing(events.ThreadFailed) as heard:
        token.child()
    assert str(heard.get_nowait().error) == "late"
    assert not token._tree.inbox
