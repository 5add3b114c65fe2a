"""The guard of a database connection: whom it stops, how often, and whom never."""

from __future__ import annotations

import os
import queue
import sys
import threading
from dataclasses import replace

import pytest
from peers import Attempt, wait_until

from tokenscope import CancellationToken, Cancelled, DeadlineExceeded, fail_after, use_token
from tokenscope._core import events
from tokenscope._core.current import uninterruptible
from tokenscope.integrations._sql import Driver, Guard

WAIT = 10.0


class Stopped(Exception):
    """What the database answers to a query that was cancelled."""


class Link:
    """A connection to a database that hangs on cue: one query at a time, stopped by others, deaf if told so."""

    def __init__(self, driver: Driver | None = None, *, deaf_to: int = 0) -> None:
        self.guard = Guard(self, driver or DRIVER)
        self.deaf_to = deaf_to  # so many stops get lost
        self.began = threading.Event()
        self.answer = threading.Event()
        self.queries: list[Query] = []
        self.history: list[str] = []

    def query(self, *, error: Exception | None = None) -> str:
        query = Query()
        self.queries.append(query)
        self.began.set()
        while not self.answer.is_set():
            if query.stopped.wait(0.001):
                self.queries.remove(query)
                raise Stopped
        self.queries.remove(query)
        if error is not None:
            raise error
        return "rows"

    def stop(self) -> None:
        self.history.append("stop")
        if self.deaf_to:
            self.deaf_to -= 1
            return
        for query in self.queries:
            query.stopped.set()

    def hang_up(self) -> None:
        self.history.append("hang up")
        for query in self.queries:
            query.stopped.set()

    def is_certain(self, error: Exception | None) -> bool:
        return isinstance(error, Stopped)

    def roll_back(self) -> None:
        self.history.append("roll back")

    def close(self) -> None:
        self.history.append("close")


class Query:
    def __init__(self) -> None:
        self.stopped = threading.Event()


DRIVER = Driver(
    stop=Link.stop, is_certain=Link.is_certain, roll_back=Link.roll_back, close=Link.close, hang_up=Link.hang_up
)


def begin(link: Link, token: CancellationToken, **options) -> Attempt:
    """Start a query under a token, and return when the database is at it."""
    link.began.clear()
    attempt = Attempt(lambda: link.guard.call(link.query, **options), token)
    assert link.began.wait(WAIT)
    return attempt


def test_a_blocked_call_is_stopped_and_then_put_in_order():
    """The database is asked to stop, the connection is put in order, `Cancelled` comes with the driver's error."""
    link, token = Link(), CancellationToken()
    attempt = begin(link, token)
    token.cancel("enough")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert isinstance(failure.__cause__, Stopped)
    assert failure.reason is token.reason
    assert link.history == ["stop", "roll back"]


def test_a_call_under_a_cancelled_token_is_not_begun():
    """The check comes first; the connection is not touched, for it may be somebody else's by now."""
    link, token = Link(), CancellationToken()
    token.cancel()
    with use_token(token), pytest.raises(Cancelled):
        link.guard.call(link.query)
    assert not link.began.is_set()
    assert link.history == []


def test_outside_of_any_scope_a_call_is_a_call():
    """Without a token nothing is registered, and errors are the driver's own."""
    link = Link()
    link.answer.set()
    assert link.guard.call(link.query) == "rows"
    with pytest.raises(KeyError):
        link.guard.call(link.query, error=KeyError("rows"))


def test_an_error_of_a_live_token_passes_unchanged():
    """What fails by itself has failed, and was not cancelled."""
    link = Link()
    link.answer.set()
    with use_token(CancellationToken()), pytest.raises(KeyError):
        link.guard.call(link.query, error=KeyError("rows"))
    assert link.history == []


def test_a_deadline_stops_a_call_as_well():
    """The time of the token runs out while the database is at it."""
    link = Link()
    with pytest.raises(DeadlineExceeded), fail_after(0.05):
        link.guard.call(link.query)
    assert link.history[-1] == "roll back"


def test_a_stop_that_was_lost_is_repeated():
    """A stop that comes before the database has begun does nothing; the next one does."""
    link, token = Link(deaf_to=2), CancellationToken()
    attempt = begin(link, token)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    assert link.history == ["stop", "stop", "stop", "roll back"]


def test_the_connection_is_broken_only_when_stopping_does_not_help():
    """A server that does not obey loses its client."""
    link, token = Link(deaf_to=1000), CancellationToken()
    attempt = begin(link, token)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    assert link.history == ["stop"] * 4 + ["hang up", "close"]


def test_a_stop_that_hangs_does_not_keep_the_connection_from_being_broken():
    """In a dead network the second connection hangs like the first; nobody waits for it once the first is broken."""
    go = threading.Event()
    link, token = Link(replace(DRIVER, stop=lambda _link: go.wait(WAIT))), CancellationToken()
    attempt = begin(link, token)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    assert link.history == ["hang up", "close"]
    go.set()


def test_no_call_begins_while_a_stop_is_under_way():
    """Somebody else's call waits: the stop would hit it."""
    stopping, go = threading.Event(), threading.Event()

    def stop(link: Link) -> None:
        stopping.set()
        assert go.wait(WAIT)
        link.stop()

    link, token = Link(replace(DRIVER, stop=stop, hang_up=None)), CancellationToken()
    attempt = begin(link, token)
    token.cancel()
    assert stopping.wait(WAIT)
    link.began.clear()
    other = Attempt(lambda: link.guard.call(link.query), CancellationToken())
    assert not link.began.wait(0.05)
    go.set()
    assert isinstance(attempt.failure(), Cancelled)
    link.answer.set()
    assert other.value() == "rows"


def test_a_stop_that_fails_is_told_and_repeated():
    """A second connection that cannot be opened is logged, and does not end the attempts."""
    failures = [OSError("no route"), OSError("no route")]

    def stop(link: Link) -> None:
        if failures:
            raise failures.pop()
        link.stop()

    heard: queue.Queue[events.CallbackFailed] = queue.Queue()
    unsubscribe = events.subscribe(heard.put, events.CallbackFailed)
    link, token = Link(replace(DRIVER, stop=stop)), CancellationToken()
    attempt = begin(link, token)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    unsubscribe()
    assert [str(heard.get(timeout=WAIT).error) for _ in range(2)] == ["no route"] * 2


def test_a_connection_in_doubt_is_closed():
    """An end that was not the answer to a stop says nothing about the state of the connection."""
    link, token = Link(), CancellationToken()
    attempt = begin(link, token, error=KeyError("rows"))
    with link.guard._lock:  # a stop comes too late
        token.cancel()
        link.answer.set()
        wait_until(lambda: not link.queries)
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert isinstance(failure.__cause__, KeyError)
    assert link.history[-1:] == ["close"]
    assert link.guard.discarded


@pytest.mark.parametrize("close", [Link.close, None])
def test_a_rollback_that_fails_is_told_and_the_cancel_passes(close):
    """Whatever happens to the connection, also while it is closed: the caller hears that it was cancelled."""

    def roll_back(_link: Link) -> None:
        raise OSError("gone")

    def broken(_link: Link) -> None:
        raise OSError("gone as well")

    heard: queue.Queue[events.CallbackFailed] = queue.Queue()
    unsubscribe = events.subscribe(heard.put, events.CallbackFailed)
    driver = replace(DRIVER, roll_back=roll_back, close=close or broken)
    link, token = Link(driver), CancellationToken()
    attempt = begin(link, token)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    unsubscribe()
    assert "rollback" in heard.get(timeout=WAIT).where
    assert link.guard.discarded
    if close is None:
        assert "close" in heard.get(timeout=WAIT).where
    else:
        assert link.history == ["stop", "close"]


def test_a_cancel_that_comes_late_does_not_touch_the_next_query():
    """The connection has gone on to the next request when the cancel of the first one comes."""
    link, first, second = Link(), CancellationToken(), CancellationToken()
    link.answer.set()
    with use_token(first):
        assert link.guard.call(link.query) == "rows"
    link.answer.clear()
    attempt = begin(link, second)
    first.cancel("late")
    link.answer.set()
    assert attempt.value() == "rows"
    assert link.history == []


def test_a_worker_that_comes_late_does_nothing():
    """The call it was sent for has ended: an idle connection is not stopped either."""
    link, token = Link(), CancellationToken()
    attempt = begin(link, token)
    (call,) = link.guard._calls
    link.answer.set()
    assert attempt.value() == "rows"
    token.cancel()
    link.guard._stop_until_ended(call, threading.Event())
    link.guard._break_if_deaf(call, threading.Event(), Link.hang_up)
    assert link.history == []


def test_a_call_that_ends_waits_for_the_stop_that_is_on_its_way():
    """No stop is under way when a call has returned: it would hit whatever runs next."""
    stopping, go = threading.Event(), threading.Event()

    def stop(link: Link) -> None:
        stopping.set()
        assert go.wait(WAIT)
        link.stop()

    link, token = Link(replace(DRIVER, stop=stop)), CancellationToken()
    attempt = begin(link, token)
    token.cancel()
    assert stopping.wait(WAIT)
    link.answer.set()
    wait_until(lambda: not link.queries)  # the database has answered
    attempt.thread.join(0.05)
    assert attempt.thread.is_alive(), "it returned while a stop was on its way"
    go.set()
    assert attempt.value() == "rows"  # and what it has done is not called undone


@pytest.mark.parametrize("certain", [True, False])
def test_a_success_after_a_stop_counts_where_the_database_can_be_believed(certain):
    """Some databases answer a stopped query as if it had ended."""
    link = Link(replace(DRIVER, stop=lambda link: link.answer.set(), certain=certain))
    token = CancellationToken()
    attempt = begin(link, token)
    token.cancel()
    if certain:
        assert attempt.value() == "rows"
    else:
        assert isinstance(attempt.failure(), Cancelled)
        assert link.history == ["close"]


def test_nothing_is_stopped_while_somebody_else_uses_the_connection():
    """A database cancels what the connection does, whoever asked for it: so the stop waits until they are done."""
    link, mine, theirs = Link(), CancellationToken(), CancellationToken()
    attempt, other = begin(link, mine), begin(link, theirs)
    mine.cancel()
    attempt.thread.join(0.05)
    assert attempt.thread.is_alive()
    assert link.history == []
    theirs.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    assert isinstance(other.failure(), Cancelled)


def test_a_call_inside_of_a_call_is_guarded_as_well():
    """A function of the user's that the driver calls may use the connection again."""
    link, token = Link(), CancellationToken()
    link.began.clear()
    attempt = Attempt(lambda: link.guard.call(link.guard.call, link.query), token)
    assert link.began.wait(WAIT)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    assert not link.guard._calls


def test_in_an_uninterruptible_section_nothing_is_stopped():
    """A commit, a cleanup: the guard stands back, also for the tokens of the section itself."""
    link, token = Link(), CancellationToken()

    def cleanup() -> str:
        with uninterruptible(), use_token(token):
            return link.guard.call(link.query)

    attempt = Attempt(cleanup)
    assert link.began.wait(WAIT)
    token.cancel()
    link.answer.set()
    assert attempt.value() == "rows"
    assert link.history == []


@pytest.mark.parametrize(
    "sql",
    ["COMMIT", " commit;", "END", "RELEASE x", "-- done\n  commit", "/* a\n */COMMIT", "prepare transaction 'x'"],
)
def test_a_statement_that_commits_is_not_cut(sql):
    """Whichever way a commit is spelled: from its beginning to its answer no cancel reaches it."""
    link, token = Link(), CancellationToken()
    attempt = Attempt(lambda: link.guard.statement(sql, link.query), token)
    assert link.began.wait(WAIT)
    token.cancel()
    link.answer.set()
    assert attempt.value() == "rows"
    assert link.history == []


@pytest.mark.parametrize("sql", ["COMMITS", "SELECT 'COMMIT'", "prepare x as select 1", "-- COMMIT\nselect 1", b"x"])
def test_other_statements_are_cut(sql):
    """What only looks like a commit is not one."""
    link, token = Link(), CancellationToken()
    attempt = Attempt(lambda: link.guard.statement(sql, link.query), token)
    assert link.began.wait(WAIT)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)


def test_a_commit_under_a_cancelled_token_is_refused_and_a_rollback_is_not():
    """Exactly one of cancel and commit wins; putting things in order is always possible."""
    link, token = Link(), CancellationToken()
    link.answer.set()
    token.cancel()
    with use_token(token):
        with pytest.raises(Cancelled):
            link.guard.statement("COMMIT", link.query)
        assert not link.began.is_set()
        assert link.history == ["roll back"]  # or a framework might commit it all the same
        assert link.guard.statement("ROLLBACK TO SAVEPOINT a", link.query) == "rows"


def test_a_finalizer_may_use_the_connection_in_the_middle_of_the_guard():
    """Cursors that are collected talk to their connection, wherever the collector comes by."""
    link = Link()
    link.answer.set()

    class Nosy:
        """In place of the list of calls: it is used in the middle of a locked section."""

        asked = False

        def __init__(self, calls):
            self.calls = calls

        def append(self, call):
            if not self.asked:
                self.asked = True
                link.guard.call(link.query)
            self.calls.append(call)

        def remove(self, call):
            self.calls.remove(call)

    link.guard._calls = Nosy([])
    with use_token(CancellationToken()):
        assert link.guard.call(link.query) == "rows"


def test_a_keyboard_interrupt_leaves_nothing_behind():
    """Ctrl-C in the driver ends the call as any error does."""
    link, token = Link(), CancellationToken()
    link.answer.set()
    with use_token(token), pytest.raises(KeyboardInterrupt):
        link.guard.call(link.query, error=KeyboardInterrupt())
    assert not link.guard._calls


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_nothing_to_the_connection_of_its_parent():
    """It shares the socket: what it stopped would be the parent's."""
    link, token = Link(), CancellationToken()
    attempt = begin(link, token)
    child = os.fork()
    if not child:
        sys.settrace(None)  # a coverage tracer has a lock of its own, which another thread may have held at the fork
        status = 1
        try:
            token.cancel()
            link.guard.wake()
            link.answer.set()
            with use_token(token):
                link.guard.call(link.query)  # not guarded: not even refused
            status = len(link.history)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    link.answer.set()
    assert attempt.value() == "rows"


def test_a_connection_is_freed_without_the_collector():
    """The guard holds its connection weakly: dropping the last name closes it at once, as without a guard."""
    freed = threading.Event()

    class Watched(Link):
        def __del__(self) -> None:
            freed.set()

    token = CancellationToken()
    link = Watched()
    link.answer.set()
    with use_token(token):
        link.guard.call(link.query)
    del link
    assert freed.is_set()


def test_many_calls_and_cancels_never_hit_the_wrong_query():
    """Two hundred requests take turns on one connection; the cancel of each comes somewhere around its end."""
    link = Link()
    innocent = 0
    for number in range(200):
        token = CancellationToken()
        attempt = begin(link, token)
        canceller = threading.Thread(target=token.cancel)
        if number % 2:
            link.answer.set()
        canceller.start()
        if number % 2 == 0:
            attempt.failure()
        else:
            attempt.thread.join(WAIT)
        link.answer.set()
        with use_token(CancellationToken()):
            innocent += link.guard.call(link.query) == "rows"
        link.answer.clear()
        canceller.join(WAIT)
    assert innocent == 200
