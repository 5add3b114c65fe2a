"""An HTTP server in a process of its own: `/quick` answers at once, `/slow` late, `/half` half, `/silent...` never.

Run as a program it listens on a free port and writes the number on its standard output; then, for each request that it
will not answer to the end, ``hanging`` once it is read, and ``gone``, with the time, once its client has left. It ends
when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"
HALF = ANSWER.replace(b"Length: 5", b"Length: 10")
PATIENCE = 10.0  # seconds until a client that should have left has not


class Peer(asyncio.Protocol):
    """One connection, kept alive."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._heard = b""
        self._hanging = False

    def data_received(self, data: bytes) -> None:
        self._heard += data
        while b"\r\n\r\n" in self._heard:
            head, _, self._heard = self._heard.partition(b"\r\n\r\n")
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        path = head.split(b" ", 2)[1]
        if path == b"/quick":
            self._transport.write(ANSWER)
        elif path == b"/slow":
            asyncio.get_running_loop().call_later(random.uniform(0, 0.01), self._transport.write, ANSWER)
        else:
            if path == b"/half":
                self._transport.write(HALF)
            self._hanging = True
            os.write(1, b"hanging\n")

    def eof_received(self) -> None:
        self._gone()

    def connection_lost(self, _: Exception | None) -> None:
        self._gone()

    def _gone(self) -> None:
        """A FIN or a reset, whichever comes first."""
        if self._hanging:
            self._hanging = False
            # The wall clock is the only one that two processes share by contract.
            os.write(1, f"gone {time.time()!r}\n".encode())


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Peer, "127.0.0.1", 0, backlog=256)
    ended = asyncio.Event()
    loop.add_reader(0, ended.set)
    os.write(1, b"%d\n" % server.sockets[0].getsockname()[1])
    await ended.wait()


@dataclass(frozen=True)
class Upstream:
    """The running server, seen from the process that measures."""

    port: int
    news: BinaryIO

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def expect(self, word: str) -> str:
        """Wait for the next of the news, which has to be this; what it says besides."""
        if not select.select([self.news], [], [], PATIENCE)[0]:
            raise TimeoutError(f"the server did not say {word!r}")
        said, _, rest = _line(self.news).decode().strip().partition(" ")
        if said != word:
            raise RuntimeError(f"the server said {said!r}, not {word!r}")
        return rest


@contextlib.contextmanager
def upstream() -> Iterator[Upstream]:
    """Run the server until the block ends."""
    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        news = cast("BinaryIO", process.stdout)
        try:
            yield Upstream(int(_line(news)), news)
        finally:
            cast("BinaryIO", process.stdin).close()
            process.wait(10)


def _line(news: BinaryIO) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = news.read(1)
        if not byte:
            raise RuntimeError("the upstream server has ended")
        line += byte
    return line


if __name__ == "__main__":
    asyncio.run(_serve())
