"""Peers are optional: what is not installed is said in its row."""

from __future__ import annotations

import importlib
from typing import Any


class Peers:
    """Some libraries by name; None for one that is not installed, and a word about it in ``missing``."""

    def __init__(self, **labels: str) -> None:
        """Take library -> the name that it has in the table."""
        self.missing: dict[str, str] = {}
        self._found = {library: self._load(library, label) for library, label in labels.items()}

    def _load(self, library: str, label: str) -> Any:
        try:
            return importlib.import_module(library)
        except ImportError:
            self.missing[label] = f"{library} is not installed (pip install {library})"
            return None

    def __getattr__(self, library: str) -> Any:
        return self._found[library]
