"""Small stories for the scheduler: each returns its actors' functions, and the check when all have ended."""

from __future__ import annotations

import weakref

import tokenscope
from tokenscope import CancellationToken, Cancelled, ScopeClosed, ThreadScope
from tokenscope._core import _primitives, workers
from tokenscope._core.token import attach, detach


def cancel_and_register():
    """Registered before the cancel or after it: called exactly once."""
    root = CancellationToken()
    child = root.child()
    calls = []

    def check():
        assert calls == [1]
        assert not root._tree.pinned

    return [root.cancel, lambda: child.on_cancel(calls.append, 1)], check


def cancel_and_register_below_a_link():
    """The same where the cancel has to cross into another tree."""
    root = CancellationToken()
    leaf = CancellationToken.linked(root.child(), CancellationToken()).child()
    calls = []

    def check():
        assert calls == [1]
        assert not root._tree.pinned

    return [root.cancel, lambda: leaf.on_cancel(calls.append, 1)], check


def cancel_and_close():
    """Closed in time or called; and when close() has returned, it is not running."""
    root = CancellationToken()
    state = []
    registration = root.child().on_cancel(lambda: (state.append("begins"), root.child(), state.append("ends")))
    answers = []

    def close():
        answers.append(registration.close())
        answers.append(list(state))

    def check():
        in_time, seen = answers
        assert seen == state == ([] if in_time else ["begins", "ends"])

    return [root.cancel, close], check


def close_and_close_and_cancel():
    """Of two closers and a canceller exactly one gets the callback."""
    root = CancellationToken()
    calls, answers = [], []
    registration = root.on_cancel(calls.append, True)

    def close():
        answers.append(registration.close())

    def check():
        assert (answers + calls).count(True) == 1
        assert not root._tree.pinned

    return [root.cancel, close, close], check


def cancel_and_child():
    """A child made meanwhile is cancelled: at birth or by the walk."""
    root = CancellationToken()
    parent = root.child()
    made = []

    def make():
        made.append(parent.child())
        made.append(made[0].child())

    def check():
        assert [token.reason for token in made] == [root.reason] * 2

    return [root.cancel, make], check


def register_on_the_child_of_a_cancelled_token():
    """It is cancelled when it is handed out, also while somebody else is at the tree; its callback is called."""
    root = CancellationToken()
    root.cancel()
    born, calls = [], []

    def make():
        token = root.child()
        born.append(token.cancelled)
        token.on_cancel(calls.append, 1)

    def check():
        assert born == [True]
        assert calls == [1]
        assert not root._tree.pinned

    return [lambda: attach_and_detach(root), make], check


def attach_and_detach(token):
    for waiter in (_primitives.Waiter(), _primitives.Waiter()):
        attach(token, waiter)
        detach(token, waiter)


def cancel_and_link():
    """So is a linked one, and what is made below it; it has the reason of one of its parents."""
    one, two = CancellationToken(), CancellationToken()
    made = []

    def make():
        made.append(CancellationToken.linked(one, two))
        made.append(made[0].child())

    def check():
        assert all(token.reason in (one.reason, two.reason) for token in made)
        assert made[0].reason is made[1].reason

    return [one.cancel, two.cancel, make], check


def two_cancels():
    """One winner, one reason all the way down, callbacks once."""
    root = CancellationToken()
    leaf = root.child().child()
    calls, won = [], []
    leaf.on_cancel(calls.append, 1)

    def check():
        assert sorted(won) == [False, True]
        assert leaf.reason is root.reason
        assert calls == [1]

    return [lambda: won.append(root.cancel("a")), lambda: won.append(root.cancel("b"))], check


def cancel_above_and_below():
    """Both win their own token; everything ends cancelled, every callback is called once."""
    root = CancellationToken()
    middle = root.child()
    leaf = CancellationToken.linked(middle)
    calls = []
    for token in (root, middle, leaf):
        token.on_cancel(calls.append, token)

    def check():
        assert leaf.reason in (root.reason, middle.reason)
        assert len(calls) == len(set(calls)) == 3
        assert not root._tree.pinned

    return [root.cancel, middle.cancel], check


def cancel_and_wait():
    """No wake-up is lost: the waiter returns True."""
    root = CancellationToken()
    token = CancellationToken.linked(root)
    answers = []

    def check():
        assert answers == [True]

    return [root.cancel, lambda: answers.append(token.wait())], check


def cancel_and_detach():
    """After detach() no new wake() starts."""

    class Guard:
        attached = True
        late = False

        def wake(self):
            self.late = self.late or not self.attached

    root = CancellationToken()
    guard = Guard()

    def hold():
        if attach(root, guard):
            detach(root, guard)
            root.child()  # one that had begun may end meanwhile

    def check():
        assert root.cancelled

    return [root.cancel, hold], check


def cancel_and_expiry():
    """The timer and a user: one of both reasons everywhere, callbacks once."""
    root = CancellationToken(timeout=1.0)
    leaf = root.child()
    calls = []
    leaf.on_cancel(calls.append, 1)

    def check():
        assert root.cancelled
        assert leaf.reason is root.reason
        assert calls == [1]

    return [root.cancel, leaf.wait], check


def expiry_and_register():
    """A callback registered while the deadline passes is called once."""
    root = CancellationToken(timeout=1.0)
    calls = []

    def register():
        root.child().on_cancel(calls.append, 1)
        root.wait()

    def check():
        assert root.cancelled
        assert calls == [1]

    return [register], check


def expiry_and_child():
    """Deadlines set while another passes are kept: every token is cancelled in the end."""
    root = CancellationToken(timeout=1.0)
    made = []

    def make(timeout):
        token = CancellationToken(timeout=timeout)
        made.extend([root.child(timeout=timeout), token])
        token.wait()

    def check():
        assert all(token.cancelled for token in made)

    return [lambda: make(0.5), lambda: make(1.5)], check


def sleep_past_a_deadline():
    """Whoever sleeps past the deadline is cancelled, whether the timer or the sleeper was first."""
    root = CancellationToken(timeout=1.0)
    leaf = CancellationToken.linked(root.child()).child()
    raised = []

    def sleep():
        try:
            leaf.sleep(3.0)
        except Cancelled as error:
            raised.append(error.reason)

    def check():
        assert raised == [root.reason]

    return [sleep], check


def register_and_close_below_a_link():
    """The pins of linked trees follow: none is left when all is closed, and none is missing while one is open."""
    root = CancellationToken()
    middle = CancellationToken.linked(root)
    leaf = CancellationToken.linked(middle)
    first = leaf.on_cancel(int)
    kept = []

    def check():
        assert leaf._tree.pinned
        assert middle._tree.pinned
        assert root._tree.pinned
        kept.pop().close()
        assert not any(token._tree.pinned for token in (leaf, middle, root))

    return [first.close, lambda: kept.append(leaf.on_cancel(int))], check


def submit_and_retire():
    """A job given to a worker that is about to leave is run all the same."""
    ran = []
    workers.workers.submit(lambda: ran.append(0))

    def submit():
        tokenscope.sleep(workers.IDLE_SECONDS)
        workers.submit(lambda: ran.append(1))

    def check():
        assert sorted(ran) == [0, 1]

    return [submit], check


def submit_and_submit():
    """Jobs that wait for each other all get a thread."""
    tokens = CancellationToken(), CancellationToken()
    met = []

    def meet(me, other):
        me.cancel()
        met.append(other.wait())

    def check():
        assert met == [True, True]

    return [lambda: workers.submit(lambda: meet(*tokens)), lambda: workers.submit(lambda: meet(*tokens[::-1]))], check


def cancel_and_spawn():
    """A task spawned while the scope is cancelled ends, or is refused; the scope joins it either way."""
    ran, refused = [], []
    ready = []

    def run():
        try:
            with ThreadScope(grace=100.0) as scope:
                ready.append(scope)
                scope.spawn(ran.append, 1)
                scope.spawn(tokenscope.sleep, 60)
                tokenscope.sleep(60)
        except ScopeClosed:
            refused.append(1)
        assert scope.cancelled_caught or refused
        assert scope.report.tasks.spawned == scope.report.tasks.finished + scope.report.tasks.cancelled + (
            scope.report.tasks.never_started
        )

    def cancel():
        while not ready:
            tokenscope.sleep(0.1)
        ready[0].cancel()

    return [run, cancel], lambda: None


def spawn_and_exit():
    """A task spawned from another thread while the body ends is run and joined, or refused."""
    ended, answers = [], []
    ready = []

    def run():
        with ThreadScope(grace=100.0) as scope:
            ready.append(scope)
            tokenscope.sleep(0.1)
        ended.append(list(answers))

    def spawn():
        while not ready:
            tokenscope.sleep(0.1)
        try:
            ready[0].spawn(answers.append, "ran")
        except ScopeClosed:
            answers.append("refused")

    def check():
        assert answers in (["ran"], ["refused"])
        assert answers == ["refused"] or ended == [["ran"]]

    return [run, spawn], check


def scope_deadline_and_end():
    """A child that ends as the deadline passes: either outcome, never something in between."""
    outcomes = []

    def run():
        scope = ThreadScope(timeout=1.0, grace=100.0)
        try:
            with scope:
                scope.spawn(tokenscope.sleep, 0.99999)
        except (TimeoutError, ScopeClosed):  # the latter: see test_races.py
            outcomes.append("cut")
        else:
            outcomes.append("whole")
        assert (scope.report.tasks.finished == 1) == (outcomes == ["whole"])

    def check():
        assert outcomes in (["cut"], ["whole"])

    return [run], check


def drop_and_cancel():
    """A child dropped while its parent is cancelled: its callback is called once, and nothing keeps it."""
    root = CancellationToken()
    calls, gone = [], []

    def use():
        child = root.child()
        gone.append(weakref.ref(child))
        child.on_cancel(calls.append, 1)

    def check():
        assert calls == [1]
        assert gone[0]() is None

    return [root.cancel, use], check


#: Those that are small enough to be tried line by line.
SMALL = [
    cancel_and_register,
    cancel_and_register_below_a_link,
    cancel_and_close,
    close_and_close_and_cancel,
    cancel_and_child,
    register_on_the_child_of_a_cancelled_token,
    cancel_and_link,
    two_cancels,
    cancel_above_and_below,
    cancel_and_wait,
    cancel_and_detach,
    register_and_close_below_a_link,
    drop_and_cancel,
]
#: Those in which time passes, or threads are started.
LARGE = [
    cancel_and_expiry,
    expiry_and_register,
    expiry_and_child,
    sleep_past_a_deadline,
    submit_and_retire,
    submit_and_submit,
    cancel_and_spawn,
    spawn_and_exit,
    scope_deadline_and_end,
]
