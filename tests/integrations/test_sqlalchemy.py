"""SQLAlchemy on sqlite3: connections, sessions and pools, with statements that end with the current token."""

from __future__ import annotations

import contextlib
import random
import threading

import pytest
import sqlalchemy
from peers import Attempt, blocked_in, wait_until
from sqlalchemy import event, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool

from tokenscope import CancellationToken, Cancelled, DeadlineExceeded, TokenScopeError, fail_after, use_token
from tokenscope.integrations.sqlalchemy import instrument, uninstrument

WAIT = 10.0

#: Never ends; `mark` tells when it has come to its second row.
COUNTING = "WITH RECURSIVE n(x) AS (SELECT 0 UNION ALL SELECT x + 1 FROM n)"
ENDLESS = text(f"{COUNTING} SELECT max(mark(x)) FROM n")
ONE_ROW_THEN_ENDLESS = text(f"{COUNTING} SELECT x FROM n WHERE mark(x) < 1")


class Base(DeclarativeBase):
    """The base of the one table."""


class Note(Base):
    """A row."""

    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Store:
    """An engine on a file, and a mark that its queries leave."""

    def __init__(self, path, **options) -> None:
        self.running = threading.Event()
        self.engine = sqlalchemy.create_engine(f"sqlite:///{path}", **options)
        instrument(self.engine)
        event.listen(self.engine, "connect", self.prepare)
        Base.metadata.create_all(self.engine)

    def prepare(self, connection, _record) -> None:
        connection.create_function("mark", 1, self.mark)

    def mark(self, number: int) -> int:
        if number == 1:
            self.running.set()
        return number

    def notes(self) -> list[str]:
        with Session(self.engine) as session:
            return list(session.scalars(sqlalchemy.select(Note.text).order_by(Note.id)))

    def cut(self, work) -> Cancelled:
        """Run work that blocks, and cancel it there."""
        token = CancellationToken()
        self.running.clear()
        attempt = Attempt(work, token)
        assert self.running.wait(WAIT)
        token.cancel("the reader left")
        failure = attempt.failure()
        assert isinstance(failure, Cancelled)
        return failure


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "notes.db", pool_size=1, max_overflow=0)
    yield store
    store.engine.dispose()


def execute(store):
    with store.engine.connect() as connection:
        connection.execute(ENDLESS)


def fetch(store):
    with store.engine.connect() as connection:
        connection.execution_options(stream_results=True).execute(ONE_ROW_THEN_ENDLESS).fetchall()


def write(store):
    with store.engine.begin() as connection:
        connection.execute(text("INSERT INTO notes (text) VALUES ('half')"))
        connection.execute(ENDLESS)


def use_session(store):
    with Session(store.engine) as session, session.begin():
        session.add(Note(text="half"))
        session.flush()
        session.execute(ENDLESS)


@pytest.mark.parametrize("work", [execute, fetch, write, use_session])
def test_a_cut_statement_leaves_the_pool_as_it_was(store, work):
    """The driver's error is the cause, nothing half is left, and the one connection serves the next request."""
    with store.engine.connect() as connection:
        before = connection.connection.dbapi_connection
    failure = store.cut(lambda: work(store))
    assert "interrupted" in str(failure.__cause__)
    assert store.engine.pool.checkedout() == 0
    with store.engine.connect() as connection:
        assert connection.connection.dbapi_connection is before
    assert store.notes() == []


def test_a_transaction_with_savepoints_loses_its_connection(store):
    """They are gone with the transaction; rolling back to one would fail, and hide the cancel."""

    def work():
        with store.engine.begin() as connection:
            connection.execute(text("INSERT INTO notes (text) VALUES ('half')"))
            with connection.begin_nested():
                connection.execute(ENDLESS)

    with store.engine.connect() as connection:
        before = connection.connection.dbapi_connection
    store.cut(work)
    with store.engine.connect() as connection:
        assert connection.connection.dbapi_connection is not before
    assert store.notes() == []


def test_a_database_in_memory_survives_a_cut():
    """Its only connection is the database: invalidated, it would be lost."""
    store = Store(":memory:", poolclass=StaticPool, connect_args={"check_same_thread": False})
    with Session(store.engine) as session, session.begin():
        session.add(Note(text="kept"))
    store.cut(lambda: write(store))
    assert store.notes() == ["kept"]
    store.engine.dispose()


def test_a_deadline_ends_a_statement(store):
    """The statement has as much time as its token."""
    with pytest.raises(DeadlineExceeded), fail_after(0.05), store.engine.connect() as connection:
        connection.execute(ENDLESS)


def test_errors_of_a_live_token_are_sqlalchemy_s(store):
    """Nothing changes for who is not cancelled."""
    with use_token(CancellationToken()), store.engine.connect() as connection:
        with pytest.raises(sqlalchemy.exc.OperationalError, match="no such table"):
            connection.execute(text("SELECT * FROM elsewhere"))


def test_a_cancelled_request_does_not_commit(store):
    """The cancel comes before COMMIT: the block rolls back."""
    token = CancellationToken()
    with use_token(token), pytest.raises(Cancelled), Session(store.engine) as session, session.begin():
        session.add(Note(text="never"))
        session.flush()
        token.cancel()
    assert store.notes() == []


def test_a_commit_that_has_begun_is_made(store):
    """COMMIT waits for a reader; the cancel comes meanwhile."""
    token = CancellationToken()
    other = sqlalchemy.create_engine(store.engine.url)
    with contextlib.closing(other.raw_connection()) as reader:
        reader.cursor().execute("BEGIN")
        reader.cursor().execute("SELECT * FROM notes").fetchall()

        def work():
            with store.engine.begin() as connection:
                connection.execute(text("INSERT INTO notes (text) VALUES ('mine')"))

        attempt = Attempt(work, token)
        wait_until(lambda: blocked_in(attempt.thread, "commit") and blocked_in(attempt.thread, "_waiting_for_locks"))
        token.cancel("too late")
        reader.rollback()
        attempt.value()
    other.dispose()
    assert store.notes() == ["mine"]


def test_cancels_at_any_moment_harm_nobody_else(store):
    """Three hundred requests take turns on one connection; every other one is cancelled, wherever it is."""
    random.seed(7)
    count = text(f"{COUNTING} SELECT x FROM n LIMIT 300")
    cut = kept = 0
    for number in range(300):
        token = CancellationToken()
        timer = threading.Timer(random.random() * 0.002, token.cancel)
        if number % 2:
            timer.start()
        try:
            with use_token(token), Session(store.engine) as session, session.begin():
                session.add(Note(text=str(number)))
                assert len(session.execute(count).all()) == 300
            kept += 1
        except Cancelled:
            assert number % 2
            cut += 1
        if number % 2:
            timer.join(WAIT)
    assert cut + kept == 300
    assert len(store.notes()) == kept
    assert store.engine.pool.checkedout() == 0


def test_instrumenting_is_idempotent_and_can_be_undone(store):
    """Twice is once; connections that are made afterwards are SQLAlchemy's own again."""
    instrument(store.engine)
    uninstrument(store.engine)
    uninstrument(store.engine)
    store.engine.dispose()
    with store.engine.connect() as connection:
        assert type(connection.connection.dbapi_connection).__module__ == "sqlite3"


def test_what_cannot_be_cancelled_is_refused():
    """No engine, or a driver without an integration: said at once, with its name."""
    with pytest.raises(TypeError, match=r"engine must be a sqlalchemy\.Engine, not 'sqlite://'"):
        instrument("sqlite://")
    with pytest.raises(TypeError, match="engine must be"):
        uninstrument(None)
    engine = sqlalchemy.create_engine("sqlite://")
    engine.dialect.driver = "telepathy"
    with pytest.raises(TokenScopeError, match="driver 'telepathy'"):
        instrument(engine)
