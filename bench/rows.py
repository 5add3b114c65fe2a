"""All rows, in the order of the table."""

from __future__ import annotations

from bench import scopes, servers, tokens, upstreams

ROWS = (*tokens.ROWS, *scopes.ROWS, *upstreams.ROWS, *servers.ROWS, *upstreams.LEAKS, *servers.LEAKS)
