"""Trees of tokens: depth, breadth, links between trees, who keeps whom, and memory."""

from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
import weakref
from contextlib import contextmanager

import pytest
from actors import WAIT, until
from crowd import Runner

from tokenscope import CancellationToken, Cancelled
from tokenscope._core.timer import timer
from tokenscope._core.token import attach

DEEP = 10_000
MANY = 100_000


def chain(length, link=CancellationToken.child):
    """A root and its descendants, one below the other."""
    tokens = [CancellationToken(name="root")]
    for _ in range(length):
        tokens.append(link(tokens[-1]))
    return tokens


@contextmanager
def flat_memory(blocks=3_000):
    """At the end of the block hardly more memory is in use than at its beginning (counted in allocations)."""
    gc.collect()
    before = sys.getallocatedblocks()
    yield
    gc.collect()
    assert sys.getallocatedblocks() - before < blocks


# --- the cancel's way down -----------------------------------------------------------------------------------------


def test_a_cancel_reaches_all_descendants_and_nobody_else():
    """Cancelling a token marks what lies below it; its parent and siblings live on."""
    root = CancellationToken()
    left, right = root.child(), root.child()
    below = [left.child().child() for _ in range(3)]
    left.cancel()
    assert left.cancelled
    assert all(token.reason is left.reason for token in below)
    assert not root.cancelled
    assert not right.cancelled
    root.cancel("later")
    assert right.reason is root.reason
    assert left.reason is not root.reason


def test_a_child_of_a_cancelled_token_is_born_cancelled():
    """A child made too late has its parent's reason from the start; so has a linked one."""
    token = CancellationToken()
    _older = token.child()  # a parent that has a child takes another way to its second
    token.cancel()
    assert token.child().reason is token.reason
    childless = CancellationToken()
    childless.cancel()
    assert childless.child().reason is childless.reason
    assert token.child(timeout=60).reason is token.reason
    assert CancellationToken.linked(CancellationToken(), token).reason is token.reason


def test_a_late_link_brings_the_cancel_to_the_callbacks_too():
    """A child whose link was put off, for its tree was held elsewhere, is told all when it is linked."""
    parent, other = CancellationToken(), CancellationToken()
    parent.cancel()
    held, let_go, calls, made = threading.Event(), threading.Event(), [], []

    def hold():
        with parent._tree.lock:
            held.set()
            assert let_go.wait(WAIT)

    class InTheMiddle:
        """Its hash is asked for inside a locked section, as a finalizer may run there."""

        def __hash__(self):
            made.append(parent.child())
            let_go.set()
            holder.result()
            made[0].on_cancel(calls.append, 1)
            return 1

        def wake(self):
            raise AssertionError("nobody cancels the other tree")

    holder = Runner(hold)
    assert held.wait(WAIT)
    attach(other, InTheMiddle())
    assert made[0].reason is parent.reason
    assert calls == [1]
    assert not parent._tree.pinned


def test_everything_is_marked_before_the_first_callback():
    """When the first callback runs, every descendant of the whole subtree is cancelled already."""
    root = CancellationToken()
    tokens = [root.child().child() for _ in range(20)] + [CancellationToken.linked(root)]
    seen = []
    for token in tokens:
        token.on_cancel(lambda: seen.append(all(t.cancelled for t in tokens)))
    root.cancel()
    assert seen == [True] * 21


def test_a_chain_of_ten_thousand_works():
    """Create, cancel, check, raise and drop a chain 10,000 deep: nothing in it is recursive."""
    tokens = chain(DEEP)
    tokens[-1].check()
    called = []
    tokens[-1].on_cancel(called.append, 1)
    tokens[0].cancel()
    assert all(token.cancelled for token in tokens)
    with pytest.raises(Cancelled) as caught:
        tokens[-1].check()
    assert caught.value.origin == "root"
    assert called == [1]
    leaf = weakref.ref(tokens[-1])
    del tokens, caught
    gc.collect()
    assert leaf() is None


def test_a_chain_of_ten_thousand_linked_tokens_works():
    """The same with every token in a tree of its own: the walk crosses 10,000 trees, and so do the pins."""
    tokens = chain(DEEP, CancellationToken.linked)
    called = []
    tokens[-1].on_cancel(called.append, 1)
    root, leaf = tokens[0], weakref.ref(tokens[-1])
    del tokens
    gc.collect()
    assert leaf() is not None
    root.cancel()
    assert called == [1]
    assert not root._tree.pinned
    gc.collect()
    assert leaf() is None


def test_closing_the_only_callback_frees_a_chain_of_linked_tokens():
    """Registering pins 10,000 linked trees up to the root; closing takes every pin back."""
    tokens = chain(DEEP, CancellationToken.linked)
    registration = tokens[-1].on_cancel(print)
    assert all(token._tree.pinned for token in tokens)
    registration.close()
    assert not any(token._tree.pinned for token in tokens)


def test_a_lattice_of_linked_tokens_is_walked_once():
    """40 levels of diamonds have 2**40 paths: neither the cancel nor the pins take them all."""
    root = CancellationToken()
    top = root
    keep = []
    for _ in range(40):
        sides = CancellationToken.linked(top), CancellationToken.linked(top)
        keep.append(sides)
        top = CancellationToken.linked(*sides)
    top.on_cancel(print).close()
    assert not root._tree.pinned
    called = []
    top.on_cancel(called.append, 1)
    root.cancel()
    assert called == [1]
    with pytest.raises(Cancelled):
        top.check()


# --- linked tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_a_linked_token_obeys_both_parents(first):
    """Whichever parent is cancelled first, the linked token gets that one's reason and keeps it."""
    parents = CancellationToken(), CancellationToken().child()
    token = CancellationToken.linked(*parents)
    below = token.child()
    parents[first].cancel("first")
    parents[1 - first].cancel("second")
    assert token.reason is parents[first].reason
    assert below.reason is token.reason


def test_a_linked_token_can_be_cancelled_alone():
    """Its own cancel does not climb to its parents."""
    parents = CancellationToken(), CancellationToken()
    token = CancellationToken.linked(*parents)
    token.cancel()
    assert not any(parent.cancelled for parent in parents)


def test_a_linked_token_without_parents_is_a_root():
    """linked() of nothing is an ordinary token."""
    token = CancellationToken.linked()
    assert token.cancel()
    assert CancellationToken.linked(token, token).reason is token.reason


def test_the_name_of_the_origin_crosses_trees():
    """A Cancelled raised below a linked token names the token where cancel() was called."""
    parent = CancellationToken(name="here")
    token = CancellationToken.linked(CancellationToken(), parent).child()
    parent.cancel()
    with pytest.raises(Cancelled) as caught:
        token.check()
    assert caught.value.origin == "here"


def test_linking_never_leaks_into_a_long_lived_parent():
    """100,000 tokens linked to a shutdown token that lives for ever leave nothing there."""
    shutdown = CancellationToken()
    for _ in range(100):
        CancellationToken.linked(shutdown, CancellationToken())
    with flat_memory():
        for _ in range(MANY):
            CancellationToken.linked(shutdown, CancellationToken())
    assert len(shutdown._down.refs) < 100


def test_cancelled_requests_leave_nothing_at_their_parent():
    """Linked children that were cancelled, had callbacks, and were dropped are gone from the parent's tree."""
    shutdown = CancellationToken()
    gone = []
    for _ in range(100):
        token = CancellationToken.linked(shutdown, CancellationToken())
        token.on_cancel(int)
        token.cancel()
        gone.append(weakref.ref(token))
    del token
    gc.collect()
    assert not any(ref() for ref in gone)
    assert not shutdown._tree.pinned
    assert not shutdown._tree.unfinished


def test_the_parents_of_a_linked_token_live_as_long_as_it_does():
    """A child keeps its parents: a parent's deadline still reaches it when nobody else holds the parent."""
    token = CancellationToken.linked(CancellationToken(timeout=0.02), CancellationToken())
    gc.collect()
    assert token.wait(WAIT)


# --- who keeps whom ------------------------------------------------------------------------------------------------


def test_a_dropped_child_is_gone():
    """A parent does not keep a child that its user dropped, without any garbage collection."""
    root = CancellationToken()
    child = root.child().child()
    gone = weakref.ref(child)
    del child
    assert gone() is None


@pytest.mark.parametrize("link", [CancellationToken.child, CancellationToken.linked])
def test_a_callback_on_a_dropped_child_still_fires(link):
    """Who registers on a temporary token is called all the same when the root is cancelled."""
    root = CancellationToken()
    called = []
    link(link(root)).on_cancel(called.append, 1)
    gc.collect()
    root.cancel()
    assert called == [1]


def test_a_callback_on_a_dropped_token_with_a_deadline_still_fires():
    """The timer keeps a root that nobody holds, because there are callbacks in its tree."""
    called = []
    CancellationToken(timeout=0.02).child().on_cancel(called.append, 1)
    gc.collect()
    until(lambda: called == [1])


def test_a_callback_below_a_dropped_link_with_a_deadline_still_fires():
    """Pins climb through linked trees up to whoever can still cancel: here the alarm of a dropped root."""
    called = []
    CancellationToken.linked(CancellationToken.linked(CancellationToken(timeout=0.02))).on_cancel(called.append, 1)
    gc.collect()
    until(lambda: called == [1])


def test_a_closed_registration_lets_its_token_go():
    """A child is kept for its registration's sake, and not a moment longer."""
    root = CancellationToken()
    child = root.child()
    one, two = child.on_cancel(int), child.on_cancel(int)
    gone = weakref.ref(child)
    del child
    one.close()
    gc.collect()
    assert gone() is not None
    two.close()
    del one, two
    gc.collect()
    assert gone() is None
    assert not root._tree.pinned
    assert not root._tree.keeper


def test_a_called_registration_lets_its_token_go():
    """After a cancel nothing is pinned any more."""
    root = CancellationToken()
    child = root.child()
    child.on_cancel(int)
    gone = weakref.ref(child)
    child.cancel()
    del child
    gc.collect()
    assert gone() is None
    assert not root._tree.pinned


def test_a_root_with_callbacks_that_nobody_can_cancel_is_collected():
    """A registration does not keep a tree for ever: dropped with nobody left to cancel it, it is garbage."""
    root = CancellationToken()
    root.child().on_cancel(int)
    gone = weakref.ref(root)
    del root
    gc.collect()
    assert gone() is None


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 3600])
def test_a_hundred_thousand_dropped_children_leave_no_memory(timeout):
    """Children made and dropped under a living parent leave its memory flat, also with an hour's deadline each."""
    root = CancellationToken()
    for _ in range(1_000):
        root.child(timeout=timeout)
    with flat_memory():
        for _ in range(MANY):
            root.child(timeout=timeout)
    assert len(timer.heap) < 1_000


def test_dropped_children_with_callbacks_leave_no_memory():
    """The same where each child had a waiter and a registration that was closed."""
    root = CancellationToken()

    def use():
        child = root.child()
        with child.on_cancel(int):
            child.wait(0)

    for _ in range(200):
        use()
    with flat_memory():
        for _ in range(10_000):
            use()
    assert not root._tree.pinned


def test_a_child_takes_at_most_250_bytes():
    """100,000 living children cost no more than 250 bytes each, their place at the parent included."""
    root = CancellationToken()
    keep = [None] * MANY
    gc.collect()
    tracemalloc.start()
    for i in range(MANY):
        keep[i] = root.child()
    taken, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / MANY <= 250


def test_children_made_and_dropped_at_once_do_not_grow_the_parent():
    """Holding many children and dropping them all gives their places at the parent free with the next ones."""
    root = CancellationToken()
    for _ in range(3):
        keep = [root.child() for _ in range(1_000)]
        del keep
    survivor = root.child()
    assert len(root._down.refs) == 1
    assert not survivor.cancelled
