"""All rows, in the order of the table."""

from __future__ import annotations

from bench import cancels, scopes, servers, tokens, upstreams

ROWS = (*tokens.ROWS, *scopes.ROWS, *cancels.ROWS, *upstreams.ROWS, *servers.ROWS, *upstreams.LEAKS, *servers.LEAKS)
