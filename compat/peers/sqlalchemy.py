"""SQLAlchemy on psycopg: connections, streamed results, sessions; from a pool that stays in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import sqlalchemy
from sqlalchemy.orm import Session

from compat.peers.postgres import ENDLESS, ROWS, PostgresServer
from tokenscope.integrations.sqlalchemy import instrument

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Error = (sqlalchemy.exc.SQLAlchemyError, psycopg.Error)


class Server(PostgresServer):
    """The server behind an engine. What the story calls a connection is one of SQLAlchemy's."""

    def __init__(self) -> None:
        self._engine: sqlalchemy.Engine | None = None
        super().__init__(self._connect_by_engine, psycopg.connect)

    def _connect_by_engine(self, conninfo: str) -> Any:
        if self._engine is None:
            options = psycopg.conninfo.conninfo_to_dict(conninfo)
            self._engine = sqlalchemy.create_engine("postgresql+psycopg://", connect_args=options)
            instrument(self._engine)
        return self._engine.connect()

    def scalar(self, connection: Any, sql: str) -> Any:
        return connection.exec_driver_sql(sql).scalar()

    def write(self, connection: Any, text: str) -> None:
        connection.exec_driver_sql("INSERT INTO notes (text) VALUES (%s)", (text,))

    def closed(self, connection: Any) -> bool:
        return bool(connection.invalidated)

    def identity(self, connection: Any) -> int:
        return int(connection.connection.dbapi_connection.info.backend_pid)

    def connections(self) -> list[str]:
        if self._engine is not None:
            assert self._engine.pool.checkedout() == 0, "the pool misses a connection"  # type: ignore[attr-defined]
            self._engine.dispose()
        return super().connections()


def execute(connection: Any) -> None:
    connection.exec_driver_sql(ENDLESS)


def streamed(connection: Any) -> None:
    options = {"stream_results": True, "max_row_buffer": 10}
    for _row in connection.execution_options(**options).exec_driver_sql(ROWS):
        pass


def session(connection: Any) -> None:
    with Session(bind=connection) as session, session.begin():
        session.execute(sqlalchemy.text(ENDLESS))


def savepoint(connection: Any) -> None:
    with connection.begin_nested():
        connection.exec_driver_sql(ENDLESS)


CALLS: Mapping[str, Callable[[Any], object]] = {call.__name__: call for call in (execute, streamed, session, savepoint)}
