"""What is current: the ambient token, the boundaries that change it, and the rule by which it is put back."""

from __future__ import annotations

import contextvars
import threading
import time

import pytest
from actors import WAIT
from crowd import Runner, on_thread

import tokenscope
from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    ThreadScope,
    bind,
    check,
    current_scope,
    current_token,
    defer,
    fail_after,
    move_on_after,
    shield,
    sleep,
    use_token,
)
from tokenscope._core.current import effective_token, standing_back, uninterruptible
from tokenscope._core.token import NEVER, attach

# --- outside -------------------------------------------------------------------------------------------------------


def test_outside_nothing_is_cancelled():
    """Without a scope the current token is a constant that never ends: checks and sleeps return."""
    assert current_token() is NEVER
    assert current_token() is on_thread(current_token)
    check()
    sleep(0)
    assert (NEVER.cancelled, NEVER.reason, NEVER.deadline, NEVER.remaining()) == (False, None, None, None)
    assert NEVER.wait(0.001) is False
    assert list(NEVER.guard([1])) == [1]


def test_the_token_outside_cannot_be_cancelled_or_entered():
    """Cancelling it, or making it a boundary, is an error that says what to do instead."""
    with pytest.raises(RuntimeError, match="nothing to cancel"):
        NEVER.cancel("no")
    with pytest.raises(RuntimeError, match="cannot be entered"):
        with NEVER:
            pass


def test_a_child_of_the_token_outside_is_a_root():
    """child() and linked() of it make tokens with no parent."""
    child = NEVER.child(timeout=50, name="job")
    assert child._up is None
    assert child.name == "job"
    assert child.remaining() > 40
    assert CancellationToken.linked(NEVER)._parents() == ()


def test_registering_on_the_token_outside_keeps_nothing():
    """A callback on it is never called and not kept; so is a waiter."""
    registration = NEVER.on_cancel(int)
    assert registration.close() is False
    assert attach(NEVER, registration) is True
    assert NEVER._more is None


@pytest.mark.parametrize("ask", [current_scope, lambda: defer(int)])
def test_asking_for_a_scope_where_there_is_none_is_an_error_with_help(ask):
    """current_scope() and defer() outside of any scope say how to open one."""
    with pytest.raises(LookupError, match="ThreadScope"):
        ask()


def test_the_scope_is_found_in_body_and_children():
    """current_scope() is the scope in its body and in its children."""
    with ThreadScope() as scope:
        assert current_scope() is scope
        assert scope.spawn(current_scope).result(WAIT) is scope
    with pytest.raises(LookupError):
        current_scope()


# --- use_token -----------------------------------------------------------------------------------------------------


def test_use_token_makes_it_current_and_puts_the_old_one_back():
    """In the block the token is current; after it, whatever was before."""
    outer, inner = CancellationToken(), CancellationToken()
    with use_token(outer) as mine:
        assert current_token() is mine is outer
        with use_token(inner.child()):
            pass
        assert current_token() is outer
    assert current_token() is NEVER


@pytest.mark.parametrize("which", [0, 1])
def test_use_token_adds_to_the_current_token(which):
    """A foreign token is joined with the current one: a cancel of either reaches the block."""
    tokens = CancellationToken(), CancellationToken()
    with use_token(tokens[0]):
        with use_token(tokens[1]):
            tokens[which].cancel()
            with pytest.raises(Cancelled) as caught:
                check()
            assert caught.value.reason is tokens[which].reason


def test_use_token_of_a_descendant_needs_no_joining():
    """A token below the current one is used as it is."""
    outer = CancellationToken()
    inner = outer.child().child()
    with use_token(outer), use_token(inner):
        assert current_token() is inner


def test_use_token_of_an_ancestor_does_not_lose_the_current_one():
    """Going up to an ancestor leaves the nearer token's cancel in force."""
    outer = CancellationToken()
    inner = outer.child()
    with use_token(inner), use_token(outer):
        inner.cancel()
        with pytest.raises(Cancelled):
            check()


def test_use_token_is_no_boundary():
    """A Cancelled passes it, also of its own token, and it can be used again."""
    token = CancellationToken()
    block = use_token(token)
    with block:
        pass
    token.cancel()
    with pytest.raises(Cancelled):
        with block:
            check()


def test_effective_token_adds_the_explicit_one():
    """What the library runs under is the current token together with an explicit one."""
    one, two = CancellationToken(), CancellationToken()
    assert effective_token(None) is NEVER
    assert effective_token(one) is one
    with use_token(one):
        assert effective_token(None) is one
        both = effective_token(two)
        one.cancel()
        assert both.reason is one.reason


# --- deadlines -----------------------------------------------------------------------------------------------------


def test_fail_after_raises_when_its_time_cut_work_short():
    """The block ends in DeadlineExceeded with the token's reason, within its time."""
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        with fail_after(0.01, name="quick") as token:
            sleep(WAIT)
    assert caught.value.reason is token.reason
    assert caught.value.reason.source == "quick"
    assert time.monotonic() - started < WAIT / 2


def test_fail_after_leaves_a_quick_body_alone():
    """A body that ends in time, or whose time ran out after its last checkpoint, returns normally."""
    with fail_after(WAIT) as token:
        sleep(0)
    assert not token.cancelled
    with fail_after(0):
        pass


def test_move_on_after_goes_on():
    """After move_on_after the program goes on, and the token tells whether work was cut short."""
    with move_on_after(0.01) as token:
        sleep(WAIT)
    assert token.cancelled_caught
    with move_on_after(WAIT) as token:
        pass
    assert not token.cancelled_caught


def test_the_tighter_of_two_deadlines_wins_and_surfaces_as_itself():
    """An inner deadline is never later than the outer; the exception comes from the one that fired."""
    with pytest.raises(DeadlineExceeded) as caught:
        with fail_after(0.01, name="outer"):
            with move_on_after(WAIT, name="inner") as inner:
                sleep(WAIT)
            pytest.fail("the outer deadline passes the inner boundary")
    assert caught.value.reason.source == "outer"
    assert not inner.cancelled_caught
    with fail_after(WAIT, name="outer"):
        with pytest.raises(DeadlineExceeded, match="inner"):
            with fail_after(0.01, name="inner"):
                sleep(WAIT)
        check()


def test_an_outer_cancel_passes_an_inner_deadline():
    """A cancel from outside is no deadline of the block."""
    token = CancellationToken()
    with pytest.raises(Cancelled):
        with use_token(token), move_on_after(WAIT):
            token.cancel()
            check()


def test_a_boundary_is_entered_once():
    """The same boundary object cannot be entered again, or left without having been entered."""
    boundary = fail_after(1)
    with boundary:
        pass
    with pytest.raises(RuntimeError, match="entered before"):
        boundary.__enter__()
    with pytest.raises(RuntimeError, match="without"):
        move_on_after(1).__exit__(None, None, None)


# --- shields -------------------------------------------------------------------------------------------------------


def test_a_shield_holds_a_cancel_off():
    """Inside the shield checkpoints return although everything around is cancelled; after it the next one raises."""
    token = CancellationToken()
    with pytest.raises(Cancelled) as caught:
        with use_token(token):
            token.cancel("now")
            with shield() as inner:
                check()
                sleep(0)
                assert current_token() is inner
            check()
    assert caught.value.reason is token.reason


def test_a_shield_has_a_time_limit_of_its_own():
    """What outstays the shield is cut short by the shield's deadline."""
    token = CancellationToken()
    token.cancel()
    with use_token(token):
        with pytest.raises(DeadlineExceeded, match="shield"):
            with shield(0.01):
                sleep(WAIT)
    with shield() as inner:
        assert 25 < inner.remaining() <= 30
    with shield(None) as inner:
        assert inner.deadline is None


def test_uninterruptible_is_a_shield_that_others_respect():
    """In it this thread stands back from interruption, to any depth, and other threads do not."""
    assert not standing_back()
    with uninterruptible() as token:
        assert token.deadline is None
        assert standing_back()
        assert not on_thread(standing_back)
        with uninterruptible(5):
            assert standing_back()
        assert standing_back()
    assert not standing_back()


def test_uninterruptible_ends_with_its_block_whatever_happened():
    """An error, or a limit of its own, leaves the thread interruptible again."""
    with pytest.raises(ZeroDivisionError):
        with uninterruptible():
            raise ZeroDivisionError
    assert not standing_back()
    with pytest.raises(DeadlineExceeded):
        with uninterruptible(0.005):
            sleep(WAIT)
    assert not standing_back()


def test_uninterruptible_ends_for_the_thread_that_entered_it():
    """Left on another thread (a generator's close), it ends for the one that entered, and harms no other block."""

    def stream():
        with uninterruptible():
            yield standing_back()

    source = stream()
    assert contextvars.copy_context().run(next, source)

    def close():
        with uninterruptible():
            source.close()
            return standing_back()

    assert on_thread(close)
    assert not standing_back()


# --- bind ----------------------------------------------------------------------------------------------------------

color = contextvars.ContextVar("color", default="none")


def test_bind_takes_context_and_token_along():
    """A bound target in a bare thread sees the context variables and the token of where it was bound, and returns."""
    color.set("blue")
    token = CancellationToken()
    with use_token(token):
        bound = bind(lambda x: (current_token() is token, color.get(), color.set("red"), x, color.get()))
    same, seen, _, argument, after = on_thread(lambda: bound(7))
    assert (same, seen, argument, after) == (True, "blue", 7, "red")
    assert color.get() == "blue"
    color.set("none")


def test_the_own_cancelled_ends_a_bound_thread_quietly():
    """A Cancelled of the bound token ends the thread as if it had returned; any other error passes."""
    token = CancellationToken()
    started = threading.Event()

    @bind
    def outside():
        return current_token()

    def work():
        started.set()
        sleep(WAIT)

    runner = Runner(bind(work, token))
    assert started.wait(WAIT)
    token.cancel()
    assert runner.result() is None
    assert outside() is NEVER
    assert outside.__name__ == "outside"
    foreign = CancellationToken()
    foreign.cancel()
    with pytest.raises(Cancelled):
        on_thread(bind(foreign.check, CancellationToken()))
    with pytest.raises(ZeroDivisionError):
        on_thread(bind(lambda: 1 / 0, token))


def test_an_explicit_token_of_bind_is_added():
    """bind(fn, token) obeys both the token given and the one that was current."""
    outer, extra = CancellationToken(), CancellationToken()
    with use_token(outer):
        bound = bind(lambda: current_token().wait(WAIT), extra)
    outer.cancel()
    assert on_thread(bound) is True


# --- putting back --------------------------------------------------------------------------------------------------


def boundaries():
    """Every way to make a token current."""
    return {
        "token": CancellationToken,
        "use_token": lambda: use_token(CancellationToken()),
        "fail_after": lambda: fail_after(60),
        "shield": shield,
        "uninterruptible": uninterruptible,
        "scope": ThreadScope,
    }


@pytest.mark.parametrize("kind", boundaries())
def test_a_boundary_around_a_yield_may_be_left_anywhere(kind):
    """Entered by next() in one thread and context, left by close() in another: nothing raises or stays current."""
    make = boundaries()[kind]

    def stream():
        with make():
            yield current_token()
            yield current_token()

    source = stream()
    inside = contextvars.copy_context().run(next, source)
    assert inside is not NEVER
    assert on_thread(lambda: contextvars.copy_context().run(next, source)) is not None
    assert on_thread(lambda: (source.close(), current_token())[1]) is NEVER
    assert current_token() is NEVER
    assert on_thread(standing_back) is False


@pytest.mark.parametrize("kind", boundaries())
def test_what_somebody_else_made_current_is_left_alone(kind):
    """A boundary that is left where another token has become current does not overwrite that one."""
    make = boundaries()[kind]

    def stream():
        with make():
            yield

    mine = CancellationToken()
    before = tokenscope._core.ambient.token_var.get()
    source = stream()
    next(source)
    tokenscope._core.ambient.token_var.set(mine)
    source.close()
    assert current_token() is mine
    tokenscope._core.ambient.token_var.set(before)
    tokenscope._core.ambient.owner_var.set(None)
