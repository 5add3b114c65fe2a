"""Comparing what a program printed with what its page or its last comment promises."""

from __future__ import annotations

import re


def agrees(printed: str, promised: str) -> bool:
    """Tell whether an output is the promised one, `...` standing for anything within a line."""
    pattern = ".*".join(re.escape(part) for part in promised.strip().split("..."))
    return re.fullmatch(pattern, printed.strip()) is not None
