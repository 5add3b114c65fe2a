"""What lets another thread end a call that is blocked in a database driver.

One `Guard` a connection. Each blocking call runs through `Guard.call`, which looks up the current token, and
nothing of the guard is left in place when the call has ended: an idle connection belongs to nobody.

A cancel asks the database to stop the query; only if that does not help it breaks the connection. Both may
take long (a second connection), so they are done by workers. The owner comes back with the driver's error,
waits until no worker is at it any more, looks at the *token*, puts the connection in order and raises.

::

    owner       begin -----> blocked in the driver -------------> end -> recover -> Cancelled
                  |                                      ^         |
    canceller     |   flag, wake                         |         |
    worker        |     |`-> stop, pause, stop, ... ------+|         `- waits while a stop is under way
    worker        |     `--> (deaf?) break ---------------+

States of a call: *running* (in ``_calls``) -> *ended*; ``fired`` is set, once, when something was done to it, and
``broken`` when that was the connection's end.

Invariants
    1. Something is done to the connection only if it is begun while the call it is meant for is running; `_acting`
       counts what is under way. Calls are told apart by identity, and none begins or returns while something is
       under way (unless the connection is broken, and done for). So a cancel that comes late finds another call,
       or none, and never hits it.
    2. It is done only if *every* running call of the connection is cancelled: a database cancels what a connection
       does, whoever asked for it. (Threads that share a connection, and calls inside of calls.)
    3. One stop is not enough: one that comes before the driver has begun is lost. So it is repeated until the call
       has ended.
    4. Breaking does not wait for stopping, which may itself hang in a dead network.
    5. `wake` takes no lock and calls nothing that blocks: it may run in signal handlers and finalizers.
    6. Between COMMIT and its answer nothing is done: `Guard.commit` is ``uninterruptible``, and in such a section
       `Guard.call` stands back.

Lock order: the lock is a leaf; nothing of a driver is called under it.

Fork: a guard belongs to the process that made it. In another one it does nothing to the connection, which is the
    parent's too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import re
import socket
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from tokenscope._core import _primitives, events, workers
from tokenscope._core import token as tokens
from tokenscope._core.current import current_token, standing_back, uninterruptible
from tokenscope._core.errors import TokenScopeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.token import CancellationToken

__all__ = [
    "END",
    "Driver",
    "Ends",
    "Guard",
    "TwoPhaseEnds",
    "connect_of",
    "in_front_of",
    "next_or_end",
    "shut_down",
]

#: What `next_or_end` answers when there are no more rows.
END = object()

# Seconds between one stop and the next; the last one again and again. A stop is lost if it comes before the
# database has begun, which is a matter of microseconds; later ones are for a server that is slow to obey.
_PAUSES = (0.005, 0.02, 0.1, 0.5)
# Seconds after which a server that has not obeyed counts as deaf.
_DEAF_AFTER = 0.5

# The statements that end a transaction, after blanks and comments. `END` and `RELEASE` commit, too: the
# latter if it names the outermost savepoint.
_COMMITS = "COMMIT|END|RELEASE|PREPARE\\s+TRANSACTION|XA\\s+(?:COMMIT|PREPARE)"
_ROLLBACKS = "ROLLBACK|ABORT"
_ENDING = re.compile(
    rf"(?:\s|--[^\n]*\n|/\*.*?\*/|;)*(?:(?P<commit>{_COMMITS})|(?P<rollback>{_ROLLBACKS}))\b", re.IGNORECASE | re.DOTALL
)


def _never(_connection: object) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Driver:
    """What a guard does to the connections of one library.

    Attributes:
        stop: Called with a connection by any thread: have the database end what it does there. Ends within
            seconds.
        is_certain: Called with a connection and an error (or None) on its owner's thread, after a cut: whether
            it is certain what state the connection is in.
        roll_back: Called with a connection on its owner's thread, if so.
        close: Called with a connection on its owner's thread, if not.
        hang_up: Called with a connection by any thread, when stopping did not help: break it.
        after_stop: Called with a connection on its owner's thread when a call has ended that was stopped, however it
            ended.
        midway: Called with a connection on its owner's thread: whether it is in the middle of an answer
            that somebody has to read to its end.
        certain: A call that returns although it was stopped has really succeeded.
    """

    stop: Callable[[Any], object]
    is_certain: Callable[[Any, Exception | None], bool]
    roll_back: Callable[[Any], object]
    close: Callable[[Any], object]
    hang_up: Callable[[Any], object] | None = None
    after_stop: Callable[[Any], object] | None = None
    midway: Callable[[Any], bool] = _never
    certain: bool = True


class _Call:
    """One blocking call: whom it works for, and what was done to it."""

    __slots__ = ("broken", "ended", "fired", "in_doubt", "rung", "token")

    def __init__(self, token: CancellationToken) -> None:
        self.token = token
        self.rung = False  # workers are on their way
        self.fired = False  # one-way, under the lock: it was stopped, or its connection broken
        self.broken = False  # one-way, under the lock: the latter
        self.in_doubt = False  # one-way: it is not known what arrived, or still will
        self.ended: threading.Event | None = None  # made before the workers are called


class Guard:
    """Guards one connection; see the module's head. The connection owns the guard, not the other way round."""

    __slots__ = (
        "__weakref__",
        "_acting",
        "_attached",
        "_calls",
        "_connection",
        "_driver",
        "_lock",
        "_pid",
        "discarded",
        "on_discard",
    )

    def __init__(self, connection: object, driver: Driver) -> None:
        self._connection = weakref.ref(connection)
        self._driver = driver
        # Re-entrant: finalizers of cursors call the driver, in the middle of anything.
        self._lock = threading.Condition(threading.RLock())
        self._calls: list[_Call] = []  # changes under the lock
        self._acting = 0  # changes under the lock: how many stops are under way
        self._attached: Callable[[], CancellationToken | None] = _nothing
        self._pid = os.getpid()
        self.discarded = False  # one-way: a cut left the connection in doubt, and it was closed
        self.on_discard: Callable[[], object] = _nothing  # called by the owner then

    # --- the owner's side -----------------------------------------------------------------------------------

    def call(self, operation: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run one blocking call of the driver under the current token.

        Raises:
            Cancelled: The token was cancelled before, and nothing was done; or meanwhile, and the call was cut,
                with the driver's error as the ``__cause__``.
        """
        token = self.token()
        if token is tokens.NEVER:
            return operation(*args, **kwargs)
        call = _Call(token)
        try:
            self._begin(call)
            answer = operation(*args, **kwargs)
        except BaseException as error:
            self._end(call)
            if isinstance(error, Exception):
                self._settle(call, error)
            raise
        self._end(call)
        if call.fired and (call.in_doubt or not self._driver.certain):
            self._settle(call, None)
        return answer

    def token(self) -> CancellationToken:
        """The token that ends a call which begins now; `tokens.NEVER` if none does."""
        return tokens.NEVER if standing_back() or self._pid != os.getpid() else current_token()

    def statement(self, sql: object, operation: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As `call`, `commit` or `rollback`, by what the statement says."""
        return self.ending(sql, functools.partial(self.call, operation), operation)(*args, **kwargs)

    def ending(self, sql: object, otherwise: Callable[..., Any], operation: Callable[..., Any]) -> Callable[..., Any]:
        """``operation`` as a `commit` or a `rollback`, if the statement is one; else ``otherwise``."""
        if isinstance(sql, bytes):
            sql = sql.decode("latin-1")
        found = _ENDING.match(sql) if isinstance(sql, str) else None
        if found is None:
            return otherwise
        return functools.partial(self.commit if found["commit"] else self.rollback, operation)

    def commit(self, operation: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a call that commits: refused if the current token is cancelled, and out of reach once it has begun.

        Raises:
            Cancelled: The token is cancelled. The transaction was rolled back: some frameworks would commit it all the
                same, when they put the connection in order.
        """
        token = current_token()
        if token.cancelled and not standing_back():
            connection = self._connection()
            self._recover(connection, certain=not self._driver.midway(connection))
            token.check()
        return self.rollback(operation, *args, **kwargs)

    def rollback(self, operation: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a call that puts things in order, whether or not the current token is cancelled."""
        with uninterruptible():
            return operation(*args, **kwargs)

    def _begin(self, call: _Call) -> None:
        if call.token.cancelled:
            self._refuse(call.token)
        # Visible first, then registered, then looked: no cancel falls in between.
        with self._lock: self._add_locked(call)  # fmt: skip
        if self._attached() is not call.token:
            tokens.attach(call.token, self)  # weakly, and never detached: who is woken looks at what runs then
            self._attached = weakref.ref(call.token)
        if call.token.cancelled:
            self._refuse(call.token)

    def _refuse(self, token: CancellationToken) -> NoReturn:
        """Begin nothing. What was begun and would never be read to its end is nobody's any more."""
        connection = self._connection()
        if self._driver.midway(connection):
            self._discard(connection)
        token.check()
        raise AssertionError  # the token is cancelled, once and for ever

    def _add_locked(self, call: _Call) -> None:
        while self._acting:
            self._lock.wait()  # what is under way is meant for somebody else
        self._calls.append(call)

    def _end(self, call: _Call) -> None:
        with self._lock: self._remove_locked(call)  # fmt: skip
        if call.ended is not None:
            call.ended.set()
        if call.fired and self._driver.after_stop is not None:
            with uninterruptible():
                self._try("reset", self._driver.after_stop, self._connection())

    def _remove_locked(self, call: _Call) -> None:
        _primitives.discard(self._calls, call)
        while self._acting and not call.broken:
            self._lock.wait()

    def _settle(self, call: _Call, error: Exception | None) -> None:
        """Decide what an end means: under a cancelled token every failure is the cancel's doing.

        Raises:
            Cancelled: The token is cancelled. The connection was put in order before.
        """
        tokens.expire_if_due(call.token)
        if not call.token.cancelled:
            return
        connection = self._connection()  # its owner keeps it alive
        in_doubt = call.in_doubt or call.broken
        self._recover(connection, certain=not in_doubt and self._driver.is_certain(connection, error))
        tokens.raise_if_cancelled(call.token, error)

    def _recover(self, connection: object, *, certain: bool) -> None:
        """Roll back, or discard the connection."""
        with uninterruptible():
            if not (certain and self._try("rollback", self._driver.roll_back, connection)):
                self._discard(connection)

    def _discard(self, connection: object) -> None:
        self.discarded = True
        with uninterruptible():
            if self._driver.midway(connection):  # the server would work on for nobody
                self._try("stop", self._driver.stop, connection)
            self._try("close", self._driver.close, connection)
            self._try("close", self.on_discard)

    def _try(self, what: str, action: Callable[..., object], *args: object) -> bool:
        """Whether it could be done; a failure is told."""
        try:
            action(*args)
        except Exception as failure:
            self._tell(what, failure)
            return False
        return True

    # --- the canceller's side -------------------------------------------------------------------------------

    def wake(self) -> None:
        """Have each running call stopped whose token is cancelled. Never blocks, never raises."""
        if self._pid != os.getpid():
            return
        for call in tuple(self._calls):
            if call.token.cancelled and not call.rung:
                call.rung = True
                call.ended = call.ended or threading.Event()
                self._hand_over(call, call.ended)

    def _hand_over(self, call: _Call, ended: threading.Event) -> None:
        try:
            workers.submit(functools.partial(self._stop_until_ended, call, ended))
            if self._driver.hang_up is not None:
                workers.submit(functools.partial(self._break_if_deaf, call, ended, self._driver.hang_up))
        except RuntimeError as error:  # no thread to be had: once is better than never
            self._tell("stop", error)
            self._act(call, self._driver.stop)

    def _stop_until_ended(self, call: _Call, ended: threading.Event) -> None:
        for pause in itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1])):
            if not self._act(call, self._driver.stop) or ended.wait(pause):
                return

    def _break_if_deaf(self, call: _Call, ended: threading.Event, hang_up: Callable[[Any], object]) -> None:
        while not ended.wait(_DEAF_AFTER) and self._act(call, hang_up, final=True):
            pass

    def _act(self, call: _Call, action: Callable[[Any], object], *, final: bool = False) -> bool:
        """Do something to the connection if that hits nobody else; False if the call has ended."""
        connection = self._connection()
        with self._lock: state = self._claim_locked(call, final=final)  # fmt: skip
        if not state:
            return state is not None
        try:
            action(connection)
        except Exception as error:
            call.in_doubt = True
            self._tell("stop", error)
        finally:
            with self._lock: self._done_locked()  # fmt: skip
        return True

    def _claim_locked(self, call: _Call, *, final: bool) -> bool | None:
        """Whether to act now; None if the call has ended."""
        if call not in self._calls:
            return None
        if not all(running.token.cancelled for running in self._calls):
            return False
        call.fired = True
        call.broken = call.broken or final
        self._acting += 1
        return True

    def _done_locked(self) -> None:
        self._acting -= 1
        self._lock.notify_all()

    def _tell(self, what: str, error: Exception) -> None:
        name = type(self._connection()).__module__
        events.emit(events.CallbackFailed(f"{what} of a cancelled database call ({name})", error))


class Ends:
    """``commit`` and ``rollback`` of a guarded connection. In front of the driver's class, whose own they call."""

    _guard: Guard

    def commit(self) -> None:
        """Commit, unless the current token is cancelled.

        Raises:
            Cancelled: It is; nothing was committed.
        """
        self._guard.commit(super().commit)  # type: ignore[misc]

    def rollback(self) -> None:
        """Roll back, whether or not the current token is cancelled."""
        self._guard.rollback(super().rollback)  # type: ignore[misc]


class TwoPhaseEnds(Ends):
    """With the two-phase forms of the DB-API."""

    def tpc_prepare(self) -> None:
        """As the driver's; like a commit."""
        self._guard.commit(super().tpc_prepare)  # type: ignore[misc]

    def tpc_commit(self, *xid: Any, **options: Any) -> None:
        """As the driver's; like a commit."""
        self._guard.commit(super().tpc_commit, *xid, **options)  # type: ignore[misc]

    def tpc_rollback(self, *xid: Any, **options: Any) -> None:
        """As the driver's; like a rollback."""
        self._guard.rollback(super().tpc_rollback, *xid, **options)  # type: ignore[misc]


def in_front_of(factory: Any, ours: Any) -> Any:
    """The cursor class of somebody else with ``ours`` in front, unless it is there already."""
    return factory if issubclass(factory, ours) else _joined_class(factory, ours)


@functools.cache
def _joined_class(factory: Any, ours: Any) -> type:
    return type(factory.__name__, (ours, factory), {"__doc__": factory.__doc__, "__module__": ours.__module__})


# The drivers that have an integration, which is a module of the same name.
_DRIVERS = frozenset(("sqlite3", "psycopg", "psycopg2", "pymysql"))


def connect_of(driver: str, whose: str) -> Callable[..., Any]:
    """The function that connects with a guard. Only the driver in use need be installed.

    Raises:
        TokenScopeError: There is none for this driver, which is ``whose``.
        ImportError: The driver is not installed.
    """
    if driver not in _DRIVERS:
        raise TokenScopeError(f"tokenscope cannot cancel queries of {whose} {driver!r}")
    connect: Callable[..., Any] = importlib.import_module(f"tokenscope.integrations.{driver}").connect
    return connect


def next_or_end(step: Callable[[], Any]) -> Any:
    """The next row, or `END`: that there are no more is an answer, and no failure that a cancel could have caused."""
    try:
        return step()
    except StopIteration:
        return END


def _nothing() -> None:
    """In place of a weak reference before the first call, and of a function that nobody has set."""


def shut_down(descriptor: int) -> None:
    """Break the connection under a driver. Its owner is in a call, so that the descriptor cannot be another's.

    Never through the driver, which would close it: a closed descriptor wakes nobody, and its number may be somebody
    else's a microsecond later.
    """
    with socket.socket(fileno=os.dup(descriptor)) as twin, contextlib.suppress(OSError):  # it is broken already
        twin.shutdown(socket.SHUT_RDWR)
