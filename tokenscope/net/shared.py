"""A guard for a socket that belongs to nobody: each call works for the token that is current where it is made.

Two threads may use such a socket at the same time, one to read and one to write, each for a task of its own. A `Guard`
has one token at a time; so each call borrows one, and a second call at the same time makes a second one, with a
duplicate of its own. One thread alone never needs more than one.

States: as those of `Guard`, for each; the connection is *cut* as soon as one of them has fired.

Invariants
    1. A guard is borrowed by one call at a time: taken from ``_idle`` and put back in single steps.
    2. ``_all`` only grows, and what fired stays in it. A guard fires before the connection is shut down; so whoever
       comes back from a blocked call that somebody else's cancel ended finds the reason there, and does not take the
       end for a peer that hung up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenscope._core.errors import TaskCancelled
from tokenscope._core.token import NEVER
from tokenscope.net.guard import Guard
from tokenscope.net.stream import GuardedSocket
from tokenscope.sync._line import waiting_token

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from tokenscope._core.reasons import CancelReason
    from tokenscope._core.token import CancellationToken

__all__ = ["SharedGuard", "take_over"]


def take_over(sock: socket.socket, token: CancellationToken | None) -> GuardedSocket:
    """A connected socket with a shared guard. If there is no descriptor left for that, the socket is closed."""
    try:
        return GuardedSocket(sock, SharedGuard(Guard(sock), token))
    except BaseException:
        sock.close()
        raise


class SharedGuard:
    """Guards one connection for whoever uses it. Thread-safe.

    Args:
        guard: The first guard, unattached; taken over.
        token: Ends all calls too, beside the current token of each.
    """

    __slots__ = ("_all", "_explicit", "_holders", "_idle")

    def __init__(self, guard: Guard, token: CancellationToken | None = None) -> None:
        self._all = [guard]
        self._idle = [guard]
        self._explicit = token
        self._holders = [None]  # as in `Guard`; append and pop are atomic

    def __repr__(self) -> str:
        return f"<SharedGuard {self._all!r}>"

    def call(self, operation: Callable[..., Any], *args: Any) -> Any:
        """As `Guard.call`, for the current token.

        Raises:
            Cancelled: This thread is cancelled. The connection is cut.
            TaskCancelled: Another's cancel cut the connection, before or meanwhile.
        """
        guard = self._borrow()
        return self._run(guard, guard.call, operation, args)

    def upload(self, operation: Callable[..., Any], *args: Any) -> Any:
        """As `Guard.upload`, for the current token; raises as `call`."""
        guard = self._borrow()
        return self._run(guard, guard.upload, operation, args)

    def _run(self, guard: Guard, run: Callable[..., Any], operation: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        try:
            guard.attach(waiting_token(self._explicit), explicit=True)
            self._look(guard)
            try:
                answer = run(operation, *args)
            except Exception as error:
                self._look(guard, error)
                raise
            self._look(guard)
            return answer
        finally:
            guard.detach()
            self._idle.append(guard)

    def _look(self, guard: Guard, error: BaseException | None = None) -> None:
        """Raise if a cancel cut the connection: one's own first."""
        reason = self._reason()
        if reason is not None:
            guard.check(error)
            raise TaskCancelled("the connection was cut by a cancel of another task that used it", reason) from error

    def _reason(self) -> CancelReason | None:
        return next((guard.reason for guard in self._all if guard.reason is not None), None)

    def _borrow(self) -> Guard:
        try:
            return self._idle.pop()
        except IndexError:
            return self._one_more()

    def _one_more(self) -> Guard:
        guard = self._all[0].twin()
        self._all.append(guard)
        if not self._holders:  # closed meanwhile: register, then look
            guard.release()
        return guard

    def shutdown(self, how: int) -> None:
        """Shut the connection down for its user, below TLS. Safe from any thread."""
        guard = self._borrow()
        guard.attach(NEVER)  # `Guard.shutdown` leaves alone what works for nobody
        guard.shutdown(how)
        guard.detach()
        self._idle.append(guard)

    def retain(self) -> None:
        """As `Guard.retain`."""
        self._holders.append(None)

    def release(self) -> None:
        """As `Guard.release`. Never blocks: finalizers may call it."""
        if self._holders:
            self._holders.pop()
        if not self._holders:
            for guard in tuple(self._all):
                guard.release()
