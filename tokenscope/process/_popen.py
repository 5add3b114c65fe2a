"""`Popen` and `run`, as in ``subprocess``, with an owner."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import subprocess
import threading
from subprocess import PIPE, CalledProcessError, CompletedProcess, TimeoutExpired
from typing import TYPE_CHECKING, Any, cast

from tokenscope._core import clock
from tokenscope._core._typing import override
from tokenscope._core.current import effective_token
from tokenscope._core.errors import Cancelled
from tokenscope.process._child import Child, nursery_here
from tokenscope.process._pipes import Talk, guarded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from tokenscope._core.token import CancellationToken

__all__ = ["GRACE", "Popen", "run"]

#: Seconds between TERM and KILL, unless something else is said.
GRACE = 2.0
_SIGNATURE = inspect.signature(subprocess.Popen)


class Popen(subprocess.Popen[Any]):
    """A child process that a token and a scope own; otherwise a ``subprocess.Popen``.

    It leads a session and process group of its own. A cancel ends it and what it started: TERM, ``grace`` seconds,
    KILL. `wait`, `communicate`, reading and writing its pipes are checkpoints, which raise `Cancelled` when all of it
    is gone. When the process ends by itself, what it left running in its group gets half a second and is then ended in
    the same way, so a background job that holds a pipe open hangs nobody. The scope it was started in ends it at the
    latest.

    `terminate` and `kill` reach the whole group, `send_signal` the process alone. Thread-safe.

    Args:
        args: This and all others: as in ``subprocess.Popen``.
        token: Ends it too; it is added to the current token.
        grace: Seconds between TERM and KILL; 0 kills at once.

    Raises:
        Cancelled: The caller is cancelled already; nothing was started.
        ScopeClosed: The scope around it has ended; nothing was started.
        ValueError, TypeError: A bad ``grace`` or ``token``; a ``process_group``, since it always has one of its own.
        OSError: As in ``subprocess.Popen``.
    """

    _child: Child | None = None
    _talk: Talk | None = None

    def __init__(
        self, args: Any, *rest: Any, token: CancellationToken | None = None, grace: float = GRACE, **options: Any
    ) -> None:
        seconds = _validate_grace(grace)
        mine = effective_token(token)
        call = _SIGNATURE.bind(args, *rest, **options)
        _lead_a_session(call.arguments)
        mine.check()
        nursery = nursery_here()
        try:
            with _no_interrupts():
                super().__init__(*call.args, **call.kwargs)
                child = self._child = Child(
                    self.pid, _name_of(args), mine, explicit=token is not None, grace=seconds, nursery=nursery
                )
            bufsize = call.arguments.get("bufsize", -1)
            self.stdin = guarded(self.stdin, child, bufsize)
            self.stdout = guarded(self.stdout, child, bufsize)
            self.stderr = guarded(self.stderr, child, bufsize)
        except BaseException:
            self._leave_nothing()
            raise

    def _leave_nothing(self) -> None:
        """Starting it failed, or was cut off."""
        if self._child is not None:
            self._end(0)
        elif getattr(self, "pid", None) is not None and self.returncode is None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)

    @property
    def _mine(self) -> Child:
        return cast("Child", self._child)

    # --- waiting ------------------------------------------------------------------------------------------------

    @override
    def poll(self) -> int | None:
        """The exit status if it has ended, else None. Never blocks."""
        self.returncode = self._mine.tree.poll()
        return self.returncode

    @override
    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and what it left in its group too. A checkpoint.

        Raises:
            Cancelled: The caller is cancelled. If the process belongs to the same token it is gone, and the
                ``__cause__`` is a ``CalledProcessError`` with its status.
            TaskCancelled: The process belongs to work of others that was cancelled.
            TimeoutExpired: It still runs after ``timeout`` seconds; it goes on.
            ValueError, TypeError: A bad ``timeout``.
        """
        child = self._mine
        end = _moment(timeout)
        with child.shielded():
            child.tree.advance()
            while not child.tree.gone:
                if end is not None and clock.now() >= end:
                    if child.tree.returncode is None:
                        raise TimeoutExpired(self.args, cast("float", timeout))
                    break  # what it left in its group is being ended
                child.step({}, end)
        self.returncode = cast("int", child.tree.returncode)
        if child.tree.cut:
            child.raise_cut(CalledProcessError(self.returncode, self.args))
        return self.returncode

    @override
    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:  # noqa: A002  # theirs
        """Send ``input``, read all pipes, wait. A checkpoint; after `TimeoutExpired` it may be called again.

        Raises:
            Cancelled, TaskCancelled: As `wait`; the ``__cause__`` has what was read until then, as ``stdout`` and
                ``stderr``.
            TimeoutExpired: It still runs after ``timeout`` seconds; it goes on.
            ValueError, TypeError: A bad ``timeout``; ``input``, when talking has begun before, or if it is neither str
                nor bytes as the pipe is.
        """
        child = self._mine
        end = _moment(timeout)
        with child.shielded():
            talk = self._begin_talk(input)
            child.tree.advance()
            while not child.tree.gone:
                if end is not None and clock.now() >= end:
                    raise self._late(cast("float", timeout), talk)
                talk.go_on(child.step(talk.wanted, end))
        talk.finish()
        self.returncode = cast("int", child.tree.returncode)
        if child.tree.cut:
            partial = talk.text("stdout", "replace"), talk.text("stderr", "replace")
            child.raise_cut(CalledProcessError(self.returncode, self.args, *partial))
        return talk.text("stdout"), talk.text("stderr")

    def _begin_talk(self, message: Any) -> Talk:
        if self._talk is None:
            self._talk = Talk(self.stdin, self.stdout, self.stderr, message)
        elif message:
            raise ValueError("Cannot send input after starting communication")
        return self._talk

    def _late(self, timeout: float, talk: Talk) -> TimeoutExpired:
        return TimeoutExpired(self.args, timeout, talk.so_far("stdout"), talk.so_far("stderr"))

    # --- ending -------------------------------------------------------------------------------------------------

    @override
    def send_signal(self, sig: int) -> None:
        """Send a signal to the process alone; nothing if it has ended."""
        self._mine.tree.signal_leader(sig)

    @override
    def terminate(self) -> None:
        """Send TERM to it and its group. Does not wait."""
        self._mine.tree.signal_group(signal.SIGTERM)

    @override
    def kill(self) -> None:
        """Send KILL to it and its group. Does not wait."""
        self._mine.tree.signal_group(signal.SIGKILL)

    def _end(self, grace: float | None = None) -> None:
        """End it and wait until it is gone. No checkpoint."""
        self._mine.end(grace)
        self.returncode = cast("int", self._mine.tree.returncode)

    def _end_and_hear(self, late: TimeoutExpired) -> None:
        """End it, and add to the error what it said last."""
        child, talk = self._mine, cast("Talk", self._talk)
        talk.hang_up()
        child.end(hear=lambda until: talk.go_on(child.step_heedless(talk.wanted, until)))
        talk.finish()
        late.stdout, late.stderr = talk.so_far("stdout"), talk.so_far("stderr")

    def _abort(self) -> None:
        """An error goes through its owner: end it, and close what is open."""
        if self._child is None:
            return  # it never started
        try:
            self._end()
        finally:
            with contextlib.suppress(Exception, Cancelled):  # what was to be written; the owner's error is told
                self._close_pipes()

    @override
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pipes and wait; after an error end it instead."""
        if kind is not None:
            self._abort()
            return
        try:
            self._close_pipes()
            self.wait()
        except BaseException:
            self._abort()
            raise

    def _close_pipes(self) -> None:
        with contextlib.ExitStack() as stack:
            for stream in (self.stdin, self.stderr, self.stdout):
                if stream is not None:
                    stack.callback(stream.close)

    def __del__(self) -> None:
        child = self._child
        if child is not None:
            if self.returncode is None:
                self.returncode = child.tree.returncode
            if child.owned:
                return  # its scope ends it
        super().__del__()  # warns if it still runs, and reaps it later


def run(
    *popenargs: Any,
    input: Any = None,  # noqa: A002  # the name is that of `subprocess`
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    token: CancellationToken | None = None,
    grace: float = GRACE,
    **kwargs: Any,
) -> CompletedProcess[Any]:
    """Run a command to its end, as ``subprocess.run``; it and all that it started are gone afterwards. A checkpoint.

    Args:
        popenargs: And ``kwargs``: as for `Popen`.
        input: Sent to its standard input.
        capture_output: Read standard output and error.
        timeout: Seconds until it is ended.
        check: Whether a status other than 0 is an error.
        token: Ends it too; it is added to the current token.
        grace: Seconds between TERM and KILL; 0 kills at once.

    Raises:
        Cancelled: The caller is cancelled. The ``__cause__`` is a ``CalledProcessError`` with the status, and what was
            read until then.
        TimeoutExpired: The time was up; with what was read until the end.
        CalledProcessError: With ``check``.
        ValueError, TypeError: A bad ``timeout``, ``grace`` or ``token``: nothing was started. A bad ``input``, or one
            together with ``stdin``; ``capture_output`` together with ``stdout`` or ``stderr``.
    """
    _moment(timeout)  # a bad one is told before anything starts
    if input is not None:
        if kwargs.get("stdin") is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        kwargs["stdin"] = PIPE
    if capture_output:
        if kwargs.get("stdout") is not None or kwargs.get("stderr") is not None:
            raise ValueError("stdout and stderr arguments may not be used with capture_output.")
        kwargs["stdout"] = kwargs["stderr"] = PIPE
    # At hand before it starts: an interrupt may fall between its start and any line here.
    process = Popen.__new__(Popen)
    try:
        process.__init__(*popenargs, token=token, grace=grace, **kwargs)  # type: ignore[misc]
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except TimeoutExpired as late:
            process._end_and_hear(late)  # noqa: SLF001  # one machine, as all of these
            raise
    except BaseException:
        process._abort()  # noqa: SLF001
        raise
    code = process.returncode
    if check and code:
        raise CalledProcessError(code, process.args, stdout, stderr)
    return CompletedProcess(process.args, code, stdout, stderr)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Put Ctrl-C off for the moment in which a process runs already and nobody has its number yet.

    Signals are handled by the main thread, so elsewhere there is nothing to do. The handler is exchanged and not the
    signal masked, since the child would inherit the mask.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *call: pressed.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            before(*pressed[0])


# --- the steps ----------------------------------------------------------------------------------------------------


def _validate_grace(grace: object) -> float:
    seconds = clock.validate_timeout(grace, "grace")
    if seconds is None:
        raise ValueError(f"grace must be a finite number of seconds, not {grace!r}")
    return seconds


def _lead_a_session(arguments: dict[str, Any]) -> None:
    group = arguments.get("process_group")
    if group is not None:
        raise ValueError(f"process_group={group!r}: a process of tokenscope leads a session and group of its own")
    arguments["start_new_session"] = True


def _moment(timeout: float | None) -> float | None:
    """When a wait of ``timeout`` seconds ends; a negative number is no time at all, as in ``subprocess``.

    Raises:
        TypeError, ValueError: It is not a number.
    """
    if isinstance(timeout, int | float) and timeout < 0:
        return clock.now()
    return clock.deadline_after(clock.validate_timeout(timeout))


def _name_of(args: Any) -> str:
    first = args if isinstance(args, (str, bytes, os.PathLike)) else next(iter(args), "")
    return os.fsdecode(first)
