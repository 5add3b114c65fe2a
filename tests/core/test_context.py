"""What children see of their context, and scopes that are entered on one thread and left on another."""

from __future__ import annotations

import contextvars
import threading

import pytest
from actors import WAIT, Sleeper

from tokenscope import (
    CancellationToken,
    Cancelled,
    ThreadScope,
    check,
    current_scope,
    current_token,
    use_token,
)

variable = contextvars.ContextVar("variable", default="unset")


def on_another_thread(fn, *args):
    """Run it on a fresh thread with an empty context; its result, or its error."""
    answer = []

    def run():
        try:
            answer.append((fn(*args), None))
        except BaseException as error:
            answer.append((None, error))

    thread = threading.Thread(target=contextvars.Context().run, args=(run,))
    thread.start()
    thread.join(WAIT)
    value, error = answer[0]
    if error is not None:
        raise error
    return value


def test_context_variables_reach_children():
    """As they were at the moment of the spawn, also grandchildren and mapped items."""
    token = variable.set("at spawn")
    try:
        with ThreadScope() as scope:
            task = scope.spawn(lambda: (variable.get(), scope.spawn(variable.get).result(WAIT)))
            mapped = list(scope.map(lambda _: variable.get(), range(2)))
            variable.set("after spawn")
            assert task.result(WAIT) == ("at spawn", "at spawn")
            assert mapped == ["at spawn"] * 2
            assert scope.spawn(variable.get).result(WAIT) == "after spawn"
    finally:
        variable.reset(token)


def test_childrens_changes_stay_theirs():
    """Neither the body, nor siblings, nor the next task on the same thread see what a child set."""
    with ThreadScope() as scope:
        first = scope.spawn(lambda: (variable.set("the child's"), threading.get_ident())[1])
        ident = first.result(WAIT)
        assert variable.get() == "unset"
        assert scope.join(WAIT)
        seen = {scope.spawn(lambda: (threading.get_ident(), variable.get())).result(WAIT) for _ in range(20)}
        assert {value for _, value in seen} == {"unset"}
    assert variable.get() == "unset"
    assert ident


def test_what_is_current_does_not_stay_on_a_worker_thread():
    """A cached thread that runs somebody else's work knows nothing of the last task."""
    from tokenscope._core import workers

    seen, done = [], threading.Event()

    def look():
        seen.append(current_token())
        done.set()

    with ThreadScope() as scope:
        scope.spawn(check).result(WAIT)
    workers.submit(look)
    assert done.wait(WAIT)
    assert seen == [current_token()]


def stream(log):
    """A streaming view: a scope around a yield."""
    with ThreadScope(name="stream") as scope:
        log.append(scope)
        scope.defer(log.append, "cleaned")
        sleeper = Sleeper()
        scope.spawn(sleeper.sleep)
        sleeper.await_arrival()
        for number in range(3):
            yield number, current_token() is scope.token
        scope.cancel()
        scope.token.sleep(WAIT)


def test_a_scope_around_a_yield_may_be_driven_from_different_threads_and_contexts():
    """next() here and there, the end on a third thread: children joined, cleanups run."""
    log = []
    body = stream(log)
    outside = current_token()
    private = contextvars.copy_context()
    assert private.run(next, body) == (0, True)
    assert on_another_thread(next, body) == (1, False)  # a context that never saw the scope does not know it
    assert private.run(next, body) == (2, True)
    with pytest.raises(StopIteration):
        on_another_thread(next, body)
    scope = log[0]
    assert scope.report.outcome == "cancelled"
    assert scope.cancelled_caught
    assert log[-1] == "cleaned"
    assert current_token() is outside
    # The context of the first next() keeps what nobody could put back.
    assert private.run(current_token) is scope.token


def test_a_generator_with_a_scope_that_is_closed_on_another_thread_stops_its_children():
    """close() cancels with `scope_ended`, joins, cleans up, and is no error."""
    log = []
    body = stream(log)
    contextvars.copy_context().run(next, body)
    on_another_thread(body.close)
    scope = log[0]
    assert scope.report.outcome == "interrupted"
    assert scope.token.reason.kind == "scope_ended"
    assert scope.report.tasks.cancelled == 1
    assert log[-1] == "cleaned"


def test_a_generator_with_a_scope_that_is_closed_where_it_was_begun_puts_everything_back():
    """In one context the current token and scope are again what they were before the first next()."""
    log = []
    with ThreadScope() as outer:
        body = stream(log)
        next(body)
        assert current_scope() is log[0]
        body.close()
        assert current_scope() is outer
        assert current_token() is outer.token
        check()


def test_leaving_a_scope_puts_back_only_what_is_still_its_own():
    """A generator's scope that ends inside another scope's body does not take that one's place away."""
    log = []
    body = stream(log)
    outside = current_token()
    next(body)
    with ThreadScope() as scope:
        body.close()
        assert current_scope() is scope
        assert current_token() is scope.token
    # Nor does the generator's ended scope come back, which was current when this one was entered.
    assert current_token() is outside
    with pytest.raises(LookupError):
        current_scope()


def test_a_scope_may_be_entered_and_left_by_hand_on_different_threads():
    """As a middleware does: entered where the request came in, left where the body was closed."""
    scope = ThreadScope()
    on_another_thread(scope.__enter__)
    sleeper = Sleeper()
    scope.spawn(sleeper.sleep)
    sleeper.await_arrival()
    scope.cancel()
    assert scope.__exit__(None, None, None) is True or scope.cancelled_caught
    assert sleeper.left() == ["manual"]


def test_a_cancel_reaches_a_generator_at_its_next_item():
    """A cancel between two items is raised at the next checkpoint, on whatever thread the context is run."""
    request = CancellationToken()

    def items():
        with ThreadScope():
            while True:
                check()
                yield 1

    body = items()
    with use_token(request):
        private = contextvars.copy_context()
    assert private.run(next, body) == 1
    request.cancel()
    with pytest.raises(Cancelled) as caught:
        on_another_thread(private.run, next, body)
    assert caught.value.reason is request.reason
