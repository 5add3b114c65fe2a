"""A small PostgreSQL that hangs on cue: just enough of the protocol for libpq.

What it knows: transactions, `SELECT 1`, and HANG (also as what a cursor fetches), which lasts until it is cancelled.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from peers import database
from peers.database import Database, receive

if TYPE_CHECKING:
    import socket

_CANCEL, _TLS, _GSS = 80877102, 80877103, 80877104
_PARAMETERS = {
    "server_version": "15.0",
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "standard_conforming_strings": "on",
    "integer_datetimes": "on",
}


class Postgres(Database):
    """The server."""

    @property
    def conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=u dbname=d sslmode=disable gssencmode=disable"

    def serve(self, sock: socket.socket) -> None:
        while True:
            (length,) = struct.unpack("!i", receive(sock, 4))
            body = receive(sock, length - 4)
            (code,) = struct.unpack("!i", body[:4])
            if code == _CANCEL:
                self.cancel(*struct.unpack("!i", body[4:8]))
                return
            if code in {_TLS, _GSS}:
                sock.sendall(b"N")
                continue
            Session(self, sock).serve()
            return


class Session(database.Session):
    """One client."""

    state = "I"

    def serve(self) -> None:
        self.send("R", struct.pack("!i", 0))
        for name, value in _PARAMETERS.items():
            self.send("S", f"{name}\0{value}\0".encode())
        self.send("K", struct.pack("!ii", self.number, 4711))
        self.ready()
        while (kind := receive(self.sock, 1)) != b"X":
            (length,) = struct.unpack("!i", receive(self.sock, 4))
            body = receive(self.sock, length - 4)
            assert kind == b"Q", kind
            self.query(body.rstrip(b"\0").decode())
            self.ready()

    def query(self, sql: str) -> None:
        self.server.log.append(sql)
        word = sql.split(maxsplit=1)[0].upper()
        if word in {"COMMIT", "ROLLBACK"}:
            if word == "COMMIT":
                self.hold_commit()
            self.state = "I"
        elif self.state == "E":
            self.fail("25P02", "current transaction is aborted")
            return
        elif word in {"HANG", "FETCH"}:
            self.hang()
            self.fail("57014", "canceling statement due to user request")
            return
        elif word == "BEGIN":
            self.state = "T"
        elif word == "SELECT":
            self.send("T", b"\0\1x\0" + struct.pack("!ihihih", 0, 0, 23, 4, -1, 0))
            self.send("D", b"\0\1" + struct.pack("!i", 1) + b"1")
        self.send("C", f"{word}\0".encode())

    def fail(self, code: str, message: str) -> None:
        self.send("E", f"SERROR\0VERROR\0C{code}\0M{message}\0\0".encode())
        if self.state == "T":
            self.state = "E"

    def ready(self) -> None:
        self.send("Z", self.state.encode())

    def send(self, kind: str, body: bytes) -> None:
        self.sock.sendall(kind.encode() + struct.pack("!i", len(body) + 4) + body)
