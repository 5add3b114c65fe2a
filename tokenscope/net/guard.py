"""A guard: what lets another thread end a call that is blocked on a socket.

The canceller does one thing: ``shutdown(SHUT_RDWR)`` on a duplicate of the file descriptor that belongs to
the guard. The blocked thread comes back, looks at its *token* and raises. It never looks at the exception
type or the result: several phases of HTTP end as a false success when the socket is shut down (a body that
ends with the connection, half-sent headers).

Why a duplicate: ``close()`` from another thread wakes nobody, and the number it frees may be somebody else's
socket a microsecond later. ``ssl`` and urllib3 close in many places, outside any lock of ours; a duplicate
cannot be reused under us. Why never through the ``SSLSocket``: its ``shutdown`` drops the TLS layer first,
and the owner would go on in plain text. The price: one more descriptor for each connection, and a duty: the
peer sees no FIN before the duplicate is closed as well.

States: *idle* (no token) -> *attached* (one token) -> *idle* ... until *fired* (shut down; for ever) or
    *closed* (no holder left).

Invariants
    1. ``shutdown`` happens with the lock held, on an open duplicate, while ``_token`` is cancelled. So after
        `detach` has
       returned, no cancel reaches the connection, and a late wake-up by a token of the past does nothing.
    2. Only `detach` and the entry into a shielded call ever *wait* for the lock, for as long as one system
        call takes. `wake` and
       `release` run in cancellers, signal handlers and finalizers: they leave a mark and try the lock; who
       holds it looks at the marks after letting go (`_settle`). Hence no waiting for oneself.
    3. The lock is a leaf: nothing is called under it but the socket.

Fork: a guard belongs to the process that made it. In another one it never shuts down the connection, which is
    the parent's too.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

from tokenscope._core import _primitives
from tokenscope._core import token as tokens
from tokenscope._core.current import current_token, standing_back
from tokenscope._core.errors import TaskCancelled

_ioctl: Callable[..., Any] | None
try:
    from fcntl import ioctl as _ioctl
except ImportError:  # not a Unix: the upload flag alone decides
    _ioctl = None

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.reasons import CancelReason
    from tokenscope._core.token import CancellationToken

__all__ = ["Guard"]

# SO_LINGER with a time of 0: `shutdown` sends RST at once. A FIN would queue behind megabytes that nobody
# reads.
_ABORT = struct.pack("ii", 1, 0)
_SIOCOUTQNSD = 0x894B  # Linux: how many bytes of the send queue have not left this machine
_MODE_IS_SET = getattr(socket, "SOCK_NONBLOCK", 0)


class Guard:
    """Guards one connection. Register it with a token by `attach`, run each blocking call through `call`.

    One thread at a time uses a guard, as with the connection itself; `wake` may be called by any thread.

    Args:
        sock: A connected or connecting socket. The guard duplicates its descriptor and keeps no reference to
            it.
    """

    __slots__ = (
        "__weakref__",
        "_dup",
        "_explicit",
        "_fired",
        "_holders",
        "_lock",
        "_pid",
        "_reason",
        "_rung",
        "_shielded",
        "_token",
        "_uploading",
    )

    def __init__(self, sock: socket.socket) -> None:
        self._lock = _primitives.Lock()
        self._dup = _duplicate(sock)  # closed under the lock, once `_holders` is empty
        self._fired = False  # one-way, under the lock: the connection was shut down
        self._reason: CancelReason | None = None  # why; set before `_fired`
        self._shielded = False  # set under the lock: the owner is in a call that its token must not cut
        self._token: CancellationToken | None = None  # set by the owner; cleared under the lock
        self._explicit = False  # whoever reads asked for this token (`Session(token=...)`)
        self._uploading = False  # the owner is inside of a write
        self._rung = False  # a mark: a canceller called
        self._holders = [None]  # one entry each for the connection and its open files; append and pop are atomic
        self._pid = _primitives.getpid()

    def __repr__(self) -> str:
        state = "closed" if not self._holders else "fired" if self._fired else "attached" if self._token else "idle"
        return f"<Guard of fd {self._dup.fileno()}, {state}>"

    def __del__(self) -> None:
        self._dup.close()  # takes no lock; nobody else is left who could

    def twin(self) -> Guard:
        """Another guard of the same connection, for a second thread that uses it at the same time.

        Raises:
            OSError: This one is closed.
        """
        return Guard(self._dup)

    # --- the token ------------------------------------------------------------------------------------------

    @property
    def token(self) -> CancellationToken | None:
        """The token that the connection works for, or None while it is idle."""
        return self._token

    @property
    def reason(self) -> CancelReason | None:
        """Why a cancel shut the connection down; None if none did."""
        return self._reason

    @property
    def foreign(self) -> bool:
        """Whether the connection belongs to another process, from which this one was forked."""
        return self._pid != _primitives.getpid()

    def attach(self, token: CancellationToken, *, explicit: bool = False) -> None:
        """Let a cancel of ``token`` end what the connection does. Raises no `Cancelled`; look with `check`.

        Args:
            token: The token, until `detach`.
            explicit: The user named this token himself, so that whoever reads is meant by its cancel.
        """
        self._token = token
        self._explicit = explicit
        tokens.attach(token, self)  # False: cancelled already, no wake-up will come; the next `check` sees it

    def detach(self) -> bool:
        """Make the connection unreachable for its token; a cancel from now on comes too late.

        Returns:
            True if the connection is as good as before; False if a cancel shut it down, or if it is that of a
            parent process: close it.
        """
        token = self._token
        if token is None:
            return not self._fired
        if self.foreign:  # the lock may have been copied while a thread of the parent held it
            self._token = None
            return False
        with self._lock: self._token = None  # fmt: skip
        tokens.detach(token, self)
        self._settle()
        return not self._fired

    # --- the owner's side -----------------------------------------------------------------------------------

    def upload(self, operation: Callable[..., Any], *args: Any) -> Any:
        """As `call`, for a write: a cancel resets the connection; the peer need not read to see it."""
        self._uploading = True
        try:
            return self.call(operation, *args)
        finally:
            self._uploading = False

    def call(self, operation: Callable[..., Any], *args: Any) -> Any:
        """Run one blocking socket call, and let the token decide what its end means.

        Raises:
            Cancelled: The token is cancelled, whatever the call answered; its own error, if any, is the
                ``__cause__``.
            TaskCancelled: As above, but the token is that of a foreign task, and this thread's own is not
                cancelled.
        """
        token = self._token
        if standing_back() and token is not None and self._stands_back(token):
            return self._call_shielded(operation, *args)
        if token is not None and token.cancelled:
            self.check()
        try:
            answer = operation(*args)
        except Exception as error:
            self.check(error)
            raise
        if token is not None and token.cancelled:
            self.check()
        return answer

    def _call_shielded(self, operation: Callable[..., Any], *args: Any) -> Any:
        """Run a call that a cancel must not cut; but if a cancel was faster, nothing is begun."""
        if not self.foreign:
            with self._lock: self._shielded = True  # fmt: skip
        try:
            self.check()
            answer = operation(*args)
        finally:
            self._shielded = False
        self.check()
        return answer

    def check(self, error: BaseException | None = None) -> None:
        """Raise if the token is cancelled: the one place where "cancelled or failed?" is decided.

        Args:
            error: What the socket said, if it said something. It may mean that the time is up.
        """
        token = self._token
        if token is None:
            return
        if error is not None:
            tokens.expire_if_due(token)
        if token.cancelled and (self._fired or not self._stands_back(token)):
            self.wake()  # the peer shall know now, even if the caller keeps the connection
            self._raise(token, error)

    def _raise(self, token: CancellationToken, error: BaseException | None) -> None:
        here = current_token()
        tokens.raise_if_cancelled(here, error)
        if here is token or self._explicit or standing_back():
            tokens.raise_if_cancelled(token, error)
        # `Cancelled` is raised only in a thread that is cancelled itself; this one merely uses what a task
        # left.
        raise TaskCancelled("the response belongs to a task that was cancelled", token.reason) from error

    def _stands_back(self, token: CancellationToken) -> bool:
        """Whether this thread is in a section that ``token`` must not cut (a commit, a cleanup).

        A token from inside of the section is its own limit, and does cut.
        """
        return standing_back() and not tokens.is_within(current_token(), token)

    # --- the canceller's side -------------------------------------------------------------------------------

    def wake(self) -> None:
        """Shut the connection down if its token is cancelled. Never blocks, never raises, never closes."""
        self._rung = True
        self._settle()

    def shutdown(self, how: int) -> None:
        """Shut the connection down for its user, one way or both, unless it is idle. Safe from any thread."""
        if not self.foreign:
            with self._lock: self._shutdown_locked(how)  # fmt: skip
            self._settle()

    def _shutdown_locked(self, how: int) -> None:
        if self._token is not None and self._holders:
            with contextlib.suppress(OSError):  # it is over already
                self._dup.shutdown(how)

    def _settle(self) -> None:
        """Act on the marks, or leave them to whoever holds the lock and will look at them next."""
        while (self._wants_shutdown() or self._wants_close()) and self._lock.acquire(blocking=False):
            try:
                self._settle_locked()
            finally:
                self._lock.release()

    def _wants_shutdown(self) -> bool:
        token = self._token
        return self._rung and not self._fired and not self._shielded and token is not None and token.cancelled

    def _wants_close(self) -> bool:
        return not self._holders and self._dup.fileno() >= 0

    def _settle_locked(self) -> None:
        if self._wants_shutdown():
            self._reason = self._token.reason if self._token is not None else None
            self._fired = True
            if not self.foreign:
                self._shut_down_locked()
        if self._wants_close():
            self._dup.close()

    def _shut_down_locked(self) -> None:
        try:
            if self._uploading or self._unsent() > 0:
                self._dup.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            self._dup.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed, or never connected: there is nothing left to end

    def _unsent(self) -> int:
        """How many bytes a FIN would have to wait for: the peer has stopped reading."""
        if _ioctl is None:
            return 0
        try:
            answer = _ioctl(self._dup.fileno(), _SIOCOUTQNSD, b"\0\0\0\0")
        except OSError:  # another system, or another kind of socket
            return 0
        return int(struct.unpack("i", answer)[0])

    # --- who keeps it open ----------------------------------------------------------------------------------

    def retain(self) -> None:
        """Count one more holder: the connection itself is the first, each open file of it another."""
        self._holders.append(None)

    def release(self) -> None:
        """Count one holder less; the last one closes the duplicate. Never blocks: finalizers may call it."""
        if self._holders:
            self._holders.pop()
        self._settle()


def _duplicate(sock: socket.socket) -> socket.socket:
    """As ``sock.dup()``, which an `ssl.SSLSocket` refuses: this one only shuts down, below TLS."""
    # Both have one mode, blocking or not, and it is the owner's to change: perhaps at this very moment. A new object
    # sets the mode that goes with the default timeout, unless its type says that the mode is set already (CPython,
    # Modules/socketmodule.c, init_sockobject).
    blocking = os.get_blocking(sock.fileno())
    twin = socket.socket(sock.family, sock.type | _MODE_IS_SET, sock.proto, fileno=os.dup(sock.fileno()))
    if not _MODE_IS_SET:
        os.set_blocking(twin.fileno(), blocking)
    return twin
