"""PyMySQL against a small MariaDB that hangs on cue; the real one is in compat/."""

from __future__ import annotations

import contextlib
import threading

import pymysql
import pytest
from peers import Attempt, blocked_in, wait_until
from peers.mysql import MySQL
from pymysql.cursors import SSCursor

from tokenscope import CancellationToken, Cancelled, DeadlineExceeded, ThreadScope, fail_after, use_token
from tokenscope.integrations.pymysql import connect

WAIT = 10.0


def connect_to(server, **options):
    return connect(host="127.0.0.1", port=server.port, user="u", **options)


@contextlib.contextmanager
def connected(server, **options):
    connection = connect_to(server, **options)
    try:
        yield connection
    finally:
        if connection.open:
            connection.close()


@pytest.fixture
def server():
    with MySQL() as server:
        yield server


@pytest.fixture
def connection(server):
    with connected(server) as connection:
        yield connection


def run(connection, sql, cursorclass=None):
    cursor = connection.cursor(cursorclass)
    cursor.execute(sql)
    return cursor


def hang(connection, server, token, sql="HANG") -> Attempt:
    attempt = Attempt(lambda: run(connection, sql), token)
    assert server.hanging.wait(WAIT)
    return attempt


def test_a_blocked_statement_is_killed_at_the_server(connection, server):
    """The server stops, the caller hears `Cancelled` from the driver's error, the transaction is rolled back."""
    token = CancellationToken()
    attempt = hang(connection, server, token)
    token.cancel("the reader left")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert isinstance(failure.__cause__, pymysql.OperationalError)
    assert server.log == ["HANG", "ROLLBACK"]
    with use_token(CancellationToken()):
        assert run(connection, "SELECT 1").fetchone() == ("1",)


def test_a_server_that_does_not_obey_loses_its_client():
    """Then the connection is broken, and closed."""
    with MySQL(deaf=True) as server, connected(server) as connection:
        token = CancellationToken()
        attempt = hang(connection, server, token)
        token.cancel()
        assert isinstance(attempt.failure(), Cancelled)
        assert server.cancels >= 3
        assert not connection.open


def test_a_success_after_a_kill_is_not_believed(connection, server):
    """GET_LOCK answers NULL, BENCHMARK answers 0: as if they had ended. The caller is told, the connection closed."""
    token = CancellationToken()
    attempt = hang(connection, server, token, "LIE")
    token.cancel()
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert failure.__cause__ is None
    assert not connection.open
    connection.close()  # by its pool, say: no error


def test_rows_that_are_read_one_by_one_are_cut(connection, server):
    """An unbuffered cursor blocks in the middle of its rows; closing it does not read the rest."""
    token, reading = CancellationToken(), threading.Event()

    def work():
        with run(connection, "ROWS", SSCursor) as cursor:
            for _row in cursor:
                reading.set()

    attempt = Attempt(work, token)
    assert reading.wait(WAIT)
    wait_until(lambda: connection._guard._calls)
    token.cancel()
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert isinstance(failure.__cause__, pymysql.OperationalError)
    assert server.log == ["ROWS", "ROLLBACK"]
    assert connection.open


def test_rows_that_nobody_will_read_cost_the_connection(connection, server):
    """Refused in the middle of its rows: the server is stopped, and what is left is not taken for the next answer."""
    token = CancellationToken()
    with use_token(token), pytest.raises(Cancelled), run(connection, "ROWS", SSCursor) as cursor:
        assert cursor.fetchone() == ("1",)
        assert server.hanging.wait(WAIT)
        token.cancel()
        cursor.fetchone()
    assert not connection.open
    assert server.cancels == 1


def test_a_deadline_ends_a_statement(connection):
    """The statement has as much time as its token."""
    with pytest.raises(DeadlineExceeded), fail_after(0.05):
        run(connection, "HANG")


@pytest.mark.parametrize("how", ["method", "statement"])
def test_a_cancel_never_comes_between_commit_and_its_answer(connection, server, how):
    """The server has been asked to commit and has not answered yet: nothing is killed."""
    server.commits.clear()
    token = CancellationToken()
    commit = connection.commit if how == "method" else lambda: run(connection, "COMMIT")
    attempt = Attempt(commit, token)
    assert server.committing.wait(WAIT)
    token.cancel("too late")
    attempt.thread.join(0.05)
    server.commits.set()
    attempt.value()
    assert server.cancels == 0
    assert server.log == ["COMMIT"]


def test_a_commit_of_a_cancelled_request_is_refused(connection, server):
    """So is turning autocommit on, which commits. A rollback is not."""
    token = CancellationToken()
    run(connection, "INSERT")
    token.cancel()
    with use_token(token):
        with pytest.raises(Cancelled):
            connection.autocommit(True)
        assert server.log == ["INSERT", "ROLLBACK"]
        connection.autocommit(True)  # there is nothing to commit any more
        with pytest.raises(Cancelled):
            connection.commit()
        connection.rollback()
    assert "COMMIT" not in server.log


def test_a_cleanup_may_use_the_database(connection, server):
    """Its queries run although the request is over."""
    with ThreadScope() as scope:
        scope.defer(run, connection, "SELECT 1")
        scope.defer(connection.ping)
        scope.cancel()
    assert server.log == ["SELECT 1"]


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


def test_connecting_ends_with_the_token(server):
    """A server that never greets; the socket is shut down, for there is nothing to kill yet."""
    server.greets = False
    token = CancellationToken()
    attempt = Attempt(lambda: connect_to(server), token)
    wait_until(lambda: blocked_in(attempt.thread, "_read_packet"))
    token.cancel()
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert isinstance(failure.__cause__, pymysql.OperationalError)


def test_connecting_under_a_token(server):
    """A live token changes nothing, a cancelled one refuses, and nobody there is PyMySQL's own error."""
    token = CancellationToken()
    with use_token(token):
        with connected(server) as connection:
            assert connection.get_host_info() == f"socket 127.0.0.1:{server.port}"
        with pytest.raises(pymysql.OperationalError, match=r"Can't connect to MySQL server on '127\.0\.0\.1'"):
            connect(host="127.0.0.1", port=1, user="u")
        token.cancel()
        with pytest.raises(Cancelled):
            connect_to(server)
