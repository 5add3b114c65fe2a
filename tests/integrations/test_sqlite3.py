"""sqlite3: a cancel ends what a connection is blocked in, and leaves the database as if nothing had been asked."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import sys
import threading

import pytest
from peers import Attempt, blocked_in, wait_until

import tokenscope
from tokenscope import CancellationToken, Cancelled, DeadlineExceeded, ThreadScope, fail_after, use_token
from tokenscope._core.current import uninterruptible
from tokenscope.integrations.sqlite3 import Connection, Cursor, connect

WAIT = 10.0

#: Never ends; `mark` tells when it has come to its second row.
COUNTING = "WITH RECURSIVE n(x) AS (SELECT 0 UNION ALL SELECT x + 1 FROM n)"
ENDLESS = f"{COUNTING} SELECT max(mark(x)) FROM n"
ONE_ROW_THEN_ENDLESS = f"{COUNTING} SELECT x FROM n WHERE mark(x) < 1"


class Store:
    """A database in a file, a connection that requests share one after the other, and a mark that queries leave."""

    def __init__(self, path) -> None:
        self.path = path
        self.running = threading.Event()
        self.connection = self.connect()
        with self.connection:
            self.connection.execute("CREATE TABLE notes (text)")

    def connect(self, **options) -> Connection:
        connection = connect(self.path, check_same_thread=False, **options)
        connection.create_function("mark", 1, self.mark)
        return connection

    def mark(self, number: int) -> int:
        if number == 1:
            self.running.set()
        return number

    def notes(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.path)) as other:
            return [text for (text,) in other.execute("SELECT text FROM notes ORDER BY rowid")]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "notes.db")
    yield store
    store.connection.close()


@pytest.fixture
def other(store):
    """Another program that uses the same database, and holds the lock for writing when asked to."""
    with contextlib.closing(sqlite3.connect(store.path, timeout=0, check_same_thread=False)) as connection:
        yield connection


def let_go(other) -> None:
    """Whoever waits for the lock looks at the file each time it tries, and holds up a COMMIT that moment."""
    other.execute("PRAGMA busy_timeout = 10000")
    other.execute("COMMIT")


def fetch_second(connection, fetch):
    cursor = connection.execute(ONE_ROW_THEN_ENDLESS)
    assert cursor.fetchone() == (0,)
    return fetch(cursor)


CALLS = {
    "execute": lambda c: c.cursor().execute(ENDLESS),
    "connection.execute": lambda c: c.execute(ENDLESS),
    "executemany": lambda c: c.executemany(f"INSERT INTO notes {ENDLESS} WHERE x > ?", [(0,)]),
    "executescript": lambda c: c.executescript(f"INSERT INTO notes VALUES ('script'); {ENDLESS};"),
    "fetchone": lambda c: fetch_second(c, lambda cursor: cursor.fetchone()),
    "fetchmany": lambda c: fetch_second(c, lambda cursor: cursor.fetchmany(5)),
    "fetchall": lambda c: fetch_second(c, lambda cursor: cursor.fetchall()),
    "next": lambda c: fetch_second(c, next),
    "insert": lambda c: c.execute(f"INSERT INTO notes {ENDLESS}"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_blocked_call_raises_cancelled_and_the_connection_stays_good(store, call):
    """Wherever SQLite is at work: it stops, its error is the cause, and the next request may have the connection."""
    token = CancellationToken()
    attempt = Attempt(lambda: call(store.connection), token)
    assert store.running.wait(WAIT)
    token.cancel("the reader left")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert isinstance(failure.__cause__, sqlite3.OperationalError)
    assert "interrupted" in str(failure.__cause__)
    assert not store.connection.in_transaction
    with use_token(CancellationToken()):
        assert store.connection.execute("SELECT 1").fetchone() == (1,)


def test_the_whole_transaction_is_rolled_back(store):
    """What the request had written before it was cut is not there, and cannot be committed by whoever comes next."""
    token = CancellationToken()

    def work():
        store.connection.execute("INSERT INTO notes VALUES ('half')")
        store.connection.execute(ENDLESS)

    attempt = Attempt(work, token)
    assert store.running.wait(WAIT)
    token.cancel()
    attempt.failure()
    with store.connection:
        store.connection.execute("INSERT INTO notes VALUES ('next')")
    assert store.notes() == ["next"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the attribute `autocommit` is of Python 3.12")
@pytest.mark.parametrize("autocommit", [True, False])
def test_the_newer_transaction_modes_are_rolled_back_as_well(store, autocommit):
    """With ``autocommit=True`` the method does nothing about a BEGIN of the user's; with False one is always open."""
    token = CancellationToken()
    with contextlib.closing(store.connect(autocommit=autocommit)) as connection:

        def work():
            if autocommit:
                connection.execute("BEGIN")
            connection.execute("INSERT INTO notes VALUES ('half')")
            connection.execute(ENDLESS)

        attempt = Attempt(work, token)
        assert store.running.wait(WAIT)
        token.cancel()
        attempt.failure()
        connection.execute("INSERT INTO notes VALUES ('next')")
        connection.commit()
    assert store.notes() == ["next"]


def test_a_deadline_ends_a_query(store):
    """The query has as much time as its token."""
    with pytest.raises(DeadlineExceeded) as caught, fail_after(0.05):
        store.connection.execute(ENDLESS)
    assert isinstance(caught.value.__cause__, Cancelled)


def test_a_failing_sibling_ends_a_query(store):
    """In a scope a query is a child's blocked call like any other."""

    def fail():
        assert store.running.wait(WAIT)
        raise KeyError("sibling")

    with pytest.raises(ExceptionGroup) as caught, ThreadScope() as scope:
        scope.spawn(store.connection.execute, ENDLESS)
        scope.spawn(fail)
    assert [type(error) for error in caught.value.exceptions] == [KeyError]


@pytest.mark.timeout(60)
def test_many_short_statements_end_between_two_rows(store):
    """An interrupt rarely meets a statement of microseconds; the rows end all the same, and nothing was written."""
    token = CancellationToken()

    def endless_rows():
        for number in itertools.count():
            store.mark(number)
            yield (str(number),)

    attempt = Attempt(lambda: store.connection.executemany("INSERT INTO notes VALUES (?)", endless_rows()), token)
    assert store.running.wait(WAIT)
    token.cancel("the reader left")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert isinstance(failure.__cause__, sqlite3.OperationalError)
    assert not store.connection.in_transaction
    assert store.notes() == []


def test_many_rows_where_nothing_may_be_cut_are_not_ended(store):
    """Where calls are out of a cancel's reach, as in cleanups whose time is over, their rows are, too."""
    token = CancellationToken()
    token.cancel()
    with uninterruptible(), use_token(token):
        store.connection.executemany("INSERT INTO notes VALUES (?)", [("a",), ("b",)])
        store.connection.commit()
    assert store.notes() == ["a", "b"]


def test_a_query_that_others_had_read_half_does_not_spoil_the_connection(store):
    """SQLite would end whatever comes after an interrupt, the ROLLBACK included, until that query is over."""
    connection = store.connection
    with connection:
        connection.executemany("INSERT INTO notes VALUES (?)", [("a",), ("b",), ("c",)])
    half_read = connection.execute("SELECT text FROM notes")
    assert half_read.fetchone() == ("a",)
    also_half_read = connection.execute("SELECT text FROM notes")
    blob = connection.blobopen("notes", "text", 1)
    connection.execute("INSERT INTO notes VALUES ('half')")
    token = CancellationToken()
    attempt = Attempt(lambda: connection.execute(ENDLESS), token)
    assert store.running.wait(WAIT)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    assert not connection.in_transaction
    assert connection.execute("SELECT text FROM notes").fetchall() == [("a",), ("b",), ("c",)]
    for read in (half_read.fetchone, half_read.fetchmany, half_read.fetchall, also_half_read.__next__):
        with pytest.raises(sqlite3.OperationalError, match="a cancel ended this query before all"):
            read()
    with pytest.raises(sqlite3.ProgrammingError, match="closed blob"):
        blob.read()
    assert half_read.execute("SELECT 1").fetchall() == [(1,)]
    assert half_read.executemany("INSERT INTO notes VALUES (?)", []).fetchall() == []


def test_an_interrupt_that_came_too_late_does_not_spoil_the_connection(store):
    """The call that was meant has its first row; the next request finds no interrupt that waits for it."""
    token = CancellationToken()
    connection = store.connection
    is_interrupted = threading.Event()

    def interrupt():
        token.cancel()
        wait_until(lambda: any(call.fired for call in connection._guard._calls))
        is_interrupted.set()
        return 1

    connection.create_function("interrupt", 0, interrupt)
    with use_token(token):
        cursor = connection.execute("SELECT interrupt()")  # one short statement: nothing in it looks up
    assert is_interrupted.is_set()
    assert cursor.description[0][0] == "interrupt()"  # what is asked to read on still has columns
    with use_token(CancellationToken()):
        assert connection.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(sqlite3.OperationalError, match="a cancel ended this query"):
            cursor.fetchone()


def test_errors_of_its_own_stay_what_they_are(store):
    """A live token changes nothing."""
    with use_token(CancellationToken()):
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            store.connection.execute("SELECT * FROM elsewhere")
        with pytest.raises(sqlite3.IntegrityError):
            store.connection.executescript("CREATE TABLE u (x UNIQUE); INSERT INTO u VALUES (1), (1);")


def test_a_late_cancel_does_not_touch_the_next_request(store):
    """The first request has ended, and its token is cancelled while the second one reads."""
    first, second = CancellationToken(), CancellationToken()
    with use_token(first):
        store.connection.execute("SELECT 1").fetchall()
    query = f"{COUNTING} SELECT mark(x) FROM n LIMIT 100000"
    attempt = Attempt(lambda: store.connection.execute(query).fetchall(), second)
    assert store.running.wait(WAIT)
    for _ in range(5):
        first.cancel("late")
        store.connection._guard.wake()
    assert len(attempt.value()) == 100_000


# --- transactions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["method", "statement", "with"])
def test_a_cancel_never_comes_between_commit_and_its_answer(store, other, how):
    """COMMIT waits for a reader; the cancel comes meanwhile; the commit is made, and says so."""
    other.execute("BEGIN")
    other.execute("SELECT * FROM notes").fetchall()  # holds its lock: COMMIT has to wait for it
    token = CancellationToken()
    connection = store.connection

    def work():
        with connection if how == "with" else contextlib.nullcontext():
            connection.execute("INSERT INTO notes VALUES ('mine')")
            if how == "method":
                connection.commit()
            elif how == "statement":
                connection.execute("COMMIT")
        return "committed"

    attempt = Attempt(work, token)
    wait_until(lambda: blocked_in(attempt.thread, "_waiting_for_locks") and blocked_in(attempt.thread, "commit"))
    token.cancel("too late")
    attempt.thread.join(0.05)
    assert attempt.thread.is_alive()
    other.execute("ROLLBACK")
    assert attempt.value() == "committed"
    assert store.notes() == ["mine"]


def test_a_commit_of_a_cancelled_request_is_refused(store):
    """Exactly one of cancel and commit wins; leaving the ``with`` rolls back."""
    token = CancellationToken()
    with use_token(token), pytest.raises(Cancelled), store.connection:
        store.connection.execute("INSERT INTO notes VALUES ('never')")
        token.cancel()
    assert not store.connection.in_transaction
    assert store.notes() == []


def test_changing_the_mode_of_a_connection_is_a_commit_too(store):
    """The standard library commits when ``isolation_level`` becomes None (and ``autocommit`` True): refused as well."""
    token = CancellationToken()
    connection = store.connection
    with use_token(token):
        connection.execute("INSERT INTO notes VALUES ('kept')")
        connection.isolation_level = None
        connection.isolation_level = "IMMEDIATE"
        assert connection.isolation_level == "IMMEDIATE"
        connection.execute("INSERT INTO notes VALUES ('never')")
        token.cancel()
        with pytest.raises(Cancelled):
            connection.isolation_level = None
    assert not connection.in_transaction
    if sys.version_info >= (3, 12):
        connection.autocommit = False
        connection.execute("INSERT INTO notes VALUES ('never')")
        with use_token(token), pytest.raises(Cancelled):
            connection.autocommit = True
        connection.rollback()
    assert store.notes() == ["kept"]


def test_a_rollback_works_under_a_cancelled_token(store):
    """Whoever is cancelled can still put things in order."""
    token = CancellationToken()
    with use_token(token):
        store.connection.execute("INSERT INTO notes VALUES ('never')")
        token.cancel()
        store.connection.rollback()
    assert not store.connection.in_transaction


def test_a_cleanup_may_write(store):
    """In a cleanup the request is over, and its database calls work."""
    with ThreadScope() as scope:

        @scope.defer
        def note():
            with store.connection:
                store.connection.execute("INSERT INTO notes VALUES ('was cancelled')")

        scope.cancel()
        with contextlib.suppress(Cancelled):
            tokenscope.check()
    assert store.notes() == ["was cancelled"]


# --- waiting for a lock -------------------------------------------------------------------------------------

WRITES = {
    "execute": lambda c: c.execute("INSERT INTO notes VALUES ('mine')"),
    "executemany": lambda c: c.executemany("INSERT INTO notes VALUES (?)", [("mine",)]),
    "begin": lambda c: c.execute("BEGIN IMMEDIATE"),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_the_wait_for_a_lock_is_interrupted(store, other, write):
    """``interrupt`` alone would not reach it: SQLite sleeps there for as long as ``timeout`` says."""
    other.execute("BEGIN IMMEDIATE")
    token = CancellationToken()
    with contextlib.closing(store.connect(timeout=3600.0)) as connection:
        attempt = Attempt(lambda: write(connection), token)
        wait_until(lambda: blocked_in(attempt.thread, "_waiting_for_locks"))
        token.cancel()
        failure = attempt.failure()
        assert isinstance(failure, Cancelled)
        assert isinstance(failure.__cause__, sqlite3.OperationalError)
        assert not connection.in_transaction


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_the_wait_for_a_lock_ends_with_the_lock(store, other, write):
    """Whoever is not cancelled gets the lock when the other one lets go, as ever."""
    other.execute("BEGIN IMMEDIATE")
    attempt = Attempt(lambda: write(store.connection))
    wait_until(lambda: blocked_in(attempt.thread, "_waiting_for_locks"))
    attempt.thread.join(0.03)
    let_go(other)
    attempt.value()
    store.connection.commit()


def test_a_script_waits_for_a_lock_as_long_as_any_other_statement(store, other):
    """It cannot be tried again, so SQLite itself waits for the whole time; afterwards all is as before."""
    other.execute("BEGIN IMMEDIATE")
    script = "INSERT INTO notes VALUES ('a'); INSERT INTO notes VALUES ('b');"
    attempt = Attempt(lambda: store.connection.executescript(script))
    wait_until(lambda: blocked_in(attempt.thread, "_run_script"))
    attempt.thread.join(0.03)
    let_go(other)
    attempt.value()
    assert store.notes() == ["a", "b"]
    assert store.connection.execute("PRAGMA busy_timeout").fetchone() == (5,)


def test_the_wait_for_a_lock_has_a_timeout(store, other):
    """``timeout`` means what it means in the standard library."""
    other.execute("BEGIN IMMEDIATE")
    with contextlib.closing(store.connect(timeout=0.05)) as connection:
        with pytest.raises(sqlite3.OperationalError, match="locked"), use_token(CancellationToken()):
            connection.execute("INSERT INTO notes VALUES ('mine')")


def test_two_that_wait_for_each_other_are_told_at_once(store, other):
    """SQLite does not wait where that could not end; neither do we, however long the timeout."""
    other.execute("BEGIN IMMEDIATE")
    other.execute("INSERT INTO notes VALUES ('theirs')")
    with contextlib.closing(store.connect(timeout=3600.0)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT * FROM notes").fetchall()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            connection.execute("INSERT INTO notes VALUES ('mine')")


def test_many_rows_are_each_written_once_although_one_had_to_wait(store, other):
    """The wait begins at the third row: that one is written again, and no other."""
    rows_wait, rows_go = threading.Event(), threading.Event()

    def rows():
        yield ("one",)
        yield ("two",)
        rows_wait.set()
        assert rows_go.wait(WAIT)
        yield ("three",)
        yield ("four",)

    with contextlib.closing(store.connect(isolation_level=None)) as connection:
        cursor = connection.cursor()
        attempt = Attempt(lambda: cursor.executemany("INSERT INTO notes VALUES (?)", rows()))
        assert rows_wait.wait(WAIT)
        other.execute("BEGIN IMMEDIATE")
        rows_go.set()
        attempt.thread.join(0.03)
        assert attempt.thread.is_alive()
        other.execute("ROLLBACK")
        attempt.value()
        assert store.notes() == ["one", "two", "three", "four"]
        assert cursor.rowcount == -1
        assert cursor.executemany("INSERT INTO notes VALUES (?)", [("a",), ("b",)]).rowcount == 2
        assert cursor.execute("DELETE FROM notes").rowcount == 6


# --- a drop-in ----------------------------------------------------------------------------------------------


def test_it_is_a_drop_in(store):
    """Rows, factories, blobs and context managers are the standard library's."""
    connection = store.connection
    assert isinstance(connection, sqlite3.Connection)
    with connection:
        connection.executemany("INSERT INTO notes VALUES (?)", [("a",), ("b",)])
    cursor = connection.execute("SELECT text FROM notes ORDER BY text")
    assert isinstance(cursor, Cursor)
    assert cursor.fetchmany() == [("a",)]
    connection.row_factory = sqlite3.Row
    assert [row["text"] for row in connection.execute("SELECT text FROM notes ORDER BY text")] == ["a", "b"]
    with connection.blobopen("notes", "text", 1) as blob:
        assert blob.read() == b"a"


def test_bad_arguments_are_named(store):
    """What could not be cancelled, or makes no sense, is refused at once."""
    with pytest.raises(TypeError, match=r"factory must be a subclass of .*, not <class 'sqlite3.Connection'>"):
        connect(":memory:", factory=sqlite3.Connection)
    with pytest.raises(TypeError, match="timeout must be a number of seconds, not 'soon'"):
        connect(":memory:", timeout="soon")
    with pytest.raises(TypeError, match="factory must be a class of sqlite3 cursors, not <class 'int'>"):
        store.connection.cursor(int)


def test_cursor_classes_of_others_are_made_cancellable(store):
    """Frameworks bring their own; what those add stays."""

    class Shouting(sqlite3.Cursor):
        def execute(self, sql, parameters=None):
            return super().execute(sql.upper()) if parameters is None else super().execute(sql, parameters)

    cursor = store.connection.cursor(Shouting)
    assert cursor.execute("select 'a'").fetchall() == [("A",)]
    assert cursor.execute("select ?", ("a",)).fetchall() == [("a",)]
    token = CancellationToken()
    attempt = Attempt(lambda: cursor.execute(ENDLESS, ()), token)
    assert store.running.wait(WAIT)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
