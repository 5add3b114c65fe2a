"""Tokens one by one: flags, reasons, deadlines, waiting, guarded iteration and boundaries."""

from __future__ import annotations

import gc
import time
import weakref
from itertools import count

import pytest
from actors import WAIT, until
from crowd import Runner, crowd, on_thread

import tokenscope
from tokenscope import CancelKind, CancellationToken, Cancelled, DeadlineExceeded

# --- cancelling ----------------------------------------------------------------------------------------------------


def test_a_new_token_is_live():
    """A token that nobody cancelled says so everywhere, and its checkpoint returns."""
    token = CancellationToken()
    token.check()
    assert (token.cancelled, token.reason, token.deadline, token.remaining()) == (False, None, None, None)
    assert not token.cancelled_caught


def test_only_the_first_cancel_wins():
    """The call that cancelled returns True and its reason stays; every later one returns False and changes nothing."""
    token = CancellationToken()
    assert token.cancel("first", kind="stopped", tag="a") is True
    reason = token.reason
    assert token.cancel("second") is False
    assert token.reason is reason
    assert (reason.message, reason.kind, reason.tag) == ("first", "stopped", "a")


def test_a_reason_tells_everything_that_was_said():
    """Kind, message, tag, source, cause and wall-clock time of a cancel are all in the reason."""
    before = time.time()
    token = CancellationToken(name="order-7")
    token.cancel("enough", kind=CancelKind.BUDGET_EXHAUSTED, tag="gpt", cause=ValueError("too much"))
    reason = token.reason
    assert reason.kind is CancelKind.BUDGET_EXHAUSTED
    assert (reason.message, reason.tag, reason.source) == ("enough", "gpt", "order-7")
    assert type(reason.cause) is ValueError
    assert reason.cause.args == ("too much",)
    assert before <= reason.at <= time.time()


def test_a_kind_given_as_a_plain_word_becomes_the_enum_member():
    """A kind may be written as its word; the reason holds the member."""
    token = CancellationToken()
    token.cancel(kind="shutdown")
    assert token.reason.kind is CancelKind.SHUTDOWN


def test_the_kind_is_manual_unless_said():
    """A cancel without a word is a manual one with an empty message."""
    token = CancellationToken()
    token.cancel()
    assert (token.reason.kind, token.reason.message, token.reason.tag) == (CancelKind.MANUAL, "", None)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_cause_does_not_keep_its_stack_alive(grouped):
    """The token keeps the exception but none of the frames that it came through, not even those inside a group."""

    class Heavy:
        pass

    def fail():
        heavy = Heavy()
        seen.append(weakref.ref(heavy))
        raise KeyError("x")

    seen = []
    token = CancellationToken()
    try:
        fail()
    except KeyError as error:
        token.cancel(cause=ExceptionGroup("all", [error]) if grouped else error)
    gc.collect()
    assert seen[0]() is None
    kept = token.reason.cause.exceptions[0] if grouped else token.reason.cause
    assert kept.__traceback__ is None
    assert kept.args == ("x",)


def test_a_checkpoint_raises_again_and_again():
    """Swallowing a Cancelled once does not save you: each checkpoint raises, with the token's reason and origin."""
    parent = CancellationToken(name="root")
    token = parent.child().child(name="leaf")
    parent.cancel("stop")
    for _ in range(3):
        with pytest.raises(Cancelled) as caught:
            token.check()
        assert caught.value.reason is parent.reason
        assert caught.value.origin == "root"


def test_a_checkpoint_needs_no_lock():
    """A check returns or raises while another thread holds the tree's lock."""
    live, dead = CancellationToken(), CancellationToken()
    dead.cancel()
    with live._tree.enter(), dead._tree.enter():
        assert on_thread(lambda: (live.check(), live.cancelled, dead.reason.kind))[1:] == (False, "manual")
        with pytest.raises(Cancelled):
            on_thread(dead.check)


# --- deadlines -----------------------------------------------------------------------------------------------------


def test_a_timeout_of_zero_cancels_at_once():
    """timeout=0 makes a token that is born cancelled by its deadline."""
    for token in (
        CancellationToken(timeout=0, name="now"),
        CancellationToken().child(timeout=0, name="now"),
        CancellationToken.linked(CancellationToken(), timeout=0.0, name="now"),
    ):
        assert token.reason.kind is CancelKind.DEADLINE
        assert token.reason.source == "now"


@pytest.mark.parametrize("timeout", [None, float("inf"), 10**400])
def test_infinite_time_is_no_deadline(timeout):
    """None, inf and integers beyond all floats mean no deadline."""
    assert CancellationToken(timeout=timeout).deadline is None
    assert CancellationToken().child(timeout=timeout).remaining() is None


def test_a_deadline_is_a_monotonic_time_ahead():
    """The deadline is now plus the timeout, and remaining() counts down to it."""
    before = time.monotonic()
    token = CancellationToken(timeout=100)
    assert before + 100 <= token.deadline <= time.monotonic() + 100
    assert 99 < token.remaining() <= 100


def test_a_childs_deadline_is_never_later():
    """Descendants inherit the earliest deadline above them, and may only make it earlier."""
    parent = CancellationToken(timeout=50)
    assert parent.child().deadline == parent.deadline
    assert parent.child(timeout=80).deadline == parent.deadline
    assert parent.child(timeout=None).child(timeout=10).deadline < parent.deadline
    other = CancellationToken(timeout=20)
    assert CancellationToken.linked(parent, other, CancellationToken()).deadline == other.deadline


def test_remaining_never_falls_below_zero():
    """Once the time is up there are exactly 0 seconds left."""
    token = CancellationToken(timeout=0.001)
    assert token.wait(WAIT)
    assert token.remaining() == 0.0


def test_a_deadline_cancels_without_anybody_asking():
    """The timer cancels a token when its time is up, with kind deadline, and all below it with the same reason."""
    parent = CancellationToken(timeout=0.02, name="job")
    child = parent.child()
    until(lambda: child.cancelled)
    assert child.reason is parent.reason
    assert (child.reason.kind, child.reason.source) == (CancelKind.DEADLINE, "job")


def test_whoever_sees_the_time_run_out_cancels():
    """A wait that ends at the deadline finds the token cancelled, whether or not the timer came first."""
    for _ in range(50):
        root = CancellationToken(timeout=0.002)
        token = root.child().child()
        assert token.wait() is True
        assert root.reason.kind is CancelKind.DEADLINE
        assert time.monotonic() >= root.deadline


# --- waiting -------------------------------------------------------------------------------------------------------


def test_wait_says_whether_the_token_was_cancelled():
    """wait() returns False when its own time is up, True when the token is cancelled, and never raises Cancelled."""
    token = CancellationToken()
    assert token.wait(0) is False
    assert token.wait(0.001) is False
    token.cancel()
    assert token.wait() is True


def test_a_cancel_wakes_everybody_who_waits():
    """All threads blocked in wait() and sleep() on a token and its descendants return at the cancel."""
    token = CancellationToken()
    children = [token.child() for _ in range(4)]
    runners = [Runner(lambda c=c: c.wait(WAIT)) for c in children]
    sleeper = Runner(lambda: children[0].sleep(WAIT))
    until(lambda: all(c._more is not None and c._more.wakes is not None for c in children))
    started = time.monotonic()
    token.cancel()
    assert all(runner.result() for runner in runners)
    with pytest.raises(Cancelled):
        sleeper.result()
    assert time.monotonic() - started < WAIT / 2


def test_a_sleep_sleeps():
    """An undisturbed sleep takes its time and returns."""
    token = CancellationToken()
    started = time.monotonic()
    token.sleep(0.02)
    assert time.monotonic() - started >= 0.02


def test_a_sleep_is_a_checkpoint_even_for_no_time():
    """sleep(0) on a cancelled token raises."""
    token = CancellationToken()
    token.sleep(0)
    token.cancel()
    with pytest.raises(Cancelled):
        token.sleep(0)


def test_a_sleep_longer_than_the_deadline_ends_there():
    """A sleep past the deadline raises Cancelled at the deadline: it never returns early as if it had slept."""
    for _ in range(20):
        token = CancellationToken(timeout=0.003).child()
        with pytest.raises(Cancelled) as caught:
            token.sleep(WAIT)
        assert caught.value.reason.kind is CancelKind.DEADLINE


def test_waiting_leaves_nothing_behind():
    """After many waits on a long-lived token it still holds no waiter."""
    token = CancellationToken()
    for _ in range(200):
        token.wait(0)
    wakes = token._more.wakes
    assert len(wakes.refs) <= 1


# --- guarded iteration ---------------------------------------------------------------------------------------------


class Source:
    """An endless iterator that remembers being closed."""

    def __init__(self):
        self.items = count()
        self.closed = 0

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.items)

    def close(self):
        self.closed += 1


def test_guard_passes_items_on_until_the_cancel():
    """A guarded iteration yields the source's items, and raises at the first item after the cancel."""
    token = CancellationToken()
    source = Source()
    seen = []
    with pytest.raises(Cancelled):
        for item in token.guard(source):
            seen.append(item)
            if item == 2:
                token.cancel()
    assert seen == [0, 1, 2]
    assert source.closed == 1


def test_guard_closes_the_source_only_when_cancelled():
    """A source that simply ends is not closed by the guard; one without close() is no problem."""
    token = CancellationToken()
    closed = []

    def source():
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    assert list(token.guard(source())) == [1, 2]
    assert list(token.guard([1, 2])) == [1, 2]
    token.cancel()
    with pytest.raises(Cancelled):
        next(token.guard([1]))


def test_guarding_under_a_cancelled_token_reads_nothing():
    """With a cancelled token the first next() raises and closes, before the source was asked for anything."""
    token = CancellationToken()
    token.cancel()
    source = Source()
    with pytest.raises(Cancelled):
        next(token.guard(source))
    assert (next(source.items), source.closed) == (0, 1)


# --- boundaries ----------------------------------------------------------------------------------------------------


def test_a_token_in_a_with_statement_is_current_there():
    """Inside `with token:` it is the current token, and before and after it is not."""
    token = CancellationToken()
    outside = tokenscope.current_token()
    with token as same:
        assert same is token
        assert tokenscope.current_token() is token
    assert tokenscope.current_token() is outside


def test_a_boundary_absorbs_its_own_cancel():
    """Work cut short by the token's own cancel ends quietly at its boundary, which says so."""
    token = CancellationToken()
    with token:
        token.child().cancel()
        token.cancel()
        tokenscope.check()
        pytest.fail("the checkpoint must raise")
    assert token.cancelled_caught


def test_a_boundary_turns_its_own_deadline_into_an_error():
    """Work cut short by the token's own deadline leaves as DeadlineExceeded, a TimeoutError with the reason."""
    token = CancellationToken(timeout=0.005)
    with pytest.raises(DeadlineExceeded) as caught:
        with token:
            tokenscope.sleep(WAIT)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.reason is token.reason
    assert isinstance(caught.value.__cause__, Cancelled)


def test_a_boundary_lets_the_cancel_of_an_ancestor_pass():
    """A Cancelled that belongs to a boundary further out goes on to that one."""
    outer = CancellationToken()
    with outer:
        inner = outer.child()
        with pytest.raises(Cancelled):
            with inner:
                outer.cancel()
                tokenscope.check()
        assert not inner.cancelled_caught
        tokenscope.check()
    assert outer.cancelled_caught


def test_a_boundary_lets_the_deadline_of_an_ancestor_pass():
    """The exception belongs to the deadline that fired: the outer one's surfaces at the outer boundary only."""
    outer = CancellationToken(timeout=0.005)
    inner = outer.child(timeout=60)
    with pytest.raises(DeadlineExceeded) as caught:
        with outer:
            with inner:
                tokenscope.sleep(WAIT)
    assert caught.value.reason.source == outer.name


def test_a_cancelled_that_was_swallowed_still_counts():
    """A body that swallows its Cancelled does not end as a success: a cancel is told, a deadline raised."""
    token = CancellationToken()
    with token:
        token.cancel()
        with pytest.raises(Cancelled):
            tokenscope.check()
    assert token.cancelled_caught
    late = CancellationToken(timeout=0)
    with pytest.raises(DeadlineExceeded):
        with late:
            with pytest.raises(Cancelled):
                tokenscope.check()


def test_a_body_that_finished_in_time_returns_normally():
    """A cancel or deadline that cut nothing short is no outcome."""
    token = CancellationToken()
    with token:
        token.cancel()
    assert not token.cancelled_caught
    with CancellationToken(timeout=0):
        pass


def test_an_error_of_the_body_passes_a_cancelled_boundary():
    """An exception of the body's own is never replaced by the boundary's cancel or deadline."""
    for token in (CancellationToken(), CancellationToken(timeout=0)):
        token.cancel()
        with pytest.raises(ZeroDivisionError):
            with token:
                raise ZeroDivisionError


def test_a_group_of_nothing_but_its_own_cancel_is_absorbed():
    """A boundary absorbs a group in which every exception is its own Cancelled, and no other group."""
    token = CancellationToken()
    token.cancel()

    def cancelled():
        with pytest.raises(Cancelled) as caught:
            token.check()
        return caught.value

    with token:
        raise BaseExceptionGroup("all", [cancelled(), BaseExceptionGroup("more", [cancelled()])])
    assert token.cancelled_caught
    with pytest.raises(BaseExceptionGroup):
        with token:
            raise BaseExceptionGroup("mixed", [cancelled(), ValueError()])


def test_a_boundary_can_be_entered_by_many_threads_and_again():
    """One token may be entered several times, nested and on several threads, each leaving its own entry."""
    token = CancellationToken()

    def enter_twice():
        with token:
            with token:
                assert tokenscope.current_token() is token
            assert tokenscope.current_token() is token
        assert tokenscope.current_token() is not token

    with crowd(*[lambda: [enter_twice() for _ in range(200)] for _ in range(4)]):
        enter_twice()
    assert token._more.entered == []


def test_leaving_a_token_that_was_not_entered_is_an_error():
    """__exit__ without __enter__ is refused in words."""
    with pytest.raises(RuntimeError, match="more often"):
        CancellationToken().__exit__(None, None, None)


# --- telling -------------------------------------------------------------------------------------------------------


def test_a_token_tells_its_name_and_state():
    """Name is what was given or something made up; repr shows name, state and time left."""
    token = CancellationToken(timeout=100, name="search")
    assert token.name == "search"
    assert repr(token).startswith("<CancellationToken search, live, ")
    token.cancel()
    assert "cancelled: manual" in repr(token)
    assert CancellationToken().name.startswith("token-")


def test_two_tokens_are_equal_only_if_they_are_one():
    """Tokens compare and hash by identity."""
    one, other = CancellationToken(name="a"), CancellationToken(name="a")
    assert one != other
    assert len({one, other, one}) == 2
