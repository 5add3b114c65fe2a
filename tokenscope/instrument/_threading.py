"""Bare threads and executors, adopted by the scope that they are started in: for code that cannot be edited.

guarded:      ``threading.Thread.start`` and ``concurrent.futures.ThreadPoolExecutor.submit`` inside of a scope: what
    they start is a child of the scope, in a copy of the caller's context, under a token of its own
interrupted:  a checkpoint in it raises; what is queued in an executor never starts; the scope joins what runs
not:          threads made with ``daemon=True``; those that the standard library or tokenscope start for themselves;
    what is started in a `shield`, or when the scope has ended; ``_thread``; process pools; ``Thread.join``
versions:     the threading of Python >=3.11
compat:       tests/instrument/test_threading.py
"""

from __future__ import annotations

import concurrent.futures
import sys
import threading
from typing import TYPE_CHECKING, Any

from tokenscope._core import ambient
from tokenscope._core.current import current_token, standing_back
from tokenscope._core.errors import TaskCancelled
from tokenscope._core.scope import ThreadScope, adopt
from tokenscope._core.token import is_cut_of, is_within
from tokenscope.integrations._patch import Patch, Patches

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.task import Task

__all__ = ["PATCHES"]

# On a thread that was made with ``daemon=True``. That a thread is one says nothing: it inherits that from its maker.
_DAEMON = "_tokenscope_daemon"


def _owner() -> ThreadScope | None:
    """The scope that adopts what is started here, if there is one."""
    owner = ambient.owner_var.get()
    scope = None if owner is None else owner.scope
    if not PATCHES.on or not isinstance(scope, ThreadScope) or standing_back():
        return None
    return scope if is_within(current_token(), scope.token) else None


class _Work:
    """What was started: run by a task of the scope, and told as threads and executors tell it.

    Its failure is theirs to tell (`threading.excepthook`, the executor's future) and none of the scope's.
    """

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> None:
        self._call = fn, args, kwargs or {}
        self._value: Any = None
        self._error: BaseException | None = None
        self.task: Task[None] | None = None

    def adopt(self, scope: ThreadScope, name: str | None, kind: str) -> Task[None] | None:
        """Become a task of ``scope``; None if that has ended."""
        self.task = adopt(scope, self._run, name, kind)
        return self.task

    def _run(self) -> None:
        fn, args, kwargs = self._call
        try:
            self._value = fn(*args, **kwargs)
        except BaseException as error:  # told by `outcome`
            if self._is_own_cancel(error):
                raise
            self._error = error

    def _is_own_cancel(self, error: BaseException) -> bool:
        return self.task is not None and is_cut_of(error, self.task.token._cut)  # noqa: SLF001 - compared, not kept

    def outcome(self) -> Any:
        """Run it on this thread, as the task; what it returned, or None if it was cancelled.

        Raises:
            BaseException: What it raised.
        """
        assert self.task is not None
        self.task.work()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error
        return self._value


# --- threads --------------------------------------------------------------------------------------------------------


def _init(around: Any) -> Callable[..., None]:
    def __init__(self: threading.Thread, *args: Any, **options: Any) -> None:  # noqa: N807  # it stands for one
        around(self, *args, **options)
        if options.get("daemon"):
            setattr(self, _DAEMON, True)

    return __init__


def _start(around: Any) -> Callable[[threading.Thread], None]:
    def start(self: threading.Thread) -> None:
        scope = None if _is_left_alone(self, _starter()) else _owner()
        work = _Work(self.run)
        if scope is None or work.adopt(scope, self.name, "thread") is None:
            around(self)
        else:
            _start_adopted(self, around, work)

    return start


def _starter() -> object:
    """The module that calls ``start``."""
    return sys._getframe(2).f_globals.get("__name__")  # noqa: SLF001 - documented, for "specialized purposes"


def _is_left_alone(thread: threading.Thread, starter: object) -> bool:
    """Whether nobody means it to be waited for: a daemon, a pool's thread, or one that was started before."""
    if thread.ident is not None or hasattr(thread, _DAEMON):
        return True
    if thread.daemon and not threading.current_thread().daemon:
        return True
    library = str(starter).partition(".")[0]
    return library == "tokenscope" or (library in sys.stdlib_module_names and library != "__main__")


def _start_adopted(thread: threading.Thread, around: Any, work: _Work) -> None:
    own = thread.__dict__.get("run")  # most threads have that of their class

    def run() -> None:
        _put_back(thread, own)
        work.outcome()

    thread.run = run  # type: ignore[method-assign]
    try:
        around(thread)
    finally:
        if thread.ident is None and work.task is not None:  # there was no thread to be had
            _put_back(thread, own)
            work.task.end_unstarted()


def _put_back(thread: threading.Thread, own: Any) -> None:
    thread.__dict__.pop("run", None)
    if own is not None:
        thread.run = own  # type: ignore[method-assign]


# --- executors ------------------------------------------------------------------------------------------------------


def _submit(around: Any) -> Callable[..., Any]:
    def submit(
        self: concurrent.futures.ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        scope = _owner()
        work = _Work(fn, args, kwargs)
        task = None if scope is None else work.adopt(scope, None, "executor")
        if task is None:
            return around(self, fn, *args, **kwargs)
        return _submit_adopted(self, around, work, task)

    return submit


def _submit_adopted(executor: Any, around: Any, work: _Work, task: Task[None]) -> Any:
    def run() -> Any:
        thread = threading.current_thread()
        name = thread.name
        try:
            value = work.outcome()
        finally:
            thread.name = name
        if task.cancelled():  # for whoever asks the future, and is not cancelled himself
            raise TaskCancelled(f"task {task.name!r} was cancelled", task.token.reason)
        return value

    try:
        future = around(executor, run)
    except BaseException:
        task.end_unstarted()
        raise
    registration = task.token.on_cancel(future.cancel)  # nothing if it runs already

    def ended(_: object) -> None:
        registration.close(wait=False)
        task.end_unstarted()  # if it was cancelled in the queue, by whomever

    future.add_done_callback(ended)
    return future


PATCHES = Patches(
    Patch(threading.Thread, "__init__", _init),
    Patch(threading.Thread, "start", _start),
    Patch(concurrent.futures.ThreadPoolExecutor, "submit", _submit),
)
