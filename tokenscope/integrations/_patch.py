r"""Attributes of other people's classes and modules, replaced for a while and given back exactly.

Others replace the same attributes, before us and after us, and put back what they found whenever they like. So each
replacement is a *layer* that remembers what it was put around, and asks `Patches.on` at every call: a layer that cannot
be taken away, because somebody else's lies on top of it, is switched off where it is.

States of a patch::

    absent --turn_on--> in place --turn_off--> absent
                            \--turn_off, with a stranger's layer on top--> buried and off
                                   buried --turn_off, the stranger gone--> absent

Invariants
    1. An attribute is set only if it holds one of our layers, or to add one: what a stranger put there stays.
    2. `on` is True exactly while somebody holds the patches. It is set last and cleared first, and read without the
       lock.

Lock order: one lock for all patches, a leaf; replacements do not take it, and events are emitted outside of it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenscope._core import _primitives, events

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Patch", "Patches", "bound"]

_room = _primitives.Room()


class _Layer(NamedTuple):
    replacement: Any
    around: Any  # as it stood in the class or module: perhaps a function, perhaps somebody's mock


class Patch:
    """One attribute. ``wrap(around)`` makes the replacement; it must call ``around`` unless `Patches.on`."""

    def __init__(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._name = name
        self._wrap = wrap
        # Changed under the lock.
        self._layers: list[_Layer] = []  # of this round, oldest first
        self._buried: list[_Layer] = []  # of earlier rounds: told as refused, and perhaps uncovered one day

    @property
    def attribute(self) -> str:
        """For people: ``urllib3.poolmanager.PoolManager.clear``."""
        module = getattr(self._owner, "__module__", None)
        where = f"{module}.{self._owner.__qualname__}" if module else self._owner.__name__
        return f"{where}.{self._name}"

    def apply_locked(self) -> None:
        """Put a layer on top, unless the top is ours."""
        top = self._top()
        if top is None:
            around = self._here()
            top = _Layer(functools.update_wrapper(self._wrap(around), around, updated=()), around)
            setattr(self._owner, self._name, top.replacement)
        if top not in self._layers:
            self._layers.append(top)

    def restore_locked(self) -> str | None:
        """Take our layers away; None, or what lies on top of one that was put there in this round."""
        bottom = self._layers[0].around if self._layers else None
        while (top := self._top()) is not None:
            setattr(self._owner, self._name, top.around)
            _primitives.discard(self._layers, top)
            _primitives.discard(self._buried, top)
        here = self._here()
        if self._layers and here is bottom:  # somebody gave the original back for us
            self._layers.clear()
        refused = bool(self._layers)
        self._buried += self._layers
        self._layers.clear()
        return repr(here) if refused else None

    def _here(self) -> Any:
        return vars(self._owner)[self._name]

    def _top(self) -> _Layer | None:
        here = self._here()
        return next((layer for layer in (*self._layers, *self._buried) if layer.replacement is here), None)


class Patches:
    """Patches that belong together, in place while anybody holds them. Thread-safe.

    Args:
        patches: They are applied in this order.
        on_off: Called after they were taken away.
    """

    def __init__(self, *patches: Patch, on_off: Callable[[], object] = lambda: None) -> None:
        self.on = False
        self._patches = patches
        self._on_off = on_off
        self._holders: set[str] = set()  # changed under the lock

    def turn_on(self, holder: str) -> bool:
        """Put them in place for ``holder``; False if it held them already (then what was removed is put back)."""
        with _room.enter(): return self._turn_on_locked(holder)  # fmt: skip

    def _turn_on_locked(self, holder: str) -> bool:
        for patch in self._patches:
            patch.apply_locked()
        new = holder not in self._holders
        self._holders.add(holder)
        self.on = True
        return new

    def turn_off(self, holder: str) -> tuple[bool, dict[str, str]]:
        """Take them away if ``holder`` is the last.

        Returns:
            Whether it held them; and attributes that could not be restored, with what is there instead. Each of these
            is emitted as `RestoreRefused`, once.
        """
        with _room.enter(): held, refused = self._turn_off_locked(holder)  # fmt: skip
        if not self.on:
            self._on_off()
        for attribute, found in refused.items():
            events.emit(events.RestoreRefused(attribute, found))
        return held, refused

    def _turn_off_locked(self, holder: str) -> tuple[bool, dict[str, str]]:
        held = holder in self._holders
        self._holders.discard(holder)
        if self._holders:
            return held, {}
        self.on = False
        found = {patch.attribute: patch.restore_locked() for patch in reversed(self._patches)}
        return held, {attribute: there for attribute, there in found.items() if there is not None}


def bound(around: Any, instance: object) -> Callable[..., Any]:
    """What ``instance.method`` would be: a function is bound to the instance, a mock in its place is not."""
    bind = getattr(type(around), "__get__", None)
    method: Callable[..., Any] = around if bind is None else bind(around, instance, type(instance))
    return method
