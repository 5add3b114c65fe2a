"""What the clients of OpenAI and Anthropic have in common: they send, pause between attempts and copy alike.

A client is made cancellable in two places, on a copy made by its own ``copy``:

1. its ``http_client`` is one of ours, so that each request ends with the token;
2. its pause before a retry waits on the token. There is no public way to it (docs/decisions/0009). Set on the
   *instance*, as is ``copy``, which hands it on: of a subclass, anthropic would not let the copies keep their
   credentials.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tokenscope._core.current import current_token
from tokenscope._core.errors import TokenScopeError
from tokenscope.integrations._binding import under

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["Vendor"]

C = TypeVar("C")

#: What is called or replaced of a client, and the parameters that are counted on.
_HOOKS = {
    "_sleep_for_retry": {"retries_taken", "max_retries", "options", "response"},
    "_calculate_retry_timeout": {"remaining_retries", "options", "response_headers"},
    "copy": {"http_client"},
    "with_options": {"http_client"},
}


class Vendor(NamedTuple):
    """A vendor's package, and its clients: the one that blocks, and the one that awaits."""

    sdk: Any
    blocking: type
    awaiting: type

    @classmethod
    def probed(cls, sdk: ModuleType, blocking: str) -> Vendor:
        """The vendor, once it is sure that all is there that is used of its package.

        Raises:
            TokenScopeError: Something is missing: a version that is not supported.
        """
        found = getattr(sdk, blocking, None)
        for method, parameters in _HOOKS.items():
            hook = getattr(found, method, None)
            if hook is None or not parameters <= inspect.signature(hook).parameters.keys():
                raise TokenScopeError(
                    f"{sdk.__name__} {sdk.__version__} has no {blocking}.{method} that takes "
                    f"{', '.join(sorted(parameters))}: tokenscope does not support it"
                )
        return cls(sdk, getattr(sdk, blocking), getattr(sdk, f"Async{blocking}"))

    def cancellable(self, client: C) -> C:
        """See `tokenscope.integrations.openai.cancellable`."""
        self._check(client)
        any_client: Any = client
        copied: C = any_client.copy(http_client=self._guarded(any_client))
        return _adopt(copied)

    def _check(self, client: object) -> None:
        name = f"{self.sdk.__name__}.{self.blocking.__name__}"
        if isinstance(client, self.awaiting):
            raise TypeError(
                f"client must be a {name}, not {type(client).__name__}: a call that is awaited is cancelled "
                "by cancelling its asyncio task"
            )
        if not isinstance(client, self.blocking):
            raise TypeError(f"client must be a {name}, not {client!r}")

    def _guarded(self, client: Any) -> Any:
        """An HTTP client of ours that does what the client's does.

        Raises:
            TokenScopeError: It is one that the user made, whose settings cannot be read out of it.
        """
        theirs = client._client  # noqa: SLF001 - the public `http_client=` cannot be read back
        ours = importlib.import_module(f"tokenscope.integrations.{_fork(theirs)}")
        if isinstance(theirs, ours.Client):
            return theirs
        if type(theirs).__name__ != "SyncHttpxClientWrapper":  # what both SDKs make for themselves
            raise TokenScopeError(
                f"client has an http_client of its own, a {type(theirs).__name__}, whose settings cannot be read out "
                f"of it: make that one a {ours.__name__}.Client, with the same arguments"
            )
        return ours.Client(
            timeout=client.timeout,
            limits=self.sdk.DEFAULT_CONNECTION_LIMITS,
            follow_redirects=True,
        )


def _fork(http_client: object) -> str:
    """Which of httpx and httpx2 a client is from."""
    roots = [kind.__module__.partition(".")[0] for kind in type(http_client).__mro__]
    return next(root for root in roots if root in {"httpx", "httpx2"})


def _adopt(client: C) -> C:
    """Let a client pause on the token, and so the copies of it."""
    any_client: Any = client
    any_client._sleep_for_retry = functools.partial(_pause, client)  # noqa: SLF001 - probed
    any_client.copy = _adopting(any_client.copy)
    any_client.with_options = _adopting(any_client.with_options)
    return client


def _adopting(copy: Callable[..., C]) -> Callable[..., C]:
    @functools.wraps(copy)
    def copied(*args: Any, **kwargs: Any) -> C:
        return _adopt(copy(*args, **kwargs))

    return copied


def _pause(client: Any, *, retries_taken: int, max_retries: int, options: Any, response: Any) -> None:
    """Wait as long as the client would, or raise what the token says."""
    headers = None if response is None else response.headers
    seconds = client._calculate_retry_timeout(max_retries - retries_taken, options, headers)  # noqa: SLF001 - probed
    with under(getattr(client._client, "_token", None)):  # noqa: SLF001 - the `token=` of a client of ours
        current_token().sleep(seconds)
