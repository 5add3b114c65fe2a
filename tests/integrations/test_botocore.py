"""boto3's clients against a small S3: calls, pauses and transfers end with the token, nothing is asked twice."""

from __future__ import annotations

import gc
import io
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from botocore import awsrequest
from botocore.client import BaseClient
from botocore.config import Config
from peers import Attempt, Authority, FullBacklog, Peer, blocked_in, wait_until
from peers import scripts as play
from peers.s3 import Store

from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    TaskCancelled,
    TokenScopeError,
    fail_after,
    shield,
    use_token,
)
from tokenscope.integrations import _botocore_pauses
from tokenscope.integrations.botocore import instrument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MB = 1024 * 1024
UPLOAD = 64 * MB  # more than any pair of socket buffers takes
BIG = bytes(range(256)) * (12 * MB // 256)
IN_PARTS = TransferConfig(multipart_threshold=5 * MB, multipart_chunksize=5 * MB)
WHERE = {"Bucket": "b", "Key": "k"}


@dataclass
class Bench:
    """Makes servers and clients, and closes them."""

    exits: ExitStack = field(default_factory=ExitStack)

    def peer(self, script: play.Script, **options: Any) -> Peer:
        return self.exits.enter_context(Peer(script, **options))

    def plain(self, url: str, *, service: str = "s3", verify: Any = None, **config: Any) -> Any:
        client = boto3.session.Session().client(
            service,
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id="id",
            aws_secret_access_key="secret",
            verify=verify,
            # Without a checksum behind the body, which the small servers do not read.
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required", **config),
        )
        self.exits.callback(client.close)
        return client

    def client(self, url: str, **options: Any) -> Any:
        return instrument(self.plain(url, **options))


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Yield a bench, closed when the test ends."""
    bench = Bench()
    with bench.exits:
        yield bench


@pytest.fixture(scope="module", autouse=True)
def _botocore_is_loaded() -> None:
    """Load what botocore keeps open for the life of the process before anybody counts."""
    boto3.session.Session().client("s3", region_name="us-east-1").close()
    gc.collect()


def cancelled(attempt: Attempt, token: CancellationToken) -> Cancelled:
    """Cancel, and return what the attempt raised, which is this token's Cancelled."""
    assert token.cancel("the user left")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert failure.reason is token.reason
    return failure


# --- phases ---------------------------------------------------------------------------------------------------


def get(client: Any) -> bytes:
    return client.get_object(**WHERE)["Body"].read()


def get_in_chunks(client: Any) -> bytes:
    return b"".join(client.get_object(**WHERE)["Body"].iter_chunks(10))


def get_into(client: Any) -> None:
    body, buffer = client.get_object(**WHERE)["Body"], bytearray(10)
    while body.readinto(buffer):
        pass


def get_lines(client: Any) -> list[bytes]:
    return list(client.get_object(**WHERE)["Body"].iter_lines())


def put(client: Any) -> object:
    return client.put_object(**WHERE, Body=b"u" * UPLOAD)


def put_a_file(client: Any) -> object:
    return client.put_object(**WHERE, Body=io.BytesIO(b"u" * UPLOAD))


def list_keys(client: Any) -> object:
    return client.list_objects_v2(Bucket="b")


def select(client: Any) -> object:
    events = client.select_object_content(
        **WHERE, Expression="e", ExpressionType="SQL", InputSerialization={"CSV": {}}, OutputSerialization={"CSV": {}}
    )
    return list(events["Payload"])


def says_continue_and_hangs(exchange: Any) -> None:
    """Ask for the body, read it, and say no more."""
    request = exchange.read_request(body=False)
    exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    exchange.read_body(request.headers)
    exchange.hang()


def says_continue_and_falls_silent(exchange: Any) -> None:
    """Ask for the body, and do not read it for a while."""
    exchange.read_request(body=False)
    exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    exchange.peer.reached.set()
    exchange.pause(2.0)
    try:
        exchange.read_all()
    finally:
        exchange.peer.closed.set()


#: By name: what the server does, and the call that it blocks.
PHASES: dict[str, tuple[play.Script, Callable[[Any], object]]] = {
    "put-continue": (play.never_reads_body, lambda client: client.put_object(**WHERE, Body=b"short")),
    "put-head": (says_continue_and_hangs, lambda client: client.put_object(**WHERE, Body=b"short")),
    "put-body": (play.reads_body_late, put),
    "put-file": (says_continue_and_falls_silent, put_a_file),
    "get-head": (play.hangs_before_headers, get),
    "get-half-head": (play.hangs_in_headers, get),
    **{f"get-{kind}": (play.hangs_in_body(kind), get) for kind in play.BODIES if kind != "gzip"},
    **{f"list-{kind}": (play.hangs_in_body(kind), list_keys) for kind in ("content-length", "chunked", "until-close")},
    "get-chunks": (play.hangs_in_body("until-close"), get_in_chunks),
    "get-into": (play.hangs_in_body("content-length"), get_into),
    "get-lines": (play.hangs_in_body("sse"), get_lines),
    "get-drip": (play.drips, get_lines),
    "select-events": (play.hangs_in_body("chunked"), select),
}


@pytest.mark.parametrize("transport", ["tcp", "tls"])
@pytest.mark.parametrize("phase", PHASES)
def test_cancel_in_this_phase_raises_closes_and_never_resends(bench: Bench, certificates: Authority, phase, transport):
    """In each phase: Cancelled with the reason, the server sees the close, and exactly one request."""
    script, call = PHASES[phase]
    tls = certificates if transport == "tls" else None
    peer, token = bench.peer(script, tls=tls), CancellationToken()
    client = bench.client(peer.url(""), verify=tls and tls.ca_file)
    attempt = Attempt(lambda: call(client), token)
    assert peer.reached.wait(5)
    cancelled(attempt, token)
    assert peer.closed.wait(5)
    assert peer.requests == 1


def test_a_connect_and_a_handshake_that_hang_end_with_the_token(bench: Bench):
    """Before there is a request, too; and no second connection is tried."""
    with FullBacklog() as backlog:
        client, token = bench.client(backlog.url("")), CancellationToken()
        attempt = Attempt(lambda: list_keys(client), token)
        wait_until(lambda: backlog.connecting() == 1)
        cancelled(attempt, token)
    peer, token = bench.peer(play.never_answers, scheme="https"), CancellationToken()
    client = bench.client(peer.url(""))
    attempt = Attempt(lambda: list_keys(client), token)
    wait_until(lambda: blocked_in(attempt.thread, "do_handshake"))
    cancelled(attempt, token)
    assert peer.connections == 1


def test_a_proxy_that_hangs_is_left(bench: Bench):
    """The manager of a proxy is made with the first request to it, later than `instrument`; it is guarded as well."""
    proxy, token = bench.peer(play.hangs_after_connect), CancellationToken()
    client = bench.client("https://127.0.0.1:1", proxies={"https": proxy.url()})
    attempt = Attempt(lambda: list_keys(client), token)
    assert proxy.reached.wait(5)
    cancelled(attempt, token)
    assert proxy.closed.wait(5)


def test_the_deadline_of_the_token_is_all_the_time_there_is(bench: Bench):
    """The boundary makes it DeadlineExceeded; botocore, whose own limit is a minute, tries nothing again."""
    peer = bench.peer(play.hangs_before_headers)
    client = bench.client(peer.url(""))
    with pytest.raises(DeadlineExceeded), fail_after(0.3):
        list_keys(client)
    assert peer.requests == 1


def test_a_body_stays_bound_to_the_token_it_was_opened_under(bench: Bench):
    """Whoever reads it: a thread that is not cancelled itself gets TaskCancelled, with the reason."""
    peer, token = bench.peer(play.hangs_in_body("until-close")), CancellationToken()
    client = bench.client(peer.url(""))
    with use_token(token):
        body = client.get_object(**WHERE)["Body"]
    attempt = Attempt(body.read)
    assert peer.reached.wait(5)
    token.cancel("the user left")
    failure = attempt.failure()
    assert isinstance(failure, TaskCancelled)
    assert failure.reason is token.reason


def test_under_a_cancelled_token_nothing_is_sent(bench: Bench):
    """Neither by a call nor by a transfer."""
    peer, token = bench.peer(Store()), CancellationToken()
    client = bench.client(peer.url(""))
    token.cancel()
    for call in (list_keys, lambda client: client.download_fileobj("b", "k", io.BytesIO())):
        with use_token(token), pytest.raises(Cancelled):
            call(client)
    assert peer.connections == 0


# --- pauses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["legacy", "standard", "adaptive"])
def test_the_pause_before_a_retry_ends_with_the_token(bench: Bench, mode):
    """In all retry modes; a minute is not sat out and no second request is sent."""
    peer, token = bench.peer(play.answers(b"", status="503 Slow Down")), CancellationToken()
    client = bench.client(peer.url(""), retries={"mode": mode})
    client.meta.events.register_first("needs-retry.s3", lambda **_: 60)
    attempt = Attempt(lambda: list_keys(client), token)
    wait_until(lambda: blocked_in(attempt.thread, "sleep"))
    cancelled(attempt, token)
    assert peer.requests == 1


@pytest.mark.parametrize("mode", ["legacy", "standard", "adaptive"])
def test_retries_go_on_as_botocore_says(bench: Bench, mode):
    """The pause is ours, the policy is not: without a cancel, as many attempts as were asked for."""
    peer = bench.peer(play.answers(b"", status="503 Slow Down"))
    client = bench.client(peer.url(""), retries={"mode": mode, "total_max_attempts": 2})
    with use_token(CancellationToken()), pytest.raises(client.exceptions.ClientError, match="503"):
        list_keys(client)
    assert peer.requests == 2


def test_the_adaptive_mode_holding_a_request_back_ends_with_the_token(bench: Bench):
    """A request that waits for its turn is cancelled before it is sent, and takes nobody's turn."""
    peer, token = bench.peer(Store()), CancellationToken()
    client = bench.client(peer.url(""), retries={"mode": "adaptive"})
    limiter = next(
        owner for owner in _botocore_pauses._handlers(client, "before-send.s3.*") if hasattr(owner, "_token_bucket")
    )
    limiter._enabled, limiter._token_bucket._fill_rate = True, 0.01  # a turn every 100 seconds
    attempt = Attempt(lambda: list_keys(client), token)
    wait_until(lambda: blocked_in(attempt.thread, "wait"))
    cancelled(attempt, token)
    assert peer.requests == 0


# --- transfers --------------------------------------------------------------------------------------------------


def threads_of_transfers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]


@pytest.mark.parametrize("scoped", [False, True])
def test_transfers_arrive_whole(bench: Bench, tmp_path, scoped):
    """In parts, outside of any scope as under a token that lives."""
    store = Store()
    client = bench.client(bench.peer(store).url(""))
    (tmp_path / "big").write_bytes(BIG)
    with use_token(CancellationToken()) if scoped else ExitStack():
        client.upload_file(str(tmp_path / "big"), "b", "big", Config=IN_PARTS)
        client.download_file("b", "big", str(tmp_path / "back"), Config=IN_PARTS)
        client.put_object(Bucket="b", Key="small", Body=io.BytesIO(b"small"))
        client.copy({"Bucket": "b", "Key": "small"}, "b", "copied")
        client.upload_fileobj(io.BytesIO(b"other"), "b", "other")
        client.download_fileobj("b", "other", other := io.BytesIO())
        keys = [found["Key"] for found in client.list_objects_v2(Bucket="b")["Contents"]]
    assert (tmp_path / "back").read_bytes() == BIG
    assert (store.objects["/b/copied"], other.getvalue()) == (b"small", b"other")
    assert keys == ["big", "copied", "other", "small"]


@pytest.mark.parametrize("threads", [True, False])
def test_a_cancelled_download_leaves_no_thread_and_no_half_file(bench: Bench, tmp_path, threads):
    """Each thread of it is freed, s3transfer joins them and removes what it wrote."""
    store, token = Store({"/b/big": BIG}, instead={"^GET": play.hangs_in_body("content-length")}), CancellationToken()
    peer = bench.peer(store)
    client = bench.client(peer.url(""))
    config = TransferConfig(multipart_threshold=5 * MB, multipart_chunksize=5 * MB, use_threads=threads)
    attempt = Attempt(lambda: client.download_file("b", "big", str(tmp_path / "back"), Config=config), token)
    wait_until(lambda: sum(line.startswith("GET") for line in store.seen) == (3 if threads else 1))
    asked = len(store.seen)
    cancelled(attempt, token)
    assert threads_of_transfers() == []
    assert list(tmp_path.iterdir()) == []
    assert peer.closed.wait(5)
    assert len(store.seen) == asked


def test_a_cancelled_upload_gives_up_the_parts_that_were_uploaded(bench: Bench, tmp_path):
    """The service is told to forget them, although the token is cancelled by then; and it is no success."""
    store, token = Store(instead={"partNumber=2": play.reads_body_late}), CancellationToken()
    peer = bench.peer(store)
    client = bench.client(peer.url(""))
    (tmp_path / "big").write_bytes(BIG)
    attempt = Attempt(lambda: client.upload_file(str(tmp_path / "big"), "b", "big", Config=IN_PARTS), token)
    assert peer.reached.wait(5)
    cancelled(attempt, token)
    assert threads_of_transfers() == []
    assert [line.partition(" ")[0] for line in store.seen].count("DELETE") == 1
    assert sum("partNumber=2" in line for line in store.seen) == 1
    assert store.objects == {}


@pytest.mark.parametrize(
    ("where", "transfer"),
    [
        ("^HEAD", lambda client: client.download_fileobj("b", "k", io.BytesIO())),
        ("^GET", lambda client: client.download_fileobj("b", "k", io.BytesIO())),
        ("^PUT", lambda client: client.upload_fileobj(io.BytesIO(b"x"), "b", "k")),
        ("^PUT", lambda client: client.copy({"Bucket": "b", "Key": "k"}, "b", "k2")),
        ("^POST .*uploads", lambda client: client.upload_fileobj(io.BytesIO(BIG), "b", "k", Config=IN_PARTS)),
        ("^POST .*uploadId", lambda client: client.upload_fileobj(io.BytesIO(BIG), "b", "k", Config=IN_PARTS)),
    ],
    ids=["head", "get", "put", "copy", "create", "complete"],
)
def test_a_transfer_that_was_cut_is_never_a_success(bench: Bench, where, transfer):
    """Whichever of its requests hangs: Cancelled in the caller, with s3transfer's own error as the cause."""
    store, token = Store({"/b/k": b"old"}, instead={where: play.hangs_before_headers}), CancellationToken()
    peer = bench.peer(store)
    client = bench.client(peer.url(""))
    attempt = Attempt(lambda: transfer(client), token)
    assert peer.reached.wait(5)
    failure = cancelled(attempt, token)
    assert isinstance(failure.__cause__, Exception)
    assert threads_of_transfers() == []


def test_a_transfer_in_a_shield_is_not_cut(bench: Bench):
    """The token of the place where it was asked for decides, in its threads as well."""
    token = CancellationToken()
    client = bench.client(bench.peer(Store({"/b/k": b"whole"})).url(""))
    with use_token(token), shield():
        token.cancel()
        client.download_fileobj("b", "k", received := io.BytesIO())
    assert received.getvalue() == b"whole"


def test_a_resource_on_an_instrumented_client_transfers_with_it(bench: Bench):
    """`Object.download_fileobj` is the client's; there is nothing else to instrument."""
    peer, token = bench.peer(Store(instead={"^HEAD": play.hangs_before_headers})), CancellationToken()
    resource = boto3.resource(
        "s3", endpoint_url=peer.url(""), region_name="us-east-1", aws_access_key_id="id", aws_secret_access_key="secret"
    )
    bench.exits.callback(instrument(resource.meta.client).close)
    attempt = Attempt(lambda: resource.Object("b", "k").download_fileobj(io.BytesIO()), token)
    assert peer.reached.wait(5)
    cancelled(attempt, token)


# --- what it does not touch, and what it refuses ------------------------------------------------------------------


def test_other_clients_are_not_touched(bench: Bench):
    """A client of the same session and class goes on with botocore's own pools, pauses and transfers."""
    session = boto3.session.Session(aws_access_key_id="id", aws_secret_access_key="secret")
    ours, theirs = (session.client("s3", region_name="us-east-1") for _ in range(2))
    instrument(ours)
    pools = theirs._endpoint.http_session._manager.pool_classes_by_scheme
    assert set(pools.values()) == {awsrequest.AWSHTTPConnectionPool, awsrequest.AWSHTTPSConnectionPool}
    assert not isinstance(theirs._endpoint._event_emitter, _botocore_pauses._PausingEmitter)
    assert "upload_file" not in vars(theirs)
    ours.close()
    theirs.close()


def test_instrument_twice_is_instrument_once(bench: Bench):
    """It returns the same client, with nothing wrapped a second time."""
    client = bench.client("http://127.0.0.1:1")
    before = (client._endpoint._event_emitter, client._endpoint.http_session._manager.pool_classes_by_scheme)
    upload = client.upload_file
    assert instrument(client) is client
    assert client.upload_file is upload
    after = (client._endpoint._event_emitter, client._endpoint.http_session._manager.pool_classes_by_scheme)
    assert [a is b for a, b in zip(before, after, strict=True)] == [True, True]


class AsyncClient(BaseClient):
    def __init__(self) -> None:
        pass

    async def _make_api_call(self, *_: object) -> None: ...  # as aiobotocore's


@pytest.mark.parametrize(
    ("wrong", "help_"),
    [
        (None, "boto3.client"),
        (boto3.session.Session(), "boto3.client"),
        (boto3.resource("s3", region_name="us-east-1"), r"instrument\(resource.meta.client\)"),
        (AsyncClient(), "cancel the asyncio task"),
    ],
    ids=["none", "session", "resource", "asynchronous"],
)
def test_what_is_no_client_is_refused_with_help(wrong, help_):
    """The error names the argument and says what to pass instead."""
    with pytest.raises(TypeError, match=f"client must .*{help_}"):
        instrument(wrong)


def test_a_client_with_a_way_of_its_own_to_send_is_refused(bench: Bench):
    """And left as it was."""
    client = bench.plain("http://127.0.0.1:1")
    session, client._endpoint.http_session = client._endpoint.http_session, object()
    with pytest.raises(TokenScopeError, match="URLLib3Session"):
        instrument(client)
    client._endpoint.http_session = session
    assert "upload_file" not in vars(client)
