"""What a redis-py client makes, in its cancellable form: pipelines, locks and subscriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redis.lock import Lock

from tokenscope._core import clock
from tokenscope._core import token as tokens
from tokenscope._core._typing import override
from tokenscope._core.current import current_token, shield, sleep
from tokenscope.integrations._sql import in_front_of
from tokenscope.sync import Event

if TYPE_CHECKING:
    from redis.client import Pipeline as _Pipeline
    from redis.client import Redis as _Client

    _Lock = Lock
else:
    _Client = _Pipeline = _Lock = object

__all__ = ["GuardedClient", "GuardedLock", "GuardedPipeline"]


class GuardedClient(_Client):
    """In front of the class of a client."""

    @override
    def pipeline(self, *args: Any, **options: Any) -> Any:
        pipeline: Any = super().pipeline(*args, **options)
        pipeline.__class__ = in_front_of(type(pipeline), GuardedPipeline)
        return pipeline

    @override
    def lock(self, *args: Any, **options: Any) -> Any:
        lock: Any = super().lock(*args, **options)
        if isinstance(lock, Lock):  # and no `lock_class` of somebody's own kind
            lock.__class__ = in_front_of(type(lock), GuardedLock)
        return lock

    @override
    def pubsub(self, **options: Any) -> Any:
        pubsub: Any = super().pubsub(**options)  # type: ignore[no-untyped-call]
        pubsub.subscribed_event = Event()  # `get_message` waits for it until there is a subscription
        return pubsub


class GuardedPipeline(_Pipeline):
    """In front of the class of a pipeline."""

    connection: Any  # its own, or None
    watching: bool

    @override
    def reset(self) -> None:  # type: ignore[override]  # as redis-py's pipelines have it
        """As redis-py's, but where there is nothing to unwatch, or no time, it sends no UNWATCH.

        Otherwise a `Cancelled` that leaves the ``with`` of a pipeline would be replaced by what the UNWATCH says, and
        the connection would be lost to its pool.
        """
        if self.watching and (not _is_open(self.connection) or current_token().cancelled):
            self._end_watches()
        try:
            super().reset()
        except BaseException:  # the UNWATCH was cut, or failed
            self._end_watches()
            super().reset()
            raise

    def _end_watches(self) -> None:
        """The server forgets them with the connection."""
        if self.connection:
            self.connection.disconnect()
        self.watching = False


def _is_open(connection: Any) -> bool:
    return connection is not None and connection._sock is not None  # noqa: SLF001 - one of the hooks


class GuardedLock(_Lock):
    """In front of the class of a lock."""

    @override
    def acquire(
        self,
        sleep: float | None = None,
        blocking: bool | None = None,
        blocking_timeout: float | None = None,
        token: str | None = None,
    ) -> bool:
        """As redis-py's; the pauses between two attempts end with the current token.

        Raises:
            Cancelled: This thread is, or was meanwhile, cancelled.
        """
        pause = self.sleep if sleep is None else sleep
        patience = self.blocking_timeout if blocking_timeout is None else blocking_timeout
        end = None if patience is None else clock.now() + patience
        waits = self.blocking if blocking is None else blocking
        while not super().acquire(blocking=False, token=token):
            if not waits or (end is not None and clock.now() + pause > end):
                return False
            _pause(pause)
        return True

    @override
    def release(self) -> None:
        """As redis-py's, also in a cancelled thread, which has 30 seconds for it: others wait for the lock."""
        if current_token() is tokens.NEVER:
            super().release()
            return
        with shield():
            super().release()


_pause = sleep  # where an argument of redis-py's has the name
