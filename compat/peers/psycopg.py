"""psycopg 3: statements, server-side cursors, COPY, `stream`, pipelines and transaction blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg

from compat.peers.postgres import ENDLESS, ROWS, PostgresServer
from tokenscope.integrations.psycopg import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Error = psycopg.Error


def Server() -> PostgresServer:  # noqa: N802  # as other peers' classes
    """The server."""
    return PostgresServer(connect, psycopg.connect)


def execute(connection: Any) -> None:
    connection.execute(ENDLESS)


def execute_many(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.executemany("SELECT pg_sleep(%s)", [(600,)])


def server_cursor(connection: Any) -> None:
    with connection.cursor("rows") as cursor:
        cursor.itersize = 10
        for _row in cursor.execute(ROWS):
            pass


def copy_out(connection: Any) -> None:
    with connection.cursor() as cursor, cursor.copy(f"COPY ({ROWS}) TO STDOUT") as copy:
        for _data in copy:
            pass


def stream(connection: Any) -> None:
    with connection.cursor() as cursor:
        for _row in cursor.stream(ROWS):
            pass


def pipeline(connection: Any) -> None:
    with connection.pipeline():
        connection.execute(ENDLESS).fetchone()


def blocks(connection: Any) -> None:
    with connection.transaction(), connection.transaction():
        connection.execute(ENDLESS)


CALLS: Mapping[str, Callable[[Any], object]] = {
    call.__name__: call for call in (execute, execute_many, server_cursor, copy_out, stream, pipeline, blocks)
}
