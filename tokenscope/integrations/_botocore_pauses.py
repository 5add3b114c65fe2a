"""The pauses of a botocore client between two attempts, as waits on the current token.

There are three: the endpoint sleeps for as long as the retry handlers say; the handler of the standard mode sleeps by
itself where a long poll has used up its retries; and the adaptive mode holds requests back on a condition.
"""

from __future__ import annotations

from typing import Any

from botocore.retries.bucket import TokenBucket
from botocore.retries.standard import RetryHandler

from tokenscope._core.current import sleep
from tokenscope.sync import Condition

__all__ = ["make_pauses_cancellable"]


def make_pauses_cancellable(client: Any) -> None:
    """Have all three wait on the current token. Idempotent."""
    endpoint = client._endpoint  # noqa: SLF001 - one of the hooks
    if not isinstance(endpoint._event_emitter, _PausingEmitter):  # noqa: SLF001
        endpoint._event_emitter = _PausingEmitter(endpoint._event_emitter)  # noqa: SLF001
    service = client.meta.service_model.service_id.hyphenize()
    for owner in _handlers(client, f"needs-retry.{service}.*", f"before-send.{service}.*"):
        if isinstance(owner, RetryHandler) and hasattr(owner, "_sleep"):
            owner._sleep = sleep  # noqa: SLF001 - an argument of its constructor
        bucket = getattr(owner, "_token_bucket", None)
        if isinstance(bucket, TokenBucket) and not isinstance(bucket._new_fill_rate_condition, Condition):  # noqa: SLF001
            bucket._new_fill_rate_condition = Condition()  # noqa: SLF001


class _PausingEmitter:
    """An endpoint's event emitter that makes the pause itself, and then asks the endpoint for none."""

    def __init__(self, emitter: Any) -> None:
        self._emitter = emitter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._emitter, name)

    def emit(self, event_name: str, **kwargs: Any) -> Any:
        responses = self._emitter.emit(event_name, **kwargs)
        if not event_name.startswith("needs-retry."):
            return responses
        for handler, delay in responses:
            if delay is not None:  # the first that has something to say decides, as in botocore
                if delay is False:
                    return responses
                sleep(delay)
                return [(handler, 0)]
        return responses


def _handlers(client: Any, *events: str) -> list[Any]:
    """The objects whose methods were registered for these events. There is no public way to list them."""
    trie = client.meta.events._emitter._handlers  # noqa: SLF001
    handlers = [handler for event in events for handler in trie.prefix_search(event)]
    return [owner for handler in handlers if (owner := getattr(handler, "__self__", None)) is not None]
