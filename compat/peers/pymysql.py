"""PyMySQL on MariaDB: statements, unbuffered cursors, further results, and functions that answer a KILL with a lie.

Where it is, the variables `MYSQL_HOST`, `MYSQL_PORT`, `MYSQL_USER`, `MYSQL_PASSWORD` and `MYSQL_DATABASE` say.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pymysql
from pymysql.constants import CLIENT
from pymysql.cursors import SSCursor

from compat.stage import await_until
from tokenscope.integrations.pymysql import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Error = pymysql.Error

_OPTIONS: dict[str, Any] = {
    "host": os.environ.get("MYSQL_HOST", "127.0.0.1"),
    "port": int(os.environ.get("MYSQL_PORT", "3306")),
    "user": os.environ.get("MYSQL_USER", "root"),
    "password": os.environ.get("MYSQL_PASSWORD", ""),
    "database": os.environ.get("MYSQL_DATABASE", "test"),
}


class Server:
    """The server, as the story sees it."""

    def __init__(self) -> None:
        self._table = f"compat_{os.getpid()}"
        self._ours: set[int] = set()
        self._watch = pymysql.connect(**_OPTIONS, autocommit=True)
        self._ask(f"CREATE TABLE {self._table} (number INT AUTO_INCREMENT PRIMARY KEY, text TEXT) ENGINE=InnoDB")

    def close(self) -> None:
        self._ask(f"DROP TABLE {self._table}")
        self._watch.close()

    # --- connections under test -----------------------------------------------------------------------------

    def connect(self) -> Any:
        connection = connect(**_OPTIONS, client_flag=CLIENT.MULTI_STATEMENTS)
        self._ours.add(connection.thread_id())
        return connection

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        connection = self.connect()
        try:
            yield connection
        finally:
            if connection.open:
                connection.close()

    def scalar(self, connection: Any, sql: str) -> Any:
        cursor = connection.cursor()
        cursor.execute(sql)
        return cursor.fetchone()[0]

    def write(self, connection: Any, text: str) -> None:
        connection.cursor().execute(f"INSERT INTO {self._table} (text) VALUES (%s)", (text,))

    def brief(self, connection: Any) -> None:
        """A query that takes about as long as a cancel needs."""
        assert self.scalar(connection, "SELECT SLEEP(0.003)") == 0

    def closed(self, connection: Any) -> bool:
        return not connection.open

    # --- what the server says -------------------------------------------------------------------------------

    def _ask(self, sql: str, *values: Any) -> list[Any]:
        with self._watch.cursor() as cursor:
            cursor.execute(sql, values or None)
            return list(cursor.fetchall())

    def notes(self) -> list[str]:
        return [text for (text,) in self._ask(f"SELECT text FROM {self._table} ORDER BY number")]

    def clear(self) -> None:
        self._ask(f"DELETE FROM {self._table}")

    def connections(self) -> list[str]:
        rows = self._ask("SELECT id FROM information_schema.processlist")
        return [f"connection {number}" for (number,) in rows if number in self._ours]

    def _is_running(self, who: int) -> bool:
        return self._ask("SELECT command FROM information_schema.processlist WHERE id = %s", who) == [("Query",)]

    def await_running(self, connection: Any) -> int:
        """Wait until the server works for the connection, and return what it calls it."""
        who = int(connection.thread_id())
        await_until(lambda: self._is_running(who), "the server never began")
        time.sleep(0.02)  # past the beginning of the statement, into what it waits for
        return who

    def await_idle(self, who: int) -> float:
        """Wait until the server does not work for the connection any more, and return when that was."""
        return await_until(lambda: not self._is_running(who), "the server goes on with the query")

    # --- what the server is made to do ----------------------------------------------------------------------

    @contextlib.contextmanager
    def slow_commits(self) -> Iterator[Callable[[], object]]:
        """A global lock holds every commit up, until it is let go."""
        locker = pymysql.connect(**_OPTIONS)
        try:
            yield self._lock_later(locker)
        finally:
            locker.close()

    def _lock_later(self, locker: Any) -> Callable[[], object]:
        locker.cursor().execute("SET SESSION lock_wait_timeout = 5")
        self.write = self._write_then_lock(locker)  # type: ignore[method-assign]

        def let_go() -> None:
            del self.write
            locker.cursor().execute("UNLOCK TABLES")

        return let_go

    def _write_then_lock(self, locker: Any) -> Callable[[Any, str], None]:
        write = self.write

        def write_then_lock(connection: Any, text: str) -> None:
            write(connection, text)
            locker.cursor().execute("FLUSH TABLES WITH READ LOCK")

        return write_then_lock

    @contextlib.contextmanager
    def frozen(self, _connection: Any) -> Iterator[None]:
        """The whole server does nothing meanwhile; it hears no KILL either."""
        who = _process_of_the_server()
        os.kill(who, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(who, signal.SIGCONT)


def _process_of_the_server() -> int:
    for status in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if status.read_text().strip() in {"mariadbd", "mysqld"}:
                return int(status.parent.name)
    raise AssertionError("the server is not on this machine")


def execute(connection: Any) -> None:
    connection.cursor().execute("SELECT SLEEP(600)")


def unbuffered(connection: Any) -> None:
    with connection.cursor(SSCursor) as cursor:
        cursor.execute("SELECT seq, SLEEP(IF(seq > 25000, 600, 0)) FROM seq_1_to_100000")
        for _row in cursor:
            pass


def second_result(connection: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("SELECT 1; SELECT SLEEP(600)")
    cursor.nextset()


def many(connection: Any) -> None:
    connection.cursor().executemany("DO SLEEP(%s)", [(600,)])


def answers_with_null(connection: Any) -> None:
    other = pymysql.connect(**_OPTIONS)
    try:
        name = f"compat-{threading.get_ident()}"
        other.cursor().execute("SELECT GET_LOCK(%s, 0)", (name,))
        connection.cursor().execute("SELECT GET_LOCK(%s, 600)", (name,))
    finally:
        other.close()


def answers_with_zero(connection: Any) -> None:
    connection.cursor().execute("SELECT BENCHMARK(100000000000, MD5('x'))")


CALLS: Mapping[str, Callable[[Any], object]] = {
    call.__name__: call for call in (execute, unbuffered, second_result, many, answers_with_null, answers_with_zero)
}
