"""What holds for every wait of `tokenscope.sync`, whatever is waited for."""

from __future__ import annotations

import threading

import pytest
from waits import WAIT, WAYS, Waiting, until

from tokenscope import CancellationToken, Cancelled, DeadlineExceeded, ThreadScope, fail_after, use_token
from tokenscope._core.current import uninterruptible
from tokenscope.sync._line import Desk


@pytest.fixture(params=WAYS, ids=lambda make: make.__name__)
def way(request):
    return request.param()


def test_a_cancel_ends_the_wait(way):
    """A blocked thread leaves with the reason of its own token."""
    waiting = way.start()
    waiting.token.cancel("enough", tag="test")
    with pytest.raises(Cancelled) as caught:
        waiting.end()
    assert caught.value.reason is waiting.token.reason
    assert way.blocked() == 0


def test_a_cancel_wakes_nobody_else(way):
    """Of two threads that wait, the one that is not cancelled goes on waiting, and gets what comes."""
    first, second = way.start(), way.start()
    first.token.cancel()
    with pytest.raises(Cancelled):
        first.end()
    assert second.waits()
    assert way.blocked() == 1
    way.release()
    second.end()


def test_what_a_cancelled_thread_was_about_to_get_goes_to_the_next(way, monkeypatch):
    """A turn that was handed out just before the cancel is passed on, never lost."""
    woken, go_on, token = threading.Event(), threading.Event(), CancellationToken()
    sleep = Desk.sleep

    def sleep_and_dawdle(desk, line, turn, listened, end):
        sleep(desk, line, turn, listened, end)
        if listened is token:
            woken.set()
            go_on.wait(WAIT)

    monkeypatch.setattr(Desk, "sleep", sleep_and_dawdle)
    first = way.start(token)
    second = way.start()
    way.release()
    assert woken.wait(WAIT)
    token.cancel()
    go_on.set()
    with pytest.raises(Cancelled):
        first.end()
    second.end()


def test_who_came_first_is_served_first(way):
    """Those who wait come through in the order in which they came."""
    if way.release.__name__ == "set":
        pytest.skip("an event lets all of them go")
    waitings = [way.start() for _ in range(3)]
    for position, waiting in enumerate(waitings):
        way.release()
        waiting.end()
        assert way.blocked() == len(waitings) - position - 1


def test_a_cancelled_thread_does_not_wait_at_all(way):
    """A wait is a checkpoint: whoever is cancelled already takes nothing, even if it is there."""
    way.release()
    token = CancellationToken()
    token.cancel()
    with use_token(token), pytest.raises(Cancelled):
        way.wait()


def test_the_time_is_up(way):
    """Without a cancel `timeout` means what it means in the standard library, 0 seconds too."""
    for timeout in (0, 0.01):
        if way.timed_out is False:
            assert way.wait(timeout=timeout) is False
        else:
            with pytest.raises(way.timed_out):
                way.wait(timeout=timeout)
    assert way.blocked() == 0


def test_a_deadline_ends_the_wait(way):
    """A wait ends with the deadline around it, which is told as such."""
    with pytest.raises(DeadlineExceeded), fail_after(0.01):
        way.wait()
    assert way.blocked() == 0


def test_an_explicit_token_counts_too(way):
    """`token=` is added to the current token: either of them ends the wait."""
    for which in ("explicit", "current"):
        explicit = CancellationToken()
        waiting = way.start(listening_to=explicit)
        (explicit if which == "explicit" else waiting.token).cancel(which)
        with pytest.raises(Cancelled, match=which):
            waiting.end()


def test_a_token_that_is_none_is_refused(way):
    """A bad `token=` is an error at the call."""
    with pytest.raises(TypeError, match="token must be a CancellationToken"):
        way.wait(token="no token")


def test_it_stands_back_where_nothing_may_be_cut(way):
    """In a cleanup neither the current token nor an explicit one ends a wait."""
    token = CancellationToken()

    def wait():
        with uninterruptible():
            return way.wait(token=token)

    before = way.blocked()
    waiting = Waiting(wait, token)
    until(lambda: way.blocked() > before)
    token.cancel()
    assert waiting.waits()
    way.release()
    waiting.end()


def test_a_scope_is_left_with_everybody_waiting(way):
    """The threads of a scope that is cancelled come back from their waits, all of them."""
    with ThreadScope() as scope:
        for _ in range(5):
            scope.spawn(way.wait)
        until(lambda: way.blocked() == 5)
        scope.cancel()
    assert scope.report.tasks.cancelled == 5
    assert way.blocked() == 0
