"""What holds for the SDKs of both vendors: the claims, and how each vendor spells a call."""

from __future__ import annotations

import importlib
import random
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from httpx_phases import PHASES, Bench
from peers import Attempt, blocked_in, wait_until
from peers.models import Model

from tokenscope import CancellationToken, Cancelled, TokenScopeError, use_token
from tokenscope.integrations._sdk import Vendor as Probed

if TYPE_CHECKING:
    from collections.abc import Callable

    from peers import Authority

WAIT = 10.0
ASK = {"model": "peer", "messages": [{"role": "user", "content": "?"}], "max_tokens": 9}


#: The phases of a call that is not streamed, each with a transport that it exists on.
CALL_PHASES = [
    (name, transport)
    for name, (_phase, transports) in PHASES.items()
    for transport in transports
    if not name.startswith(("stream-", "raw-", "sse-", "drip-", "upload-chunked"))
]

CANCELS = 480  # in the leak run, spread over ...
WORKERS = 8
LATEST_MS = 40  # a cancel comes so late at most


@dataclass(frozen=True)
class Vendor:
    """How one vendor's SDK is spelled."""

    sdk: Any
    client: type
    awaiting: type
    cancellable: Callable[[Any], Any]
    prefix: str  # of the base URL
    calls: Callable[[Any], Any]  # the resource that is asked
    text: Callable[[Any], str]  # of an answer
    word: Callable[[Any], str]  # of an event of a stream

    def plain(self, model: Model, **settings: Any) -> Any:
        return self.client(**{"base_url": model.url(self.prefix), "api_key": "key", **settings})

    def make(self, model: Model, **settings: Any) -> Any:
        return self.cancellable(self.plain(model, **settings))

    def ask(self, client: Any, **options: Any) -> str:
        return self.text(self.calls(client).create(**ASK, **options))

    def words(self, client: Any, **options: Any) -> list[str]:
        with self.calls(client).create(**ASK, stream=True, **options) as stream:
            return [word for event in stream if (word := self.word(event))]

    def bench(self, authority: Authority | None = None) -> SDKBench:
        """A bench on the fork of httpx that this SDK is made for."""
        fork = self.sdk.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]
        ours = importlib.import_module(f"tokenscope.integrations.{fork}")
        return SDKBench(importlib.import_module(fork), ours, authority, None, vendor=self)


@dataclass
class SDKBench(Bench):
    """A bench of httpx's phases whose calls are made through an SDK."""

    vendor: Any = None

    def http_client(self, **options: Any) -> Any:
        """A client of ours below an SDK."""
        return super().client(**options)

    def client(self, **options: Any) -> Any:
        http_client = self.http_client(**options)
        made = self.vendor.cancellable(self.vendor.client(api_key="key", http_client=http_client))
        return SDKCalls(self.exits.enter_context(made), http_client, self.library.Response)


@dataclass
class SDKCalls:
    """What the phases call, as the SDK's own calls with an address."""

    sdk_client: Any
    http_client: Any
    response: Any

    def get(self, url: str) -> Any:
        return self.sdk_client.get(url, cast_to=self.response)

    def request(self, method: str, url: str, **options: Any) -> Any:
        if method == "GET":
            return self.get(url)
        return self.sdk_client.post(url, cast_to=self.response, body={"content": options["content"].decode()})

    def stream(self, method: str, url: str) -> Any:
        return self.http_client.stream(method, url)


class SDKTests:
    """Collected once for each vendor; a subclass names it."""

    vendor: Vendor

    @pytest.fixture
    def model(self):
        with Model() as model:
            yield model

    def test_an_uncancelled_call_answers_as_before(self, model):
        """Plain and streamed, outside of any scope and inside of one."""
        with self.vendor.make(model) as client:
            assert self.vendor.ask(client) == "one two three"
            with use_token(CancellationToken()):
                assert self.vendor.words(client) == ["one", " two", " three"]

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_a_cancel_ends_a_stalled_call_and_no_retry_follows(self, model, stream):
        """One request reaches the model, it sees the client go, and it bills nothing more."""
        model.play("stall")
        token = CancellationToken()
        with self.vendor.make(model) as client:
            attempt = Attempt(lambda: (self.vendor.words if stream else self.vendor.ask)(client), token)
            assert model.reached.wait(WAIT)
            billed = model.billed
            token.cancel("the tab was closed")
            failure = attempt.failure()
            assert model.closed.wait(WAIT)
        assert isinstance(failure, Cancelled)
        assert failure.reason is token.reason
        assert model.requests == 1
        assert model.billed == billed == (3 if stream else 0)

    @pytest.mark.parametrize(("name", "transport"), CALL_PHASES)
    def test_a_cancel_ends_this_phase(self, certificates, name, transport):
        """As of httpx: the reason comes out, the transport's error is the cause, nothing is sent again."""
        token = CancellationToken()
        bench = self.vendor.bench(certificates if transport == "tls" else None)
        with bench.exits, PHASES[name][0](bench) as stage:
            attempt = Attempt(stage.call, token)
            stage.reached(attempt)
            token.cancel("the tab was closed")
            failure = attempt.failure()
            assert isinstance(failure, Cancelled)
            assert failure.reason is token.reason
            if stage.peer is not None:
                if stage.sees_close:
                    assert stage.peer.closed.wait(WAIT)
                assert stage.peer.requests == stage.requests

    @pytest.mark.timeout(120)
    @pytest.mark.parametrize("transport", ["tcp", "tls"])
    def test_random_cancels_harm_no_innocent_and_leak_nothing(self, certificates, transport):
        """No third outcome, no wrong answer, no harm to others; the leak fixture finds nothing left."""
        authority = certificates if transport == "tls" else None
        bench = self.vendor.bench(authority)
        with Model(tls=authority) as model, bench.exits:
            client = bench.exits.enter_context(self.vendor.make(model, http_client=bench.http_client()))
            stop = threading.Event()
            innocents = [Attempt(lambda: self._ask_until(stop, client)) for _ in range(3)]
            workers = [Attempt(lambda seed=seed: self._many_cancels(seed, client)) for seed in range(WORKERS)]
            try:
                outcomes = [outcome for worker in workers for outcome in worker.value(100)]
            finally:
                stop.set()
            assert all(innocent.value(WAIT) > 0 for innocent in innocents)
        assert len(outcomes) == CANCELS
        assert set(outcomes) <= {"cancelled", "answered"}
        assert outcomes.count("cancelled") > CANCELS // 2

    def _ask_until(self, stop: threading.Event, client: Any) -> int:
        asked = 0
        while not stop.is_set():
            assert self.vendor.ask(client) == "one two three"
            assert self.vendor.words(client) == ["one", " two", " three"]
            asked += 1
        return asked

    def _many_cancels(self, seed: int, client: Any) -> list[str]:
        dice = random.Random(seed)
        return [self._one_cancel(dice, client) for _ in range(CANCELS // WORKERS)]

    def _one_cancel(self, dice: random.Random, client: Any) -> str:
        """Ask in a random way, of a model in a random mood, and cancel at a random moment."""
        token = CancellationToken()
        play = dice.choice(["answer", "stall", "stall", "503 30", "drop"])
        ask = dice.choice([self.vendor.ask, self.vendor.words])
        timer = threading.Timer(dice.random() * LATEST_MS / 1000, token.cancel, ["random"])
        timer.start()
        try:
            with use_token(token):
                answer = ask(client, extra_headers={"X-Play": play})
        except Cancelled as error:
            return "cancelled" if error.reason is token.reason else "cancelled for another reason"
        finally:
            timer.cancel()
            timer.join()
        assert play == "answer"
        return "answered" if "".join(answer) == "one two three" else f"half answered: {answer}"

    @pytest.mark.parametrize("play", ["429 30", "503 30"])
    def test_a_cancel_wakes_the_pause_before_a_retry(self, model, play):
        """Whatever Retry-After says, the call ends at once, and the model is not asked again."""
        model.play(play)
        token = CancellationToken()
        with self.vendor.make(model) as client:
            attempt = Attempt(lambda: self.vendor.ask(client), token)
            wait_until(lambda: blocked_in(attempt.thread, "_pause"))
            token.cancel()
            assert isinstance(attempt.failure(), Cancelled)
        assert model.requests == 1

    def test_a_copy_pauses_on_the_token_as_well(self, model):
        """What `with_options` returns, and a copy of that, is as cancellable as the client."""
        model.play("429 30")
        token = CancellationToken()
        with self.vendor.make(model) as client:
            copied = client.with_options(max_retries=5).copy(timeout=50)
            attempt = Attempt(lambda: self.vendor.ask(copied), token)
            wait_until(lambda: blocked_in(attempt.thread, "_pause"))
            token.cancel()
            assert isinstance(attempt.failure(), Cancelled)
        assert model.requests == 1

    @pytest.mark.parametrize("play", ["429 0.01", "503 0.01", "drop"])
    def test_without_a_cancel_the_sdk_retries_as_before(self, model, play):
        """A refused or dropped request is sent again, by the SDK's own rules."""
        model.play(play)
        with self.vendor.make(model) as client, use_token(CancellationToken()):
            assert self.vendor.ask(client) == "one two three"
        assert model.requests == 2

    def test_retries_end_where_the_sdk_ends_them(self, model):
        """When no retry is left, its own error is raised."""
        model.play("429", "429")
        with self.vendor.make(model, max_retries=0) as client, pytest.raises(self.vendor.sdk.RateLimitError):
            self.vendor.ask(client)
        assert model.requests == 1

    def test_the_token_of_an_http_client_wakes_the_pause(self, model):
        """A client of ours is kept with its settings, and its own token counts as the current one does."""
        model.play("429 30")
        token = CancellationToken()
        fork = self.vendor.sdk.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]
        ours = importlib.import_module(f"tokenscope.integrations.{fork}").Client(token=token)
        with self.vendor.make(model, http_client=ours) as client:
            assert client._client is ours
            attempt = Attempt(lambda: self.vendor.ask(client))
            wait_until(lambda: blocked_in(attempt.thread, "_pause"))
            token.cancel()
            assert isinstance(attempt.failure(), Cancelled)
        assert model.requests == 1

    def test_a_deadline_cuts_the_pause(self, model):
        """A scope that runs out during Retry-After does not sit it out."""
        model.play("429 30")
        token = CancellationToken(timeout=0.3)
        with self.vendor.make(model) as client:
            attempt = Attempt(lambda: self.vendor.ask(client), token)
            failure = attempt.failure()
        assert isinstance(failure, Cancelled)
        assert failure.reason.kind == "deadline"

    def test_a_cancelled_token_sends_nothing(self, model):
        """Nobody pays for a question whose asker has gone."""
        token = CancellationToken()
        token.cancel()
        with self.vendor.make(model) as client:
            assert isinstance(Attempt(lambda: self.vendor.ask(client), token).failure(), Cancelled)
        assert model.requests == 0

    def test_the_client_keeps_class_and_settings(self, model):
        """Base URL, key, timeout, headers and retries come along."""
        settings = {"timeout": 12.5, "max_retries": 7, "default_headers": {"X-Mine": "yes"}}
        with self.vendor.make(model, **settings) as client:
            self.vendor.ask(client)
            assert type(client) is self.vendor.client
            assert (client.timeout, client.max_retries, client.api_key) == (12.5, 7, "key")
        assert model.headers[0]["x-mine"] == "yes"

    def test_raw_and_streaming_responses_work(self, model):
        """Both wrappers find the client behind them."""
        with self.vendor.make(model) as client:
            raw = self.vendor.calls(client).with_raw_response.create(**ASK)
            assert self.vendor.text(raw.parse()) == "one two three"
            with self.vendor.calls(client).with_streaming_response.create(**ASK) as response:
                assert self.vendor.text(response.parse()) == "one two three"

    def test_the_original_client_is_left_alone(self, model):
        """It still works, and closing the cancellable one does not close it."""
        with self.vendor.plain(model) as plain:
            with self.vendor.cancellable(plain) as client:
                assert self.vendor.ask(client) == "one two three"
            assert client.is_closed()
            assert self.vendor.ask(plain) == "one two three"
            assert "copy" not in vars(plain)

    def test_a_cancellable_client_can_be_made_cancellable_again(self, model):
        """It keeps its connections."""
        with self.vendor.make(model) as client:
            again = self.vendor.cancellable(client)
            assert self.vendor.ask(again) == "one two three"
            assert again._client is client._client

    def test_an_http_client_that_cannot_be_kept_is_refused(self, model):
        """Its settings cannot be read out, so the error says what to make instead."""
        http_client = self.vendor.sdk.DefaultHttpxClient(timeout=3)
        with http_client, self.vendor.plain(model, http_client=http_client) as plain:
            with pytest.raises(TokenScopeError, match=r"tokenscope\.integrations\.httpx2?\.Client"):
                self.vendor.cancellable(plain)

    def test_an_async_client_is_refused(self):
        """The error says how a call that is awaited is cancelled."""
        with pytest.raises(TypeError, match="asyncio task"):
            self.vendor.cancellable(self.vendor.awaiting(api_key="key"))

    def test_what_is_no_client_is_refused(self):
        """The error names the argument and the value."""
        with pytest.raises(TypeError, match=r"client must be .* not 'key'"):
            self.vendor.cancellable("key")

    def test_a_version_without_the_hooks_is_refused(self):
        """The error names the version and what is missing of it."""
        old = SimpleNamespace(__name__="vendor", __version__="0.1")
        with pytest.raises(TokenScopeError, match=r"vendor 0\.1 has no Client\._sleep_for_retry"):
            Probed.probed(old, "Client")
