"""A cancel ends a request in every phase, and nothing that was cut looks like success or is sent again."""

from __future__ import annotations

import pytest
from peers import Attempt
from phases import PHASES, Bench

from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    fail_after,
    instrument,
    uninstrument,
    use_token,
)

MATRIX = [
    pytest.param(name, transport, timeout, id=f"{name}-{transport}-{timeout}")
    for name, (_phase, transports) in PHASES.items()
    for transport in transports
    for timeout in (None, 30)
]
DEADLINE_MATRIX = [
    pytest.param(name, transport, id=f"{name}-{transport}")
    for name, (_phase, transports) in PHASES.items()
    for transport in transports
    if not name.startswith(("raw-", "stream-"))
]

# Where the cancel makes the transport raise, so that there is an error to chain (docs/decisions/0007).
WITH_CAUSE = {"pool-slot", "connect", "handshake", "proxy-connect"}
# Where it is a matter of moments whether the thread is inside of a write or before its next one.
EITHER = {"upload", "upload-chunked", "proxy-half-answer"}
# Where no socket is waited for, so that TLS makes no difference.
WITHOUT_SOCKET = {"name-lookup", "retry-backoff", "retry-after"}


def assert_cause(failure: Cancelled, name: str, transport: str) -> None:
    """The cause is an error of the transport in the phases that have one, and nothing in the others."""
    cause = failure.__cause__
    if name in WITH_CAUSE:
        assert isinstance(cause, Exception)
    elif name in EITHER or (transport == "tls" and name not in WITHOUT_SOCKET):
        assert cause is None or isinstance(cause, Exception)  # `Cancelled` is none
    else:
        assert cause is None


@pytest.fixture
def make_bench(certificates):
    """Return a maker of benches, each closed with all its peers when the test ends."""
    benches: list[Bench] = []

    def make(transport: str, timeout: float | None, *, plain: bool = False) -> Bench:
        benches.append(Bench(certificates if transport == "tls" else None, timeout, plain))
        return benches[-1]

    yield make
    for bench in benches:
        bench.exits.close()


def cancel_in_phase(bench: Bench, name: str, transport: str) -> None:
    with PHASES[name][0](bench) as stage:
        token = CancellationToken()
        attempt = Attempt(stage.call, token)
        stage.reached(attempt)
        assert token.cancel("the user left", tag="tab-closed")
        failure = attempt.failure()
        assert isinstance(failure, Cancelled)
        assert failure.reason is token.reason
        assert_cause(failure, name, transport)
        if stage.peer is not None:
            assert not stage.sees_close or stage.peer.closed.wait(5)
            assert stage.peer.requests == stage.requests


@pytest.mark.parametrize(("name", "transport", "timeout"), MATRIX)
def test_cancel_in_this_phase_raises_closes_and_never_resends(make_bench, name, transport, timeout):
    """In each phase: Cancelled with the reason, the server sees the close, and no request is sent twice."""
    cancel_in_phase(make_bench(transport, timeout), name, transport)


@pytest.mark.parametrize(("name", "transport"), [case.values[:2] for case in MATRIX if case.values[2] is None])
def test_with_instrument_a_plain_session_ends_in_this_phase(make_bench, name, transport):
    """The same of a `requests.Session` and an `HTTPAdapter` that nobody touched."""
    bench = make_bench(transport, None, plain=True)
    with use_token(CancellationToken()):  # for the connection that takes the slot in one of the phases
        instrument()
        try:
            cancel_in_phase(bench, name, transport)
        finally:
            uninstrument()


@pytest.mark.parametrize(("name", "transport"), DEADLINE_MATRIX)
def test_deadline_of_the_token_ends_this_phase(make_bench, name, transport):
    """In each phase the token's time is all there is; the boundary makes it DeadlineExceeded."""
    bench = make_bench(transport, None)
    with PHASES[name][0](bench) as stage:
        kinds: list[str] = []

        def call() -> None:
            with fail_after(0.3):
                try:
                    stage.call()
                except Cancelled as error:
                    kinds.append(error.reason.kind)
                    raise

        failure = Attempt(call).failure()
        assert isinstance(failure, DeadlineExceeded)
        assert kinds == ["deadline"]
        # On a busy machine the time may be up before the peer has anything to see the end of.
        if stage.peer is not None and stage.sees_close and stage.peer.connections:
            assert stage.peer.closed.wait(5)


@pytest.mark.parametrize(("name", "transport"), DEADLINE_MATRIX)
def test_already_cancelled_sends_nothing(make_bench, name, transport):
    """A request under a cancelled token raises before a byte leaves this machine."""
    bench = make_bench(transport, None)
    with PHASES[name][0](bench) as stage:
        before = stage.peer.connections if stage.peer else 0
        token = CancellationToken()
        token.cancel("too late")
        with use_token(token), pytest.raises(Cancelled, match="too late"):
            stage.call()
        assert (stage.peer.connections if stage.peer else 0) == before
