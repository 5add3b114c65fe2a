"""A worker: a process that runs one function after another for its owner, until that hangs up.

It was forked by the fork server and has one thread. A call finds the surroundings of its caller: ``sys.path``,
``sys.argv``, the working directory; and ``__main__``, where that is needed. It runs outside of all scopes, in an empty
context.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing import process as processes
from multiprocessing import spawn
from typing import TYPE_CHECKING, Any

from tokenscope._core.errors import Cancelled, TaskCancelled
from tokenscope.process import _wire
from tokenscope.process._offload import importing_main

if TYPE_CHECKING:
    import socket

__all__ = ["work"]

_PR_SET_PDEATHSIG = 1


def work(job: socket.socket, server: int) -> None:
    """Run what comes, until the owner hangs up."""
    _die_with(server)
    # A stray SIGINT while idle; the owner has gone.
    with job, contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        while (request := _wire.receive(job)) is not None:
            answer = _answer(request)
            _flush()
            _wire.send(job, pickle.dumps(answer._replace(spent=answer.spent or _has_leftovers())))


def _die_with(server: int) -> None:
    """Have the system kill us when somebody kills the fork server: nobody else could."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)


def _answer(request: bytes) -> _wire.Answer:
    try:
        surroundings, payload = pickle.loads(request)  # noqa: S301  # from our owner
        _prepare(surroundings)
    except BaseException as error:
        return _failed("could not make its process like the caller's (__main__, sys.path, folder)", error)._replace(
            spent=True
        )
    try:
        fn, args = pickle.loads(payload)  # noqa: S301  # as above
    except BaseException as error:
        return _failed("could not load the function or its arguments", error)
    try:
        value = contextvars.Context().run(fn, *args)
    except Cancelled as error:
        return _raised(_foreign(error))
    except Exception as error:
        return _raised(error)
    except BaseException as error:
        return _failed("raised what ends a process", error)
    try:
        return _wire.Answer(value=pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    except Exception as error:
        return _failed(f"returned a {type(value).__qualname__}, which cannot be pickled", error)


def _prepare(surroundings: dict[str, Any]) -> None:
    """A ``__main__`` without a guard is refused meanwhile, by us and by ``multiprocessing``, and starts nothing."""
    current: Any = processes.current_process()
    importing_main.set()
    current._inheriting = True  # noqa: SLF001  # the mark that ``multiprocessing`` sets and looks at itself
    try:
        spawn.prepare(surroundings)
    finally:
        del current._inheriting  # noqa: SLF001  # as above
        importing_main.clear()


def _raised(error: Exception) -> _wire.Answer:
    answer = _failed("raised", error)
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # noqa: S301  # our own. Errors with a constructor of their own often fail only here
    except Exception as why:
        return answer._replace(trouble=f"{answer.trouble}. The exception itself cannot be pickled: {_in_words(why)}")
    return answer._replace(error=pickled)


def _failed(what: str, error: BaseException) -> _wire.Answer:
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next  # without this file
    trace = "".join(traceback.format_exception(error))
    return _wire.Answer(trouble=f"{what}: {_in_words(error)}", trace=trace)


def _in_words(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _foreign(error: Cancelled) -> TaskCancelled:
    """The caller is not cancelled: it was a token that the function made itself."""
    told = TaskCancelled(f"cancelled by a token of its own, {error.origin!r}", error.reason)
    return told.with_traceback(error.__traceback__)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()


def _has_leftovers() -> bool:
    """Whether a thread or a process of the function's is still there."""
    strangers = [thread for thread in threading.enumerate() if not thread.name.startswith("tokenscope-")]
    if len(strangers) > 1:
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
