"""psycopg2: statements, named cursors (also of other classes), and COPY."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg2
import psycopg2.extras

from compat.peers.postgres import ENDLESS, ROWS, PostgresServer
from tokenscope.integrations.psycopg2 import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Error = psycopg2.Error


def Server() -> PostgresServer:  # noqa: N802  # as other peers' classes
    """The server."""
    return PostgresServer(connect, psycopg2.connect)


def execute(connection: Any) -> None:
    connection.cursor().execute(ENDLESS)


def named_cursor(connection: Any) -> None:
    with connection.cursor("rows") as cursor:
        cursor.itersize = 10
        cursor.execute(ROWS)
        for _row in cursor:
            pass


def dict_cursor(connection: Any) -> None:
    with connection.cursor("rows", cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
        cursor.execute(ROWS)
        cursor.fetchmany(50)


def copy_out(connection: Any) -> None:
    with connection.cursor() as cursor, open("/dev/null", "w") as nowhere:  # noqa: PTH123
        cursor.copy_expert(f"COPY ({ROWS}) TO STDOUT", nowhere)


CALLS: Mapping[str, Callable[[Any], object]] = {
    call.__name__: call for call in (execute, named_cursor, dict_cursor, copy_out)
}
