"""What newer Pythons type better, without loading anything third-party at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from typing_extensions import override
else:
    _F = TypeVar("_F")

    def override(method: _F) -> _F:
        """Say that a method overrides one; only type checkers listen."""
        return method


__all__ = ["override"]
