"""The leak run of boto3: cancels at random moments of random calls, with innocent threads on the same client."""

from __future__ import annotations

import random
import threading
from typing import Any

import boto3
import pytest
from botocore.config import Config
from peers import Attempt, Peer
from peers import scripts as play

from tokenscope import CancellationToken, Cancelled, use_token
from tokenscope.integrations.botocore import instrument

CANCELS = 800  # calls that are cancelled, spread over ...
WORKERS = 8
INNOCENTS = 3
LATEST_MS = 60  # a cancel comes so late at most: also while the call is signed, in connect and after the end

BODY = b"x" * 3000
PATHS = {
    "/b/ok": play.answers(BODY),
    "/b/headers": play.hangs_before_headers,
    "/b/half": play.hangs_in_headers,
    "/b/length": play.hangs_in_body("content-length"),
    "/b/chunked": play.hangs_in_body("chunked"),
    "/b/close": play.hangs_in_body("until-close"),
    "/b/drip": play.drips,
}


def get(client: Any, path: str) -> bytes:
    return client.get_object(Bucket="b", Key=path.removeprefix("/b/"))["Body"].read()


@pytest.mark.timeout(180)
def test_random_cancels_harm_no_innocent_and_leak_nothing():
    """No third outcome, no wrong answer, no harm to others; the leak fixture finds nothing left."""
    with Peer(play.by_path(PATHS, play.answers(BODY))) as peer:
        client = instrument(
            boto3.session.Session().client(
                "s3",
                endpoint_url=peer.url(""),
                region_name="us-east-1",
                aws_access_key_id="id",
                aws_secret_access_key="secret",
                config=Config(s3={"addressing_style": "path"}, max_pool_connections=20),
            )
        )
        stop = threading.Event()
        innocents = [Attempt(lambda: ask_until(stop, client)) for _ in range(INNOCENTS)]
        workers = [Attempt(lambda seed=seed: many_cancels(seed, client)) for seed in range(WORKERS)]
        try:
            outcomes = [outcome for worker in workers for outcome in worker.value(150)]
        finally:
            stop.set()
        assert all(innocent.value(10) > 0 for innocent in innocents)
        client.close()
    assert len(outcomes) == CANCELS
    assert set(outcomes) <= {"cancelled", "answered"}
    assert outcomes.count("cancelled") > CANCELS // 2


def ask_until(stop: threading.Event, client: Any) -> int:
    """Ask again and again; every answer must be whole."""
    asked = 0
    while not stop.is_set():
        assert get(client, "/b/ok") == BODY
        asked += 1
    return asked


def many_cancels(seed: int, client: Any) -> list[str]:
    """Do one thread's share."""
    dice = random.Random(seed)
    return [one_cancel(dice, client) for _ in range(CANCELS // WORKERS)]


def one_cancel(dice: random.Random, client: Any) -> str:
    """Ask for a random path and cancel at a random moment."""
    token = CancellationToken()
    path = dice.choice(list(PATHS))
    timer = threading.Timer(dice.random() * LATEST_MS / 1000, token.cancel, ["random"])
    timer.start()
    try:
        with use_token(token):
            body = get(client, path)
    except Cancelled as error:
        return "cancelled" if error.reason is token.reason else "cancelled for another reason"
    finally:
        timer.cancel()
        timer.join()
    assert path == "/b/ok"
    assert body == BODY
    return "answered"
