"""Django's databases on sqlite3: `atomic`, savepoints and persistent connections, and queries that are cut in them."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from dataclasses import replace

import django
import pytest
from django.apps import apps
from django.conf import settings
from django.db import OperationalError, connections, transaction
from django.db.backends.sqlite3 import base
from peers import Attempt, blocked_in, wait_until

from tokenscope import CancellationToken, Cancelled, DeadlineExceeded, TokenScopeError, fail_after, use_token
from tokenscope.integrations import django_db
from tokenscope.integrations.sqlite3 import Connection

WAIT = 10.0

#: Never ends; `mark` tells when it has come to its second row.
COUNTING = "WITH RECURSIVE n(x) AS (SELECT 0 UNION ALL SELECT x + 1 FROM n)"
ENDLESS = f"{COUNTING} SELECT max(mark(x)) FROM n"


class Site:
    """A database of Django's, and a mark that its queries leave."""

    def __init__(self, path) -> None:
        connections.databases["notes"] = {
            **connections.databases["default"],
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": path,
            "CONN_MAX_AGE": None,
        }
        self.path = path
        self.running = threading.Event()

    def database(self):
        """Return the database of this thread, connected."""
        database = connections["notes"]
        database.ensure_connection()
        database.connection.create_function("mark", 1, self.mark)
        return database

    def mark(self, number: int) -> int:
        if number == 1:
            self.running.set()
        return number

    def query(self, sql, *parameters):
        with self.database().cursor() as cursor:
            cursor.execute(sql, *parameters)
            return cursor.fetchall()

    def write(self, text) -> None:
        self.query("INSERT INTO notes VALUES (%s)", [text])

    def notes(self) -> list[str]:
        return [text for (text,) in self.query("SELECT text FROM notes ORDER BY rowid")]

    def cut(self, work) -> Cancelled:
        """Run work that blocks on a thread, as a request, and cancel it there."""

        def request():
            try:
                work()
            finally:
                self.after(connections["notes"])
                connections["notes"].close()

        token = CancellationToken()
        self.running.clear()
        attempt = Attempt(request, token)
        assert self.running.wait(WAIT)
        token.cancel("the reader left")
        failure = attempt.failure()
        assert isinstance(failure, Cancelled)
        return failure

    def after(self, database) -> None:
        """The request has ended; overridden by tests that look at what it leaves."""


@pytest.fixture(scope="module", autouse=True)
def _django():
    if not settings.configured:
        settings.configure()
    if not apps.ready:
        django.setup()


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path / "notes.db")
    django_db.instrument("notes")
    site.query("CREATE TABLE notes (text)")
    yield site
    django_db.uninstrument()
    connections["notes"].close()
    del connections["notes"]
    del connections.databases["notes"]


def test_a_query_is_cut(site):
    """The cause is the driver's error, and the connection serves the next request of the thread."""
    usable = []
    site.after = lambda database: usable.append((type(database.connection), database.get_autocommit()))
    failure = site.cut(lambda: site.query(ENDLESS))
    assert "interrupted" in str(failure.__cause__)
    assert usable == [(Connection, True)]


def test_parameters_are_django_s(site):
    """Percent signs and names go through Django's own cursor, which stays in charge."""
    with use_token(CancellationToken()):
        assert site.query("SELECT %s || '%%'", ["a"]) == [("a%",)]
        assert site.query("SELECT '100%'") == [("100%",)]
        assert site.query("SELECT %(a)s", {"a": 1}) == [(1,)]
        with site.database().cursor() as cursor:
            cursor.executemany("INSERT INTO notes VALUES (%s)", [["a"], ["b"]])
        assert site.notes() == ["a", "b"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_atomic_blocks_are_rolled_back(site, depth):
    """Savepoints that are gone with the transaction do not hide the cancel."""
    usable = []
    site.after = lambda database: usable.append((database.in_atomic_block, database.get_autocommit()))

    def work(depth=depth):
        with transaction.atomic(using="notes"):
            site.write("half")
            if depth > 1:
                work(depth - 1)
            else:
                site.query(ENDLESS)

    failure = site.cut(work)
    assert "interrupted" in str(failure.__cause__)
    assert usable == [(False, True)]
    assert site.notes() == []


def test_a_cancelled_request_does_not_commit(site):
    """The cancel comes before the end of the block."""
    token = CancellationToken()
    with use_token(token), pytest.raises(Cancelled), transaction.atomic(using="notes"):
        site.write("never")
        token.cancel()
    assert site.notes() == []
    assert site.database().get_autocommit()


def test_a_commit_that_has_begun_is_made(site):
    """COMMIT waits for a reader; the cancel comes meanwhile; hooks on commit run."""
    reader = sqlite3.connect(site.path)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM notes").fetchall()
    token, hooks = CancellationToken(), []

    def work():
        with transaction.atomic(using="notes"):
            site.write("mine")
            transaction.on_commit(lambda: hooks.append("ran"), using="notes")
        connections["notes"].close()

    attempt = Attempt(work, token)
    wait_until(lambda: blocked_in(attempt.thread, "commit") and blocked_in(attempt.thread, "_waiting_for_locks"))
    token.cancel("too late")
    reader.close()
    attempt.value()
    assert site.notes() == ["mine"]
    assert hooks == ["ran"]


def test_a_deadline_ends_a_query(site):
    """The query has as much time as its token."""
    with pytest.raises(DeadlineExceeded), fail_after(0.05):
        site.query(ENDLESS)


def test_errors_of_a_live_token_are_django_s(site):
    """The driver's errors still become Django's."""
    with use_token(CancellationToken()), pytest.raises(OperationalError, match="no such table"):
        site.query("SELECT * FROM elsewhere")


@pytest.mark.parametrize("atomic", [False, True])
def test_a_connection_in_doubt_is_not_kept_for_the_next_request(site, atomic):
    """Connections are persistent here; one that was closed below Django would fail the next request."""
    left = []
    site.after = lambda database: left.append(database.connection)

    def work():
        guard = site.database().connection._guard
        guard._driver = replace(guard._driver, is_certain=lambda *_: False)  # as if the answer had said nothing
        with transaction.atomic(using="notes") if atomic else contextlib.nullcontext():
            site.query(ENDLESS)

    site.cut(work)
    assert left == [None]


def test_instrumenting_is_idempotent_and_can_be_undone(site):
    """Twice is once; connections that are opened afterwards are the driver's own."""
    django_db.instrument("notes")
    assert isinstance(site.database().connection, Connection)
    django_db.uninstrument()
    django_db.uninstrument()
    connections["notes"].close()
    assert type(site.database().connection) is sqlite3.Connection
    assert base.Database is sqlite3.dbapi2
    assert base.DatabaseWrapper.Database is sqlite3.dbapi2


def test_what_cannot_be_cancelled_is_refused(site, monkeypatch):
    """A vendor or a driver without an integration: said at once, with its name, and nothing is changed."""
    django_db.uninstrument()
    monkeypatch.setattr(base.DatabaseWrapper, "vendor", "oracle")
    with pytest.raises(TokenScopeError, match="database 'notes': it is of oracle"):
        django_db.instrument("notes")
    monkeypatch.undo()
    monkeypatch.setattr(base, "Database", threading)
    with pytest.raises(TokenScopeError, match="driver 'threading'"):
        django_db.instrument("notes")
    assert base.Database is threading
