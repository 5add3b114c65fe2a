"""Cancellable boto3: `instrument(client)` makes the calls of one client end with the current token.

guarded:      name look-up, connect, proxy CONNECT, TLS handshake, upload, headers, body (`StreamingBody` and event
    streams too), the pauses between attempts in all three retry modes, boto3's transfers of files with their threads
interrupted:  as for urllib3, and the pauses wait on the token; a transfer's threads work under the token of its caller
not:          waiters' pauses, credentials from other clients, CRT transfers, a `TransferManager` of your own
versions:     botocore >=1.31,<2 (boto3 >=1.28,<2); its hooks are checked when this is imported
compat:       botocore-1.31.0, botocore-latest, tests/integrations/test_botocore.py
"""

from __future__ import annotations

import inspect
from typing import Any

from tokenscope._core.errors import TokenScopeError
from tokenscope.integrations._missing import needs
from tokenscope.integrations.urllib3 import guard_manager, is_guarded

with needs("botocore", extra="botocore"):
    import botocore
    from botocore.client import BaseClient
    from botocore.endpoint import Endpoint
    from botocore.httpsession import URLLib3Session


from tokenscope.integrations._botocore_pauses import make_pauses_cancellable
from tokenscope.integrations._botocore_transfers import make_transfers_cancellable

__all__ = ["instrument"]


def instrument(client: Any) -> Any:
    """Make the calls of a boto3 or botocore client end with the current token, and return that client.

    Other clients are not touched, nor those of a session that is used again. Outside any scope nothing changes.
    Idempotent. Not thread-safe: before the client is shared. Its idle connections are closed.

    On a cancel the blocked call raises `Cancelled` with the token's reason; no attempt follows, and the connection is
    closed. Whether the service has carried out a write that was cut is not known. ``upload_file``, ``download_file``,
    ``upload_fileobj``, ``download_fileobj`` and ``copy`` raise once all their threads have ended; of an upload in
    parts, what was uploaded is given up (the service is told so, for 30 seconds at most).

    Raises:
        TypeError: It is no such client, but a resource, a session or an asynchronous client for example.
        TokenScopeError: It sends its requests in a way of its own, or urllib3's HTTP/2 mode is on.
    """
    _check_client(client)
    session = client._endpoint.http_session  # noqa: SLF001 - one of the hooks
    if not isinstance(session, URLLib3Session):
        raise TokenScopeError(
            f"the client sends its requests with {session!r}, where a cancel could not reach them;"
            " only botocore's own URLLib3Session is supported"
        )
    _guard_session(session)
    make_pauses_cancellable(client)
    make_transfers_cancellable(client)
    return client


def _check_client(client: Any) -> None:
    if isinstance(client, BaseClient):
        if inspect.iscoroutinefunction(client._make_api_call):  # noqa: SLF001 - one of the hooks
            raise TypeError(
                f"client must not be asynchronous, as {client!r} is: cancel the asyncio task that awaits its call"
            )
        return
    if isinstance(getattr(getattr(client, "meta", None), "client", None), BaseClient):
        raise TypeError(f"client must be a client, not the resource {client!r}: instrument(resource.meta.client)")
    raise TypeError(f"client must be a boto3 or botocore client, as boto3.client('s3') makes one, not {client!r}")


def _guard_session(session: Any) -> None:
    for manager in (session._manager, *session._proxy_managers.values()):  # noqa: SLF001 - hooks
        if not is_guarded(manager):
            guard_manager(manager)
    # From here the managers of proxies that are yet to be used take theirs.
    session._pool_classes_by_scheme = session._manager.pool_classes_by_scheme  # noqa: SLF001 - hooks


def _check_hooks() -> None:
    """Refuse a botocore without what is used and not promised by its documentation.

    Raises:
        ImportError: Something is not there.
    """
    wanted: dict[Any, tuple[str, ...]] = {
        BaseClient: ("_make_api_call",),
        Endpoint: ("_needs_retry",),
        URLLib3Session(): ("_manager", "_proxy_managers", "_pool_classes_by_scheme"),
    }
    missing = [name for owner, names in wanted.items() for name in names if not hasattr(owner, name)]
    if missing:
        raise ImportError(
            f"botocore {botocore.__version__} is not supported: it has no {', '.join(missing)}; use botocore>=1.31,<2"
        )


_check_hooks()
