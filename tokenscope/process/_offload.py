"""`offload`: run a function in another process, which a cancel kills."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from tokenscope._core import clock
from tokenscope._core.current import Boundary, check, current_token
from tokenscope._core.errors import TokenScopeError
from tokenscope.process import _pool, _wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.token import CancellationToken

__all__ = ["OffloadError", "importing_main", "offload"]

T = TypeVar("T")

#: Set in a worker while it loads the user's ``__main__``.
importing_main = threading.Event()


class OffloadError(TokenScopeError):
    """An offloaded function gave neither a result nor an exception of its own.

    Its process died, or what it returned or raised cannot be pickled.

    Attributes:
        returncode: The exit status of the process if it died, negative for a signal; else None.
    """

    def __init__(self, message: str, returncode: int | None = None) -> None:
        super().__init__(message, returncode)
        self.returncode = returncode

    def __str__(self) -> str:
        return str(self.args[0])


def offload(fn: Callable[..., T], /, *args: Any, timeout: float | None = None, name: str | None = None) -> T:
    """Run ``fn(*args)`` in another process, and wait for it; a cancel kills that process. A checkpoint.

    For what Python cannot interrupt: loops that compute, and code in C. The process is killed with all that it started
    before this raises. It is a fresh one that knows nothing of this process but ``sys.path``, ``sys.argv`` and the
    working directory; neither the current token nor context variables get there. It may be used again for later calls.
    Thread-safe.

    Args:
        fn: Must be importable there: a function of a module, no lambda and no closure.
        args: Are pickled, as is the result.
        timeout: Seconds, the start of the process included.
        name: For errors and reports; the name of ``fn`` if None.

    Raises:
        Cancelled: The caller is cancelled.
        DeadlineExceeded: ``timeout`` seconds have passed.
        OffloadError: The process died; or what it returned or raised cannot be pickled.
        TypeError: ``fn`` or an argument cannot be pickled; a bad ``timeout`` or ``name``.
        ValueError: A bad ``timeout``.
        RuntimeError: ``__main__`` calls this while it is being imported.
        OSError: No process could be started.
        Exception: Whatever ``fn`` raised, with the traceback from there as a note.
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, not {fn!r}")
    seconds = clock.validate_timeout(timeout)
    title = getattr(fn, "__qualname__", repr(fn)) if name is None else name
    _refuse_import_of_main()
    check()
    request = _request(fn, args)
    answer = _wire.Answer()
    with Boundary(lambda: current_token().child(timeout=seconds, name=title)) as token:
        answer = _ask(request, token)
    result: T = _outcome(answer, title)
    return result


def _refuse_import_of_main() -> None:
    if importing_main.is_set():
        raise RuntimeError(
            "the __main__ of this program calls offload() while it is being imported in a worker process."
            " Guard what the program does with `if __name__ == '__main__':`, or move the function into a module"
        )


# --- there ----------------------------------------------------------------------------------------------------------


def _request(fn: Callable[..., object], args: tuple[Any, ...]) -> bytes:
    try:
        call = pickle.dumps((fn, args), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise _unpicklable(fn, args) from error
    return pickle.dumps((_surroundings(with_main=b"_main__" in call), call), pickle.HIGHEST_PROTOCOL)


def _unpicklable(fn: Callable[..., object], args: tuple[Any, ...]) -> TypeError:
    parts = {"fn": fn} | {f"args[{number}]": value for number, value in enumerate(args)}
    for where, value in parts.items():
        try:
            pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            hint = ": a function must be importable by its name, no lambda and no closure" if where == "fn" else ""
            return TypeError(f"{where}={value!r} cannot be pickled ({error}){hint}")
    return TypeError("fn and its arguments cannot be pickled together")


def _surroundings(*, with_main: bool) -> dict[str, Any]:
    """What the process should find as it is here, in the words of ``multiprocessing.spawn.prepare``."""
    here = os.getcwd()  # noqa: PTH109  # a string for everybody
    found: dict[str, Any] = {"sys_path": [path or here for path in sys.path], "sys_argv": sys.argv, "dir": here}
    if with_main:
        main: Any = sys.modules["__main__"]
        module = getattr(getattr(main, "__spec__", None), "name", None)
        path = getattr(main, "__file__", None)
        if module is not None:
            found["init_main_from_name"] = module
        elif path is not None:
            found["init_main_from_path"] = os.path.abspath(path)  # noqa: PTH100  # as above
    return found


def _ask(request: bytes, token: CancellationToken) -> _wire.Answer:
    pool = _pool.pool()
    worker = pool.take()
    try:
        answer = worker.ask(request, token)
    except BaseException:
        worker.end()
        raise
    if answer is None:
        raise _died(worker.end(), token.name)
    if answer.spent:
        worker.end()
    else:
        pool.give_back(worker)
    return answer


# --- and back -------------------------------------------------------------------------------------------------------


def _died(ended: _wire.Ended, title: str) -> OffloadError:
    code = ended.returncode
    if ended.trouble:
        return OffloadError(f"offload {title}: no process could be forked: {ended.trouble}")
    if code is None:
        return OffloadError(f"offload {title}: the fork server was killed, and its workers with it")
    if code == -signal.SIGKILL:
        how = "was killed by SIGKILL; the system does that when memory runs out"
    elif code < 0:
        how = f"was killed by {_signal_name(-code)}"
    else:
        how = f"ended with exit code {code}"
    return OffloadError(f"offload {title}: process {ended.pid} {how}", code)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


def _outcome(answer: _wire.Answer, title: str) -> Any:
    if not answer.trouble:
        try:
            return pickle.loads(answer.value)  # noqa: S301  # from our worker
        except Exception as error:
            raise OffloadError(f"offload {title}: returned what cannot be unpickled here: {error}") from error
    raised = _loaded(answer) or OffloadError(f"offload {title}: {answer.trouble}")
    raised.add_note(f"In the process of offload {title}:\n{answer.trace.rstrip()}")
    raise raised


def _loaded(answer: _wire.Answer) -> Exception | None:
    try:
        error = pickle.loads(answer.error)  # noqa: S301  # as above
    except Exception:
        return None  # it came without one, or with one that is known only there: its words are told instead
    return error if isinstance(error, Exception) else None
