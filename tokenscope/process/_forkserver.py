"""The fork server: a small process that forks workers, ends them with all that they started, and reaps them.

One for each process that offloads, and started by it (`_pool.py`). It has one thread and loads nothing of the user's,
so that its forks are quick and safe. It leads a session of its own: a Ctrl-C in the terminal reaches neither it nor its
workers.

Why it ends them, and not their owner: it is their parent, so their numbers cannot become somebody else's under it, and
it is there when the owner was killed.

What it hears and says
    ``control``   from the owner: a byte, with two sockets: fork a worker. End of file: end all workers, and leave.
    ``line``      one for each worker. From the owner: a byte, or end of file: end that worker. To the owner: `Ended`,
                  when nothing of it is left.
    ``job``       the worker's talk with the owner. Not ours.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket

from tokenscope.process import _wire, _worker
from tokenscope.process._tree import ProcessTree
from tokenscope.process._waiting import wait_ready

__all__ = ["main"]


def main(control: int) -> None:
    """Serve until the owner has gone; in a worker: work."""
    for number in (signal.SIGTERM, signal.SIGINT):  # whoever stops a service stops the owner, and we leave after it
        signal.signal(number, signal.SIG_IGN)
    server = os.getpid()
    with socket.socket(fileno=control) as owner:
        job = ForkServer(owner).serve()
    if job is not None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _worker.work(job, server)


class _Kept:
    """A worker, and the line on which its owner is told of its end."""

    def __init__(self, pid: int, line: socket.socket) -> None:
        self.line = line
        self.ending = False
        self.tree = ProcessTree(pid, "offload", lambda: None, driven=True)

    def end(self) -> None:
        self.ending = True
        self.tree.end(0)

    def go_on(self) -> None:
        """Do what is due."""
        self.tree.advance()
        if self.tree.gone:
            _tell(self.line, _wire.Ended(self.tree.pid, self.tree.returncode))


class ForkServer:
    """The loop."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._owned = True
        self._kept: list[_Kept] = []

    def serve(self) -> socket.socket | None:
        """Until the owner has gone, and all workers. Returns a second time in each worker, with its job socket."""
        while self._owned or self._kept:
            ready = self._wait()
            if self._control.fileno() in ready:
                job = self._hear_owner()
                if job is not None:
                    return job
            for kept in self._kept:
                if kept.line.fileno() in ready:
                    kept.end()
                kept.go_on()
            self._kept = [kept for kept in self._kept if not kept.tree.gone]
        return None

    def _wait(self) -> set[int]:
        watches = [watch for kept in self._kept for watch in kept.tree.watches()]
        sockets = [kept.line for kept in self._kept if not kept.ending] + [self._control] * self._owned
        moments = [kept.tree.due for kept in self._kept if kept.tree.due is not None]
        wanted = [watch.fd for watch in watches] + [sock.fileno() for sock in sockets]
        return wait_ready(dict.fromkeys(wanted, select.POLLIN), min(moments, default=None))

    def _hear_owner(self) -> socket.socket | None:
        data, numbers, _flags, _address = socket.recv_fds(self._control, 1, 2)
        sockets = [socket.socket(fileno=number) for number in numbers]
        if not data:
            self._owned = False
            for kept in self._kept:
                kept.end()
        elif len(sockets) == 2:  # noqa: PLR2004  # job and line; fewer when we are out of descriptors
            return self._fork(*sockets)
        for sock in sockets:
            sock.close()
        return None

    def _fork(self, job: socket.socket, line: socket.socket) -> socket.socket | None:
        """Returns ``job`` in the worker."""
        reader, writer = os.pipe()
        try:
            pid = os.fork()
            if pid == 0:
                os.setsid()
                self._forget(line)
                return job
            os.close(writer)
            writer = -1
            os.read(reader, 1)  # ends when the worker leads a session, by which it can be ended, or has ended
            self._kept.append(_Kept(pid, line))
        except OSError as error:
            _tell(line, _wire.Ended(trouble=str(error)))
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        job.close()
        return None

    def _forget(self, line: socket.socket) -> None:
        """In a worker: close what is the server's."""
        self._control.close()
        line.close()
        for kept in self._kept:
            kept.line.close()
        self._kept.clear()


def _tell(line: socket.socket, ended: _wire.Ended) -> None:
    with contextlib.suppress(OSError):  # the owner has gone, or does not care
        _wire.send(line, pickle.dumps(ended))
    line.close()
