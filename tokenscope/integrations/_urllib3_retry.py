"""Retries whose pauses a cancel ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from urllib3.util import Retry

from tokenscope._core.current import sleep

__all__ = ["CancellableRetry", "cancellable"]

if TYPE_CHECKING:
    _Base = Retry
else:
    _Base = object


class _CancellableSleep(_Base):
    """Sleeps under the current token, both for ``Retry-After`` and between attempts."""

    def sleep(self, response: Any = None) -> None:
        """Wait as the server or the backoff says, or raise `Cancelled`."""
        if self.respect_retry_after_header and response and self.sleep_for_retry(response):
            return
        _pause(self.get_backoff_time())

    def sleep_for_retry(self, response: Any = None) -> bool:
        """Wait as ``Retry-After`` says, or raise `Cancelled`; False if the server said nothing."""
        seconds = self.get_retry_after(response)
        if not seconds:
            return False
        _pause(seconds)
        return True


class CancellableRetry(_CancellableSleep, Retry):
    """`urllib3.util.Retry` whose pauses a cancel ends. In a guarded pool a plain one becomes this."""


# By class of the user's; None where it sleeps in a way of its own, which is respected.
_twins: dict[type[Retry], type[Retry] | None] = {Retry: CancellableRetry, CancellableRetry: None}


def cancellable(retries: Retry) -> Retry:
    """The same policy with cancellable pauses; itself if it never pauses or has its own way to."""
    if not retries.total and retries.total is not None:
        return retries  # 0 or False, as requests' default: no attempt after the first
    kind = type(retries)
    if kind not in _twins:
        _twins[kind] = _twin(kind)
    twin = _twins[kind]
    if twin is None:
        return retries
    copied = twin.__new__(twin)
    vars(copied).update(vars(retries))
    return copied


def _twin(kind: type[Retry]) -> type[Retry] | None:
    if kind.sleep is not Retry.sleep or kind.sleep_for_retry is not Retry.sleep_for_retry:
        return None
    return type(f"Cancellable{kind.__name__}", (_CancellableSleep, kind), {})


def _pause(seconds: float) -> None:
    if seconds > 0:
        sleep(seconds)
