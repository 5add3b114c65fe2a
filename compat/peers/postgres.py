"""What the story of a database needs to know about PostgreSQL, whichever driver it is told to.

Where it is, the usual variables say (`PGHOST`, `PGPORT`, `PGUSER`, `PGDATABASE`, `PGPASSWORD`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from compat.stage import await_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENDLESS = "SELECT pg_sleep(600)"
ROWS = "SELECT x, pg_sleep(CASE WHEN x > 25 THEN 600 ELSE 0 END) FROM generate_series(1, 100) AS x"

_CONNINFO = " ".join(
    f"{word}={os.environ.get(variable, default)}"
    for word, variable, default in (
        ("host", "PGHOST", "127.0.0.1"),
        ("port", "PGPORT", "5432"),
        ("user", "PGUSER", "postgres"),
        ("dbname", "PGDATABASE", "test"),
    )
)

_SETUP = """
CREATE SCHEMA {schema};
CREATE TABLE {schema}.notes (number serial, text text);
CREATE FUNCTION {schema}.pause() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER pause AFTER INSERT ON {schema}.notes DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.text = 'slow') EXECUTE FUNCTION {schema}.pause();
"""


class PostgresServer:
    """The server, as the story sees it.

    Args:
        connect: The guarded way to connect; takes a conninfo.
        plain: The driver's own.
    """

    def __init__(self, connect: Callable[[str], Any], plain: Callable[[str], Any]) -> None:
        self._schema = f"compat_{os.getpid()}"
        self._name = f"tokenscope-{os.getpid()}"
        self._connect = connect
        self._watch = plain(_CONNINFO)
        self._watch.autocommit = True
        self._ask(_SETUP.format(schema=self._schema))

    def close(self) -> None:
        self._ask(f"DROP SCHEMA {self._schema} CASCADE")
        self._watch.close()

    # --- connections under test -----------------------------------------------------------------------------

    def connect(self) -> Any:
        options = f"options='-c search_path={self._schema}' application_name={self._name}"
        return self._connect(f"{_CONNINFO} {options}")

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        with contextlib.closing(self.connect()) as connection:
            yield connection

    def scalar(self, connection: Any, sql: str) -> Any:
        cursor = connection.cursor()
        cursor.execute(sql)
        return cursor.fetchone()[0]

    def write(self, connection: Any, text: str) -> None:
        connection.cursor().execute("INSERT INTO notes (text) VALUES (%s)", (text,))

    def brief(self, connection: Any) -> None:
        """A query that takes about as long as a cancel needs."""
        assert self.scalar(connection, "SELECT 7 FROM pg_sleep(0.003)") == 7

    def closed(self, connection: Any) -> bool:
        return bool(connection.closed)

    def identity(self, connection: Any) -> int:
        return int(connection.info.backend_pid)

    # --- what the server says -------------------------------------------------------------------------------

    def _ask(self, sql: str, *values: Any) -> list[Any]:
        cursor = self._watch.cursor()
        cursor.execute(sql, values or None)
        return cursor.fetchall() if cursor.description else []

    def notes(self) -> list[str]:
        return [text for (text,) in self._ask(f"SELECT text FROM {self._schema}.notes ORDER BY number")]

    def clear(self) -> None:
        self._ask(f"DELETE FROM {self._schema}.notes")

    def connections(self) -> list[str]:
        rows = self._ask("SELECT pid FROM pg_stat_activity WHERE application_name = %s", self._name)
        return [f"backend {pid}" for (pid,) in rows]

    def _is_running(self, who: int) -> bool:
        return self._ask("SELECT state FROM pg_stat_activity WHERE pid = %s", who) == [("active",)]

    def await_running(self, connection: Any) -> int:
        """Wait until the server works for the connection, and return what it calls it."""
        who = self.identity(connection)
        await_until(lambda: self._is_running(who), "the server never began")
        time.sleep(0.02)  # past the beginning of the statement, into what it waits for
        return who

    def await_idle(self, who: int) -> float:
        """Wait until the server does not work for the connection any more, and return when that was."""
        return await_until(lambda: not self._is_running(who), "the server goes on with the query")

    # --- what the server is made to do ----------------------------------------------------------------------

    @contextlib.contextmanager
    def slow_commits(self) -> Iterator[Callable[[], object]]:
        """A commit of a note that says 'slow' takes half a second (a deferred trigger)."""
        yield lambda: None

    @contextlib.contextmanager
    def frozen(self, connection: Any) -> Iterator[None]:
        """The backend does nothing meanwhile, and does not hear a cancel either."""
        who = self.identity(connection)
        os.kill(who, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(who, signal.SIGCONT)
