"""What to say when the library that an integration is for is not there."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["needs"]


@contextlib.contextmanager
def needs(library: str, *, extra: str | None = None) -> Iterator[None]:
    """Import a third-party library inside of this, so that its absence says what to install.

    Args:
        library: Its top-level module.
        extra: The extra of tokenscope that brings it; without one, it is a plain dependency.

    Raises:
        ImportError: The library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:
            raise
        what = f"tokenscope-threads[{extra}]" if extra else library
        raise ImportError(
            f"this part of tokenscope needs {library}, which is not installed: pip install '{what}'",
            name=library,
        ) from error
