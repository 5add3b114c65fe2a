"""All rows, in the order of the table."""

from __future__ import annotations

from bench import scopes, tokens

ROWS = (*tokens.ROWS, *scopes.ROWS)
