"""Real servers that hang on cue, for tests of what a cancel does to a client that is blocked on them.

A `Peer` listens on a loopback port and plays a *script* for each request, on a thread for each connection::

    with Peer(hangs_before_headers) as peer:
        attempt = Attempt(lambda: session.get(peer.url()), token)
        peer.reached.wait(5)    # the client has sent its request and now waits for the answer
        token.cancel("stop")
        attempt.failure(5)      # the Cancelled
        peer.closed.wait(5)     # the server saw the client hang up
        assert peer.requests == 1

With ``tls=authority()`` the same script is played behind a TLS handshake. A script is a function that takes
an `Exchange`; the ones in `scripts` cover every phase of an HTTP exchange, and a test may write its own in
three lines.
"""

from peers.attempts import Attempt, blocked_in, wait_until
from peers.backlog import FullBacklog
from peers.certs import Authority, authority
from peers.server import Exchange, Gone, Peer, Request, Script

__all__ = [
    "Attempt",
    "Authority",
    "Exchange",
    "FullBacklog",
    "Gone",
    "Peer",
    "Request",
    "Script",
    "authority",
    "blocked_in",
    "wait_until",
]
