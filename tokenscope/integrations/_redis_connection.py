"""Connections of redis-py whose sockets are guarded: each blocking call works for the token current where it is made.

A guarded class is made of three layers, so that TLS, sentinels and classes of users keep working::

    GuardedConnection      before a command: the token; after a cut: the connection is closed
    SSLConnection, ...     the class that the pool had
    _Tcp or _Unix          connects; the socket has a guard while the layers above do their handshake

Invariant: a connection that a cancel reached in a call is closed when that call ends. So a pool never gets one back
that was read half: redis-py connects it anew.
"""

from __future__ import annotations

import copy
import functools
import socket
from typing import TYPE_CHECKING, Any

from redis.backoff import AbstractBackoff
from redis.connection import Connection, UnixDomainSocketConnection

from tokenscope._core._typing import override
from tokenscope._core.current import current_token, sleep
from tokenscope._core.errors import TaskCancelled, TokenScopeError
from tokenscope.net.connect import connect_guarded
from tokenscope.net.guard import Guard
from tokenscope.net.handshake import close_half_made
from tokenscope.net.shared import SharedGuard
from tokenscope.net.stream import GuardedSocket

if TYPE_CHECKING:
    from collections.abc import Callable

    _Base = Connection
else:
    _Base = object

__all__ = ["GuardedConnection", "guarded_class"]


class GuardedConnection(_Base):
    """In front of a connection class; one thread at a time uses it for commands, as redis-py has it."""

    plain: type  # the class that it was made of
    disconnect: Any  # redis-py's
    _dialled: tuple[socket.socket, Guard] | None = None  # connected, and not yet through the handshake
    _shared: SharedGuard

    @property
    def retry(self) -> Any:
        """The rules by which redis-py tries again; its pauses end with the token."""
        return self._pausing

    @retry.setter
    def retry(self, retry: Any) -> None:
        self._pausing = _with_cancellable_pauses(retry)

    @override
    def connect(self) -> None:
        """As redis-py's, unless the token is cancelled: a pool asks this first, so what is idle stays unharmed."""
        current_token().check()
        self._run(super().connect)

    @override
    def send_packed_command(self, *args: Any, **options: Any) -> None:
        self._run(super().send_packed_command, *args, **options)

    @override
    def read_response(self, *args: Any, **options: Any) -> Any:
        return self._run(super().read_response, *args, **options)

    @override
    def can_read(self, timeout: float = 0) -> Any:
        if timeout == 0:
            return self._run(super().can_read, timeout)
        if self._sock is None:
            self.connect()
        # hiredis' parser does not wait in the socket, but with `poll` on its descriptor.
        return self._run(self._shared.call, super().can_read, timeout)

    def _run(self, step: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run one step; if it is cut, the connection is over.

        redis-py itself does so for what ends a command, but not for a message that it waits for, nor for all that
        happens while it connects.
        """
        try:
            return step(*args, **options)
        except Exception as error:
            if isinstance(error, TaskCancelled):
                self.disconnect()
            raise
        except BaseException:
            self.disconnect()
            raise

    @override
    def _connect(self) -> Any:
        try:
            sock = super()._connect()  # type: ignore[no-untyped-call]
        except BaseException as error:
            self._give_up(error)
            raise
        dialled, self._dialled = self._dialled, None
        guard = dialled[1] if dialled else Guard(sock)  # or a class of somebody's that connects by itself
        guard.detach()  # if a cancel was faster, the next call tells
        self._shared = SharedGuard(guard)
        return GuardedSocket(sock, self._shared)

    def _dial(self, address: Any, **options: Any) -> Any:
        token = current_token()
        sock, guard = connect_guarded(address, token=token, timeout=self.socket_connect_timeout, **options)
        self._dialled = sock, guard
        sock.settimeout(self.socket_timeout)
        return sock

    def _give_up(self, error: BaseException) -> None:
        """Leave nothing open of a connection whose handshake failed.

        Raises:
            Cancelled: The token is cancelled.
        """
        if self._dialled is None:
            return
        (sock, guard), self._dialled = self._dialled, None
        close_half_made(error)
        try:
            guard.check(error)
        finally:
            guard.detach()
            guard.release()
            sock.close()


class _Tcp(Connection):
    def _connect(self) -> Any:
        options: list[tuple[int, int, int | bytes]] = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
        if self.socket_keepalive:
            options.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
            options += [(socket.IPPROTO_TCP, name, value) for name, value in self.socket_keepalive_options.items()]
        dial: Callable[..., Any] = self._dial  # type: ignore[attr-defined]  # of the layer on top
        # What redis-py calls the type of a socket, it passes on as the family of the address.
        return dial((self.host, self.port), family=self.socket_type, socket_options=options)


class _Unix(UnixDomainSocketConnection):
    def _connect(self) -> Any:
        dial: Callable[..., Any] = self._dial  # type: ignore[attr-defined]  # of the layer on top
        return dial(self.path)


@functools.cache
def guarded_class(plain: type) -> type:
    """The guarded form of a connection class.

    Raises:
        TokenScopeError: It connects in a way of its own.
    """
    for theirs, ours in ((UnixDomainSocketConnection, _Unix), (Connection, _Tcp)):
        if issubclass(plain, theirs):
            below = (ours,) if plain is theirs else (plain, ours)
            names = {"__module__": plain.__module__, "__doc__": plain.__doc__, "plain": plain}
            return type(plain.__name__, (GuardedConnection, *below), names)
    raise TokenScopeError(
        f"the client connects with {plain!r}, where a cancel could not reach it; only subclasses of redis-py's"
        " Connection and UnixDomainSocketConnection are supported"
    )


class _Pausing(AbstractBackoff):
    """A backoff that makes the pause itself, and then asks redis-py for none."""

    def __init__(self, backoff: Any) -> None:
        self._backoff = backoff

    @override
    def reset(self) -> None:
        self._backoff.reset()

    @override
    def compute(self, failures: int) -> float:
        sleep(max(0.0, self._backoff.compute(failures)))
        return 0.0


def _with_cancellable_pauses(retry: Any) -> Any:
    """A copy of it (the original is its user's); as it is, if it was made by other means than redis-py's."""
    backoff = getattr(retry, "_backoff", None)
    if backoff is None or isinstance(backoff, _Pausing):
        return retry
    pausing = copy.copy(retry)
    pausing._backoff = _Pausing(backoff)  # noqa: SLF001 - one of the hooks
    return pausing
