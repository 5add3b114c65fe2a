"""A KeyboardInterrupt at every line of the core: whatever was cut off is finished by whoever comes next.

A tracer raises it at the first line that runs beneath an operation, then at the second, and so on until the operation
gets through unharmed. After each, one more operation is done on the tree; then everything must be as if nothing had
happened.
"""

from __future__ import annotations

import gc
import sys
import threading
import traceback
from pathlib import Path

import pytest
from actors import WAIT, until
from crowd import on_thread

import tokenscope
from tokenscope import CancellationToken
from tokenscope._core import workers
from tokenscope._core.timer import THREAD_NAME, timer
from tokenscope._core.token import attach, detach, expire_if_due
from tokenscope.testing import drain

CORE = str(Path(tokenscope.__file__).parent / "_core")


class Interrupter:
    """Raises one KeyboardInterrupt in this thread, at the n-th line that runs in the core."""

    def __init__(self, line):
        self.left = line
        self.where = None
        self.inside: set[str] = set()  # the functions that it struck in

    def __enter__(self):
        self.before = sys.gettrace()
        gc.disable()  # or it would strike in the finalizers of other tests' garbage
        sys.settrace(self.on_call)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(self.before)
        gc.enable()
        return kind is KeyboardInterrupt and self.where is not None

    def on_call(self, frame, event, arg):
        return self.on_line if frame.f_code.co_filename.startswith(CORE) else None

    def on_line(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self.inside = {outer.f_code.co_name for outer, _ in traceback.walk_stack(frame)}
                raise KeyboardInterrupt
        return self.on_line


def at_every_line(make, operate, check):
    """Do ``operate(make())`` with an interrupt at each of its lines in turn, then ``check``; how many there were."""
    line = 1
    while True:
        world = make()
        with Interrupter(line) as interrupter:
            operate(world)
        try:
            check(world)
        except BaseException as error:
            error.add_note(f"interrupted at line {line} of the operation: {interrupter.where}")
            raise
        if interrupter.where is None:
            return line - 1
        line += 1


class Bell:
    """Something the library blocks on."""

    def __init__(self):
        self.rung = 0

    def wake(self):
        self.rung += 1


class Forest:
    """Two trees and a linked token below both, with callbacks and waiters on several levels."""

    def __init__(self):
        self.root, self.other = CancellationToken(), CancellationToken()
        self.child = self.root.child()
        self.leaf = self.child.child(timeout=3600)
        self.linked = CancellationToken.linked(self.child, self.other)
        self.deep = CancellationToken.linked(self.linked.child()).child()
        self.below = [self.child, self.leaf, self.linked, self.deep, self.root.child()]
        self.calls = []
        self.count = 0
        for token in (self.root, self.leaf, self.leaf, self.linked, self.deep):
            self.register(token)
        self.bells = [Bell() for _ in self.below]
        assert all(attach(token, bell) for token, bell in zip(self.below, self.bells, strict=True))

    def register(self, token, **how):
        self.count += 1
        return token.on_cancel(self.calls.append, self.count, **how)

    def check_unharmed(self):
        """One more operation, then the invariants."""
        self.root.child()
        self.root.cancel()
        assert all(token.reason is self.root.reason for token in self.below)
        until(lambda: len(self.calls) == self.count, f"all of {self.count} callbacks, called were {self.calls}")
        assert sorted(self.calls) == list(range(1, self.count + 1))
        assert all(bell.rung for bell in self.bells)
        assert not self.other.cancelled
        self.check_free()

    def check_free(self):
        trees = {token._tree for token in (self.root, self.other, self.linked, self.deep)}
        for token in (self.root, self.other, self.linked, self.deep):
            on_thread(token.child)  # hangs if somebody still holds a lock
        for tree in trees:
            assert not tree.lock._is_owned()
            assert not tree.inbox
            assert not tree.unfinished
            assert not tree.pinned
            assert not tree.keeper


def check_timer():
    """Deadlines and workers still work."""
    assert timer.busy_here() is False
    token = CancellationToken(timeout=0.001)
    fired = threading.Event()
    token.on_cancel(fired.set)
    assert fired.wait(WAIT)


def test_cancel_is_finished_whatever_line_is_interrupted():
    """After an interrupt anywhere in cancel(), one more operation completes it: all marked, woken, called back once."""
    lines = at_every_line(Forest, lambda forest: forest.root.cancel(), Forest.check_unharmed)
    assert lines > 100
    check_timer()


def test_an_interrupted_cancel_finishes_its_steps_before_it_is_raised():
    """Where the steps of a cancel are cut off, they are all done before the KeyboardInterrupt comes out of cancel()."""
    line, struck = 1, 0
    while True:
        forest = Forest()
        with Interrupter(line) as interrupter:
            forest.root.cancel()
        if interrupter.where is None:
            break
        if "_advance" in interrupter.inside:
            struck += 1
            assert all(token.cancelled for token in forest.below), interrupter.where
            assert sorted(forest.calls) == list(range(1, forest.count + 1)), interrupter.where
        line += 1
    assert struck > 50


def test_a_begun_cancel_is_finished_without_being_repeated():
    """Any other operation on the tree will do: once one flag is set, the cancel cannot be lost."""

    def check(forest):
        forest.root.child()
        if forest.root.cancelled:
            assert all(token.cancelled for token in forest.below)
            assert sorted(forest.calls) == list(range(1, forest.count + 1))

    at_every_line(Forest, lambda forest: forest.root.cancel(), check)


def test_a_begun_cancel_can_be_finished_from_a_linked_tree():
    """Whoever next uses the linked token, not knowing where the cancel came from, finishes it as well."""

    def check(forest):
        if forest.deep.cancelled or forest.linked.cancelled:
            forest.linked.child()
            assert forest.deep.cancelled
            assert sorted(forest.calls) == list(range(1, forest.count + 1))

    at_every_line(Forest, lambda forest: forest.root.cancel(), check)


def test_a_cancel_of_a_linked_token_is_finished():
    """The same where the cancelled token is itself linked, and its pins lie in the trees above."""

    def check(forest):
        forest.linked.child()
        forest.linked.cancel()
        assert not forest.root.cancelled
        assert forest.deep.cancelled
        assert forest.calls == [5, 4]
        assert forest.linked not in forest.child._tree.pinned
        assert not forest.other._tree.pinned
        forest.root.cancel()
        assert sorted(forest.calls) == [1, 2, 3, 4, 5]
        forest.check_free()

    at_every_line(Forest, lambda forest: forest.linked.cancel(), check)


def test_an_expiry_seen_by_a_user_is_finished():
    """A deadline that a waiting user's thread finds, interrupted anywhere: the callbacks still run, on a worker."""

    def make():
        forest = Forest()
        forest.root._deadline = forest.leaf._deadline = 0.0
        more = forest.root._more
        more.own_deadline = 0.0
        return forest

    at_every_line(make, lambda forest: expire_if_due(forest.leaf), Forest.check_unharmed)
    check_timer()


def test_a_handed_over_batch_is_run_once_by_workers():
    """An expiry with no worker alive starts one; interrupted while it does, no callback is lost or run twice."""

    def make():
        assert drain()
        forest = Forest()
        forest.root._more.own_deadline = forest.root._deadline = 0.0
        forest.register(forest.leaf, blocking=True)
        return forest

    at_every_line(make, lambda forest: expire_if_due(forest.root), Forest.check_unharmed)
    check_timer()


@pytest.mark.parametrize("timeout", [None, 3600, 0])
def test_child_leaves_the_tree_sound(timeout):
    """An interrupt anywhere in child() leaves no lock held and the tree whole."""
    at_every_line(Forest, lambda forest: forest.child.child(timeout=timeout), Forest.check_unharmed)
    check_timer()


@pytest.mark.parametrize("timeout", [None, 3600, 0])
def test_linked_leaves_both_trees_sound(timeout):
    """An interrupt anywhere in linked() leaves both parents' trees whole."""
    at_every_line(
        Forest,
        lambda forest: CancellationToken.linked(forest.leaf, forest.other, timeout=timeout),
        Forest.check_unharmed,
    )
    check_timer()


def test_a_deadline_survives_an_interrupted_start_of_the_timer():
    """An interrupt while the timer thread is being started leaves a timer that works: the next deadline is kept."""

    def make():
        assert drain()
        return Forest()

    def check(forest):
        check_timer()
        forest.check_unharmed()

    at_every_line(make, lambda _forest: CancellationToken(timeout=3600), check)
    until(lambda: sum(thread.name == THREAD_NAME for thread in threading.enumerate()) <= 1)


def test_workers_survive_an_interrupted_start():
    """An interrupt while a worker is being started strands neither this job nor the next."""

    def check(ran):
        again = threading.Event()
        workers.submit(again.set)
        assert again.wait(WAIT)

    def make():
        assert drain()
        return threading.Event()

    at_every_line(make, lambda ran: workers.submit(ran.set), check)
    assert workers.workers.starting == set()


@pytest.mark.parametrize("blocking", [False, True])
def test_on_cancel_registers_or_does_not(blocking):
    """An interrupt in on_cancel() leaves the callback registered or not: never called twice, never half."""

    def check(forest):
        forest.register(forest.deep)
        extra = forest.count - 1
        forest.calls.append(extra)  # whether or not it was registered ...
        forest.root.cancel()
        until(lambda: forest.count in forest.calls)
        until(lambda: not forest.deep._more.regs)
        if forest.calls.count(extra) > 1:  # ... it was called at most once
            forest.calls.remove(extra)
        forest.check_unharmed()

    at_every_line(Forest, lambda forest: forest.register(forest.deep, blocking=blocking), check)


def test_on_cancel_of_a_cancelled_token_leaves_it_sound():
    """The same where the token is cancelled already: called at most once."""

    def make():
        forest = Forest()
        forest.root.cancel()
        return forest

    def check(forest):
        late = [number for number in forest.calls if number == 6]
        assert len(late) <= 1
        forest.count = 5
        forest.calls[:] = [number for number in forest.calls if number != 6]
        forest.check_unharmed()

    at_every_line(make, lambda forest: forest.register(forest.linked), check)


def test_close_can_be_repeated():
    """An interrupt in close(): closing again gives every pin back, in the linked trees too."""

    def make():
        forest = Forest()
        forest.root, forest.other = CancellationToken(), CancellationToken()
        forest.linked = CancellationToken.linked(forest.root, forest.other)
        forest.deep = CancellationToken.linked(forest.linked.child()).child()
        forest.calls = []
        forest.registration = forest.deep.on_cancel(forest.calls.append, 1)
        return forest

    def check(forest):
        forest.registration.close()
        for token in (forest.root, forest.other, forest.linked, forest.deep):
            assert not token._tree.pinned
            assert not token._tree.keeper
        forest.root.cancel()
        assert forest.calls == []
        forest.check_free()

    at_every_line(make, lambda forest: forest.registration.close(), check)


def test_waiting_and_detaching_leave_the_tree_sound():
    """An interrupt in wait() or detach() leaves no lock held."""

    def operate(forest):
        forest.leaf.wait(0)
        detach(forest.leaf, Bell())

    at_every_line(Forest, operate, Forest.check_unharmed)


def test_a_boundary_leaves_the_tree_sound():
    """An interrupt while `with token:` is entered or left harms nothing but that block."""
    before = tokenscope.current_token()

    def operate(forest):
        with forest.leaf:
            pass

    def check(forest):
        tokenscope._core.ambient.token_var.set(None)
        forest.check_unharmed()

    at_every_line(Forest, operate, check)
    assert tokenscope.current_token() is before


def test_an_interrupt_is_raised_and_not_swallowed():
    """Whatever the line, the KeyboardInterrupt comes out of cancel()."""
    forest = Forest()
    line = 1
    while True:
        forest = Forest()
        interrupter = Interrupter(line)
        with interrupter:
            forest.root.cancel()
            if interrupter.where is not None:
                pytest.fail(f"swallowed at {interrupter.where}")
        if interrupter.where is None:
            return
        line += 1
