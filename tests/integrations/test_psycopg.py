"""psycopg 3 and 2 against a small PostgreSQL that hangs on cue; the real one is in compat/."""

from __future__ import annotations

import contextlib
import socket

import psycopg
import psycopg2
import psycopg2.extras
import pytest
from peers import Attempt, wait_until
from peers.postgres import Postgres

from tokenscope import CancellationToken, Cancelled, DeadlineExceeded, ThreadScope, fail_after, use_token
from tokenscope.integrations import psycopg as guarded3
from tokenscope.integrations import psycopg2 as guarded2

WAIT = 10.0
MODULES = {"psycopg": guarded3, "psycopg2": guarded2}
ERRORS = {"psycopg": psycopg.errors.QueryCanceled, "psycopg2": psycopg2.errors.QueryCanceled}


@pytest.fixture
def server():
    with Postgres() as server:
        yield server


@pytest.fixture(params=MODULES)
def driver(request):
    return request.param


@pytest.fixture
def connection(server, driver):
    with contextlib.closing(MODULES[driver].connect(server.conninfo)) as connection:
        yield connection


def run(connection, sql):
    cursor = connection.cursor()
    cursor.execute(sql)
    return cursor


def hang(connection, server, token) -> Attempt:
    attempt = Attempt(lambda: run(connection, "HANG"), token)
    assert server.hanging.wait(WAIT)
    return attempt


def test_a_blocked_statement_is_cancelled_at_the_server(connection, server, driver):
    """The server stops, the caller hears `Cancelled` from the driver's error, the transaction is rolled back."""
    token = CancellationToken()
    attempt = hang(connection, server, token)
    token.cancel("the reader left")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert isinstance(failure.__cause__, ERRORS[driver])
    assert server.log == ["BEGIN", "HANG", "ROLLBACK"]
    with use_token(CancellationToken()):
        assert run(connection, "SELECT 1").fetchone() == (1,)


def test_without_a_transaction_there_is_nothing_to_roll_back(connection, server):
    """In autocommit the connection is good as soon as the server has stopped."""
    connection.autocommit = True
    token = CancellationToken()
    attempt = hang(connection, server, token)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    assert server.log == ["HANG"]


def test_a_server_that_does_not_obey_loses_its_client(driver):
    """It is asked four times; then the connection is broken, and closed."""
    with Postgres(deaf=True) as server, contextlib.closing(MODULES[driver].connect(server.conninfo)) as connection:
        token = CancellationToken()
        attempt = hang(connection, server, token)
        token.cancel()
        assert isinstance(attempt.failure(), Cancelled)
        assert server.cancels == 4
        assert connection.closed


def test_a_deadline_ends_a_statement(connection):
    """The statement has as much time as its token."""
    with pytest.raises(DeadlineExceeded), fail_after(0.05):
        run(connection, "HANG")


@pytest.mark.parametrize("how", ["method", "statement", "with"])
def test_a_cancel_never_comes_between_commit_and_its_answer(connection, server, how):
    """The server has been asked to commit and has not answered yet: nobody asks it to cancel."""
    server.commits.clear()
    token = CancellationToken()

    def work():
        with connection if how == "with" else contextlib.nullcontext():
            run(connection, "SELECT 1")
            if how == "method":
                connection.commit()
            elif how == "statement":
                run(connection, "COMMIT")
        return "committed"

    attempt = Attempt(work, token)
    assert server.committing.wait(WAIT)
    token.cancel("too late")
    attempt.thread.join(0.05)
    server.commits.set()
    assert attempt.value() == "committed"
    assert server.cancels == 0
    assert server.log == ["BEGIN", "SELECT 1", "COMMIT"]


def test_a_commit_of_a_cancelled_request_is_refused(connection, server):
    """And a rollback is not."""
    token = CancellationToken()
    with use_token(token):
        run(connection, "SELECT 1")
        token.cancel()
        with pytest.raises(Cancelled):
            connection.commit()
        connection.rollback()
    assert server.log == ["BEGIN", "SELECT 1", "ROLLBACK"]


def test_a_cleanup_may_use_the_database(connection, server):
    """Its queries run although the request is over."""
    with ThreadScope() as scope:
        scope.defer(run, connection, "SELECT 1")
        scope.cancel()
    assert server.log == ["BEGIN", "SELECT 1"]


def test_a_late_cancel_does_not_touch_the_next_request(connection, server):
    """The connection works for the next request when the cancel of the last one comes."""
    first, second = CancellationToken(), CancellationToken()
    with use_token(first):
        run(connection, "SELECT 1")
    attempt = hang(connection, server, second)
    first.cancel("late")
    attempt.thread.join(0.05)
    assert server.cancels == 0
    second.cancel()
    assert isinstance(attempt.failure(), Cancelled)


# --- psycopg 3 ----------------------------------------------------------------------------------------------


@pytest.fixture
def connection3(server):
    with contextlib.closing(guarded3.connect(server.conninfo)) as connection:
        yield connection


def test_a_transaction_block_is_left_by_its_own_rollback(connection3, server):
    """Savepoints and all: the block knows what it has begun."""
    token = CancellationToken()

    def work():
        with connection3.transaction(), connection3.transaction():
            connection3.execute("HANG")

    attempt = Attempt(work, token)
    assert server.hanging.wait(WAIT)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    assert server.log[-1] == "ROLLBACK"
    assert connection3.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_transaction_block_of_a_cancelled_request_is_rolled_back(connection3, server):
    """The cancel comes before the end of the block; and a `psycopg.Rollback` is swallowed as ever."""
    token = CancellationToken()
    with use_token(token), pytest.raises(Cancelled), connection3.transaction():
        connection3.execute("SELECT 1")
        token.cancel()
    assert server.log == ["BEGIN", "SELECT 1", "ROLLBACK"]
    with connection3.transaction():
        raise psycopg.Rollback
    assert server.log[3:] == ["BEGIN", "ROLLBACK"]


def test_the_end_of_a_transaction_block_is_a_commit(connection3, server):
    """Nothing comes between it and its answer."""
    server.commits.clear()
    token = CancellationToken()

    def work():
        with connection3.transaction():
            connection3.execute("SELECT 1")
        return "committed"

    attempt = Attempt(work, token)
    assert server.committing.wait(WAIT)
    token.cancel()
    server.commits.set()
    assert attempt.value() == "committed"


def test_cursor_classes_of_others_know_a_commit(server):
    """Frameworks bring their own; what those add stays."""

    class Loud(psycopg.ClientCursor):
        def execute(self, query, *args, **options):
            return super().execute(f"{query} /* loud */", *args, **options)

    token = CancellationToken()
    with contextlib.closing(guarded3.connect(server.conninfo, cursor_factory=Loud)) as connection, use_token(token):
        connection.execute("select %s", (1,))
        assert isinstance(connection.cursor(), Loud)
        token.cancel()
        with pytest.raises(Cancelled):
            connection.execute("commit")
        connection.execute("rollback")
    assert server.log == ["BEGIN", "select 1 /* loud */", "ROLLBACK", "BEGIN", "rollback /* loud */"]


def test_connecting_ends_with_the_token():
    """A server that never answers the greeting; psycopg looks up every tenth of a second."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        conninfo = f"host=127.0.0.1 port={silent.getsockname()[1]} user=u sslmode=disable gssencmode=disable"
        with pytest.raises(DeadlineExceeded), fail_after(0.05):
            guarded3.connect(conninfo)


def test_an_answer_that_nobody_will_read_costs_the_connection(connection3, server):
    """Refused in the middle of an answer: what is left of it must not be taken for the next one."""
    connection3.autocommit = True
    connection3.pgconn.send_query(b"SELECT 1")
    token = CancellationToken()
    token.cancel()
    with use_token(token), pytest.raises(Cancelled):
        connection3.execute("SELECT 1")
    assert connection3.closed
    wait_until(lambda: server.log == ["SELECT 1"])


# --- psycopg2 -----------------------------------------------------------------------------------------------


@pytest.fixture
def connection2(server):
    with contextlib.closing(guarded2.connect(server.conninfo)) as connection:
        yield connection


FETCHES = {
    "fetchone": lambda cursor: cursor.fetchone(),
    "fetchmany": lambda cursor: cursor.fetchmany(5),
    "fetchall": lambda cursor: cursor.fetchall(),
    "next": next,
}


@pytest.mark.parametrize("factory", [None, psycopg2.extras.RealDictCursor])
@pytest.mark.parametrize("fetch", FETCHES)
def test_a_fetch_from_a_named_cursor_is_cancelled(connection2, server, fetch, factory):
    """The rows are at the server; closing the cursor, which went with its transaction, does not hide the cancel."""
    token = CancellationToken()

    def work():
        with connection2.cursor("named", cursor_factory=factory) as cursor:
            cursor.execute("HANG")
            FETCHES[fetch](cursor)

    attempt = Attempt(work, token)
    assert server.hanging.wait(WAIT)
    token.cancel()
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert isinstance(failure.__cause__, psycopg2.errors.QueryCanceled)
    assert server.log[-1] == "ROLLBACK"


def test_a_named_cursor_is_scrolled_and_closed(connection2, server):
    """A cursor that has not gone with its transaction is closed at the server."""
    cursor = connection2.cursor("named")
    cursor.execute("HANG")
    with use_token(CancellationToken()):
        cursor.scroll(5)
    cursor.close()
    assert server.log[-1] == 'CLOSE "named"'


def test_rows_that_are_here_are_fetched_without_a_guard(connection2):
    """An ordinary cursor has all its rows: reading them cannot block."""
    cursor = run(connection2, "SELECT 1")
    assert list(cursor) == [(1,)]
    cursor = run(connection2, "SELECT 1")
    assert cursor.fetchmany() == [(1,)]
    assert cursor.fetchall() == []
    cursor.close()
    assert cursor.closed


def test_bad_factories_are_named(server, connection2):
    """What could not be cancelled is refused at once."""
    with pytest.raises(TypeError, match="connection_factory must be a subclass of"):
        guarded2.connect(server.conninfo, connection_factory=psycopg2.extensions.connection)
    with pytest.raises(TypeError, match="cursor_factory must be a class of psycopg2 cursors, not <class 'int'>"):
        connection2.cursor(cursor_factory=int)


def test_a_cancelled_request_does_not_connect(server):
    """It is refused before, or as soon as the connection is there."""
    token = CancellationToken()
    token.cancel()
    with use_token(token), pytest.raises(Cancelled):
        guarded2.connect(server.conninfo)
    assert not server.sessions
