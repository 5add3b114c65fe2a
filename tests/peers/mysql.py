"""A small MariaDB that hangs on cue: just enough of the protocol for PyMySQL.

What it knows: transactions, `SELECT 1`, KILL QUERY, and three ways to hang until that comes: HANG ends in the error
that belongs there, LIE answers as if nothing had been, ROWS hangs between its first row and the next.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from peers import database
from peers.database import Database, receive

if TYPE_CHECKING:
    import socket

_EOF = b"\xfe\0\0\0\0"
_QUIT, _QUERY, _PING = 1, 3, 14


class MySQL(Database):
    """The server. `greets`: whether it says anything to a client that connects."""

    greets = True

    def serve(self, sock: socket.socket) -> None:
        Session(self, sock).serve()


class Session(database.Session):
    """One client."""

    turn = 0
    state = 0  # 1 in a transaction, as the protocol has it

    def serve(self) -> None:
        if not self.server.greets:
            receive(self.sock, 1)
        self.send(
            b"\x0a5.5.5-10.11.0-MariaDB\0" + struct.pack("<I", self.number) + b"saltsalt\0"
            b"\xff\xf7\x21\0\0\xff\x81\x15" + bytes(10) + b"saltsaltsalt\0mysql_native_password\0"
        )
        self.receive()
        self.succeed()
        while (command := self.receive())[0] != _QUIT:
            if command[0] == _QUERY:
                self.query(command[1:].decode())
            else:
                self.succeed()

    def query(self, sql: str) -> None:
        word = sql.split(maxsplit=1)[0].upper()
        if word == "KILL":
            self.server.cancel(int(sql.rsplit(maxsplit=1)[-1]))
        elif word != "SET":
            self.server.log.append(sql)
        if word == "COMMIT":
            self.hold_commit()
        if word not in {"KILL", "SET"}:
            self.state = int(word not in {"COMMIT", "ROLLBACK"})
        if word in {"SELECT", "ROWS"}:
            self.rows(sql)
        elif word in {"HANG", "LIE"}:
            self.hang()
            self.succeed() if word == "LIE" else self.fail()
        else:
            self.succeed()

    def rows(self, sql: str) -> None:
        self.send(b"\1")
        self.send(b"\3def\0\0\0\1x\0\x0c\x21\0\0\0\0\0\xfd\0\0\0\0\0")
        self.send(_EOF)
        self.send(b"\0011")
        if sql == "ROWS":
            self.hang()
            self.fail()
        else:
            self.send(_EOF)

    def succeed(self) -> None:
        self.send(b"\0\0\0" + struct.pack("<H", self.state) + b"\0\0")

    def fail(self) -> None:
        self.send(b"\xff" + struct.pack("<H", 1317) + b"#70100Query execution was interrupted")

    def receive(self) -> bytes:
        head = receive(self.sock, 4)
        self.turn = head[3] + 1
        return receive(self.sock, int.from_bytes(head[:3], "little"))

    def send(self, body: bytes) -> None:
        self.sock.sendall(len(body).to_bytes(3, "little") + bytes([self.turn % 256]) + body)
        self.turn += 1
