"""Every `urllib3.PoolManager` of the process, present and future, cancellable under a current token.

A manager keeps the pools that it has. Beside them it gets guarded ones, from which a request is served whose thread has
a current token. So outside of any scope nothing at all changes, a request that is under way keeps the pool that it has,
and a connection that was made outside is never used inside, where a cancel could not reach it.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import urllib3
from urllib3._collections import RecentlyUsedContainer

from tokenscope._core import _primitives, events
from tokenscope._core.current import current_token
from tokenscope._core.errors import TokenScopeError
from tokenscope._core.token import NEVER
from tokenscope.integrations._patch import Patch, Patches, bound
from tokenscope.integrations._urllib3_pool import guarded_classes, is_guarded

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PATCHES"]

Pools = RecentlyUsedContainer[Any, Any]

_room = _primitives.Room()
_beside: weakref.WeakKeyDictionary[urllib3.PoolManager, Pools] = weakref.WeakKeyDictionary()  # changed under the lock
_left_alone: set[tuple[str, str]] = set()  # kinds of managers that cannot be guarded, and why; told once each


def _connection_from_pool_key(around: Any) -> Callable[..., Any]:
    def connection_from_pool_key(manager: urllib3.PoolManager, *args: Any, **kwargs: Any) -> Any:
        if not PATCHES.on or current_token() is NEVER or is_guarded(manager):
            return bound(around, manager)(*args, **kwargs)
        return bound(around, _guarded_view(manager))(*args, **kwargs)

    return connection_from_pool_key


def _clear(around: Any) -> Callable[..., Any]:
    def clear(manager: urllib3.PoolManager) -> None:
        bound(around, manager)()
        with _room.enter(): pools = _beside.pop(manager, None)  # fmt: skip
        if pools is not None:
            pools.clear()

    return clear


def _guarded_view(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    """The manager as it is now, but with the pools beside its own; itself if it connects in a way of its own."""
    try:
        classes = guarded_classes(manager)
    except TokenScopeError as why:
        _tell_once(type(manager).__name__, str(why))
        return manager
    kind = type(manager)
    view = kind.__new__(kind)
    vars(view).update(vars(manager))
    view.pool_classes_by_scheme = classes
    with _room.enter(): view.pools = _pools_beside_locked(manager)  # fmt: skip
    return view


def _pools_beside_locked(manager: urllib3.PoolManager) -> Pools:
    if manager not in _beside:
        own = manager.pools
        _beside[manager] = RecentlyUsedContainer(own._maxsize, own.dispose_func)  # noqa: SLF001 - one of the hooks
    return _beside[manager]


def _tell_once(kind: str, why: str) -> None:
    if (kind, why) not in _left_alone:
        _left_alone.add((kind, why))
        events.emit(events.FallbackUsed(f"cancellable pools of urllib3's {kind}", why))


def _drop_all() -> None:
    """Close what is idle; responses that are open stay cancellable until they are closed."""
    with _room.enter(): dropped = _drop_locked()  # fmt: skip
    for pools in dropped:
        pools.clear()


def _drop_locked() -> list[Pools]:
    dropped = list(_beside.values())
    _beside.clear()
    return dropped


PATCHES = Patches(
    Patch(urllib3.PoolManager, "clear", _clear),
    Patch(urllib3.PoolManager, "connection_from_pool_key", _connection_from_pool_key),
    on_off=_drop_all,
)
