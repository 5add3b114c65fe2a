"""The owner's side of offloading: its fork server, and the workers that wait for the next call.

A worker belongs to one call at a time. After it, the worker is kept for the next one, or ended: if the call was cut, if
the function left something running, or if enough are kept. How many run at the same time is not limited here.

States of a worker: *busy* -> *idle* -> *busy* ... -> *ended*. It is idle while it is in ``_idle``, a deque: who takes
it from there has it alone.

How idle workers end when their owner is killed: the system closes its sockets; the workers read the end of file, and
the fork server ends those that are busy. The end of the interpreter is no different: nothing is waited for.

Lock order: ``_lock`` is held for asking the fork server, and for starting one; no other lock is taken under it.

Fork: the child closes its copies of all sockets (else its parent's workers would not see that end) and has a pool of
its own from its first call on. Where no fork hooks run (uWSGI) that call closes them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from typing import TYPE_CHECKING

from tokenscope._core import _primitives, clock
from tokenscope._core import token as tokens
from tokenscope.process import _wire
from tokenscope.process._waiting import wait_ready

if TYPE_CHECKING:
    from tokenscope._core.token import CancellationToken

__all__ = ["KEPT", "Pool", "Worker", "pool"]

#: So many idle workers are kept.
KEPT = 4

_SILENCE = 1.0  # seconds without a word from the fork server, after which its owner looks whether it was stopped


class Worker:
    """Our end of a worker."""

    def __init__(self, job: socket.socket, line: socket.socket, server: _Server) -> None:
        job.setblocking(False)
        self._job = job
        self._line = line
        self._server = server
        self._ready = {job.fileno(): select.POLLIN, line.fileno(): select.POLLIN}

    def is_there(self) -> bool:
        """Whether it has not ended; while it is idle."""
        return not wait_ready(self._ready, 0.0)

    def ask(self, request: bytes, token: CancellationToken) -> _wire.Answer | None:
        """Have it run a call; None if it has ended.

        Raises:
            Cancelled: ``token`` is, or was meanwhile, cancelled.
        """
        _checkpoint(token)
        self._send(_wire.header(request), token)
        self._send(request, token)
        head = self._receive(_wire.HEADER.size, token)
        body = head and self._receive(_wire.HEADER.unpack(head)[0], token)
        if not body:
            return None
        answer: _wire.Answer = pickle.loads(body)  # noqa: S301  # from our worker
        return answer

    def _send(self, data: bytes, token: CancellationToken) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._job.send(view, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                wait_ready({self._job.fileno(): select.POLLOUT}, token.deadline, token)
                _checkpoint(token)
            except (BrokenPipeError, ConnectionResetError):
                return  # it has ended, as `_receive` will see

    def _receive(self, size: int, token: CancellationToken) -> bytes | None:
        data = bytearray(size)
        view = memoryview(data)
        ended = False
        while view:
            try:
                got = self._job.recv_into(view)
            except BlockingIOError:
                if ended:
                    return None
                _checkpoint(token)
                ended = self._line.fileno() in wait_ready(self._ready, token.deadline, token)
                continue
            except ConnectionResetError:
                return None
            if not got:
                return None
            view = view[got:]
        return bytes(data)

    def end(self) -> _wire.Ended:
        """Have it ended with all that it started, and wait until that is gone. No checkpoint."""
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._line.send(b"!", socket.MSG_NOSIGNAL)
            while not wait_ready({self._line.fileno(): select.POLLIN}, clock.now() + _SILENCE):
                self._server.go_on()
            told = _wire.receive(self._line)
            return _wire.Ended() if told is None else pickle.loads(told)  # noqa: S301  # from our server
        finally:
            self._job.close()
            self._line.close()


def _checkpoint(token: CancellationToken) -> None:
    tokens.expire_if_due(token)
    token.check()


class _Server:
    """Our fork server, at the other end of ``control``."""

    def __init__(self, control: socket.socket, theirs: socket.socket) -> None:
        self.control = control
        try:
            with theirs:
                self.pid = _start(theirs)
        except BaseException:
            self.control.close()
            raise

    def ask_for_worker(self, *ends: socket.socket) -> None:
        socket.send_fds(self.control, [b"!"], [end.fileno() for end in ends], socket.MSG_NOSIGNAL)

    def go_on(self) -> None:
        """Continue it if somebody has stopped it (SIGSTOP): nobody else could end its workers."""
        with contextlib.suppress(ChildProcessError):  # not ours, or reaped: its number may be another's
            if os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT):
                os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Have it end its workers and itself, and wait for it."""
        self.control.close()
        self.go_on()
        with contextlib.suppress(ChildProcessError):  # somebody else has reaped it
            os.waitpid(self.pid, 0)


def _start(control: socket.socket) -> int:
    from multiprocessing import spawn  # noqa: PLC0415  # knows the interpreter, also where `set_executable` was called

    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"from tokenscope.process._forkserver import main; main({control.fileno()})"
    )
    # The private function is what `multiprocessing` uses itself.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    server = subprocess.Popen(  # noqa: S603  # our own program
        [os.fsdecode(spawn.get_executable()), *flags, "-c", program],
        stdin=subprocess.DEVNULL,
        pass_fds=(control.fileno(),),
        start_new_session=True,
    )
    server.returncode = 0  # it is ours to wait for: no warning when the object is dropped
    return server.pid


class Pool:
    """The workers of one process."""

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = _primitives.RLock()
        self._server: _Server | None = None
        self._idle: deque[Worker] = deque()

    def take(self) -> Worker:
        """A worker for one call: an idle one if there is one.

        Raises:
            OSError: There are no descriptors, or the fork server cannot be started.
        """
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return self._new_worker()
            if worker.is_there():
                return worker
            worker.end()

    def give_back(self, worker: Worker) -> None:
        """Keep it for the next call; if there are too many, the one that waited longest is ended."""
        self._idle.append(worker)
        while len(self._idle) > KEPT:
            with contextlib.suppress(IndexError):  # another thread took it
                self._idle.popleft().end()

    def _new_worker(self) -> Worker:
        job, job_there = self._pair()
        line, line_there = self._pair()
        try:
            with job_there, line_there, self._lock: server = self._ask_locked(job_there, line_there)  # fmt: skip
        except BaseException:
            job.close()
            line.close()
            raise
        return Worker(job, line, server)

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        both = socket.socketpair()
        self._sockets.update(both)
        return both

    def _ask_locked(self, *ends: socket.socket) -> _Server:
        if self._server is not None:
            try:
                self._server.ask_for_worker(*ends)
            except (BrokenPipeError, ConnectionResetError):  # somebody killed it
                dead, self._server = self._server, None
                dead.stop()
            else:
                return self._server
        self._server = _Server(*self._pair())
        self._server.ask_for_worker(*ends)
        return self._server

    def close(self) -> None:
        """End all idle workers and the fork server, which ends the others. The next call starts anew."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().end()
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def forget(self) -> None:
        """In a forked process: they are not ours."""
        for sock in tuple(self._sockets):
            sock.close()


_pools: dict[int, Pool] = {}  # by process id; the first operation on it in a process settles which one is used there


def pool() -> Pool:
    """The pool of this process."""
    pid = _primitives.getpid()
    found = _pools.get(pid)
    if found is None:
        found = _pools.setdefault(pid, Pool())
        _forget_but(pid)
    return found


def _forget_but(pid: int | None) -> None:
    for other in tuple(_pools):
        if other != pid and (theirs := _pools.pop(other, None)) is not None:
            theirs.forget()


def _after_fork() -> None:
    _forget_but(None)


os.register_at_fork(after_in_child=_after_fork)
