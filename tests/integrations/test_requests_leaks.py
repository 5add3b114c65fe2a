"""The leak run: cancels at random moments of random requests, with innocent threads on the same session."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import pytest
from peers import Attempt, Peer
from peers import scripts as play

from tokenscope import CancellationToken, Cancelled, use_token
from tokenscope.integrations.requests import Session

if TYPE_CHECKING:
    import requests

CANCELS = 2_000  # requests that are cancelled, spread over ...
WORKERS = 8
INNOCENTS = 3
# A cancel comes so late at most: also in connect, handshake (which loads certificates first), between two
# phases and after the end.
LATEST_MS = {"tcp": 12, "tls": 50}

BODY = b"x" * 3000
PATHS = {
    "/ok": play.answers(BODY),
    "/headers": play.hangs_before_headers,
    "/half": play.hangs_in_headers,
    "/length": play.hangs_in_body("content-length"),
    "/chunked": play.hangs_in_body("chunked"),
    "/close": play.hangs_in_body("until-close"),
    "/drip": play.drips,
}
ENDLESS = set(PATHS) - {"/ok"}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_random_cancels_harm_no_innocent_and_leak_nothing(certificates, transport):
    """No third outcome, no wrong answer, no harm to others; the leak fixture finds nothing left."""
    tls = certificates if transport == "tls" else None
    with Peer(play.by_path(PATHS, play.answers(BODY)), tls=tls) as peer, Session() as session:
        session.trust_env = False
        session.verify = tls.ca_file if tls else True
        session.mount("https://", type(session.adapters["https://"])(pool_maxsize=20))
        session.mount("http://", type(session.adapters["http://"])(pool_maxsize=20))
        stop = threading.Event()
        innocents = [Attempt(lambda: ask_until(stop, session, peer)) for _ in range(INNOCENTS)]
        workers = [
            Attempt(lambda seed=seed: many_cancels(seed, session, peer, LATEST_MS[transport]))
            for seed in range(WORKERS)
        ]
        try:
            outcomes = [outcome for worker in workers for outcome in worker.value(150)]
        finally:
            stop.set()
        assert all(innocent.value(10) > 0 for innocent in innocents)
        assert len(outcomes) == CANCELS // WORKERS * WORKERS
        assert set(outcomes) <= {"cancelled", "answered"}
        assert outcomes.count("cancelled") > CANCELS // 2


def ask_until(stop: threading.Event, session: requests.Session, peer: Peer) -> int:
    """Ask again and again; every answer must be whole."""
    asked = 0
    while not stop.is_set():
        assert session.get(peer.url("/ok")).content == BODY
        asked += 1
    return asked


def many_cancels(seed: int, session: requests.Session, peer: Peer, latest_ms: int) -> list[str]:
    """Do one thread's share."""
    dice = random.Random(seed)
    return [one_cancel(dice, session, peer, latest_ms) for _ in range(CANCELS // WORKERS)]


def one_cancel(dice: random.Random, session: requests.Session, peer: Peer, latest_ms: int) -> str:
    """Ask for a random path and cancel at a random moment."""
    token = CancellationToken()
    path = dice.choice(list(PATHS))
    timer = threading.Timer(dice.random() * latest_ms / 1000, token.cancel, ["random"])
    timer.start()
    try:
        with use_token(token):
            body = session.get(peer.url(path)).content
    except Cancelled as error:
        return "cancelled" if error.reason is token.reason else "cancelled for another reason"
    finally:
        timer.cancel()
        timer.join()
    assert path not in ENDLESS
    assert body == BODY
    return "answered"
