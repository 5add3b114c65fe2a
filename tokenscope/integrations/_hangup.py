"""The client of one request, watched: a hang-up cancels the request's token, if the request is armed.

Armed or not is known late (a decorator on the view, the first byte of a stream), a hang-up comes when it
likes. So both sides write down their half first and then look at the other's: whoever comes second cancels.
Cancelling twice is cancelling once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenscope._core import events
from tokenscope._core.reasons import CancelKind
from tokenscope._core.token import CancellationToken, cancel_from_library
from tokenscope.watch import CannotWatch, Connection, HalfClose, NotASocket, Watch, find_connection, watch

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Hangup"]

#: What was told once, so that it is not told again. Bounded: endpoints may be as many as there are paths.
_told_endpoints: set[str] = set()
_told_servers: set[str] = set()
_MOST_TOLD = 1000


_NO_MORE = "no more of them are named by this process; the remedy is the same"


class Hangup:
    """See the module's head."""

    __slots__ = ("_gone", "_token", "_watch", "armed")

    def __init__(self, token: CancellationToken) -> None:
        self._token = token
        self._watch: Watch | None = None
        self.armed = False  # becomes True on the request's thread
        self._gone = False  # becomes True on the watcher's thread

    def begin(self, environ: Mapping[str, Any], half_close: HalfClose) -> None:
        """Watch the client of this request; where the server hides its socket, say so once."""
        try:
            self._watch = watch(_connection(environ), self._on_gone, half_close=half_close)
        except (CannotWatch, NotASocket) as why:
            server = str(environ.get("SERVER_SOFTWARE") or "an unnamed server")
            if _first_time(_told_servers, f"{server}: {why}"):
                events.emit(events.WatchUnsupported(server, str(why)))

    def arm(self) -> None:
        """From now on a hang-up, also one that has been, cancels."""
        self.armed = True
        if self._gone:
            self._cancel()

    def look(self) -> None:
        """Do not wait to be told: a client that left while its request was queued is not served at all."""
        if self.armed and self._watch is not None:
            self._watch.look()

    def end(self) -> None:
        """Stop watching and give the descriptor back. Idempotent."""
        if self._watch is not None:
            self._watch.close()

    def complain(self, endpoint: str, remedy: str) -> None:
        """If a hang-up was seen and nobody acted on it, say so once for this endpoint, with the remedy."""
        if self._gone and not self.armed and _first_time(_told_endpoints, endpoint):
            events.emit(events.HangupIgnored(endpoint, remedy))
            if len(_told_endpoints) == _MOST_TOLD:
                events.emit(events.HangupIgnored(f"any endpoint after these {_MOST_TOLD}", _NO_MORE))

    def _on_gone(self) -> None:
        self._gone = True
        if self.armed:
            self._cancel()

    def _cancel(self) -> None:
        cancel_from_library(self._token, "the client has gone", kind=CancelKind.CLIENT_DISCONNECTED)


def _connection(environ: Mapping[str, Any]) -> Connection:
    found = find_connection(environ)
    if found is None:
        raise CannotWatch("this server does not show the client's socket")
    return found


def _first_time(told: set[str], what: str) -> bool:
    if what in told or len(told) >= _MOST_TOLD:
        return False
    told.add(what)
    return True
