"""What of urllib3 the guards hook into, checked before anything is built on it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from tokenscope._core.errors import TokenScopeError
from tokenscope.integrations._missing import needs

with needs("urllib3"):
    import urllib3
    from urllib3 import connection, connectionpool, poolmanager
    from urllib3._collections import RecentlyUsedContainer
    from urllib3.util import Retry, ssl_
    from urllib3.util import connection as util_connection

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_hooks", "refuse_http2"]

VERSION: str = getattr(urllib3, "__version__", "of unknown version")

#: Everything used and not promised by urllib3's documentation. 1.26.0 to 2.8.0 have it.
HOOKS: dict[Any, tuple[str, ...]] = {
    connection.HTTPConnection: ("_new_conn", "connect", "close"),
    connection.HTTPSConnection: ("_new_conn", "connect", "close"),
    connectionpool.HTTPConnectionPool: ("ConnectionCls", "QueueCls", "_get_conn", "_put_conn", "urlopen"),
    connectionpool.HTTPSConnectionPool: ("ConnectionCls", "QueueCls", "_get_conn", "_put_conn", "urlopen"),
    poolmanager: ("pool_classes_by_scheme",),
    poolmanager.PoolManager: ("connection_from_pool_key", "clear"),
    RecentlyUsedContainer: ("clear",),
    Retry: ("sleep", "sleep_for_retry", "get_backoff_time", "get_retry_after", "from_int"),
    util_connection: ("allowed_gai_family",),
}


def check_hooks() -> None:
    """Refuse a urllib3 that is not what it seems.

    Raises:
        ImportError: A fork in urllib3's place, or a version without the hooks.
        TokenScopeError: urllib3's HTTP/2 mode is on.
    """
    if importlib.util.find_spec("urllib3.backend") is not None:
        raise ImportError(
            f"the package installed as urllib3 ({VERSION}) is urllib3-future, whose connections tokenscope"
            " cannot guard. Uninstall urllib3-future (niquests brings it) and reinstall urllib3>=1.26,<3"
        )
    missing = list(_missing_hooks())
    if missing:
        raise ImportError(f"urllib3 {VERSION} is not supported: it has no {', '.join(missing)}; use urllib3>=1.26,<3")
    refuse_http2()


def _missing_hooks() -> Iterator[str]:
    for owner, names in HOOKS.items():
        for name in names:
            if not hasattr(owner, name):
                yield f"{getattr(owner, '__name__', owner)}.{name}"


def refuse_http2() -> None:
    """Refuse urllib3's opt-in HTTP/2 mode: it swaps the connection classes, and one socket serves many calls.

    Raises:
        TokenScopeError: `urllib3.http2.inject_into_urllib3` was called.
    """
    if "h2" in getattr(ssl_, "ALPN_PROTOCOLS", ()):
        raise TokenScopeError(
            "urllib3's HTTP/2 mode is on, in which one cancel would end the calls of others: call"
            " urllib3.http2.extract_from_urllib3() before using tokenscope's integrations"
        )
