"""The demo: it shows what it says, it can be broken, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tokenscope.cli import demo, demo_process, main
from tokenscope.cli.demo_clients import make_plans, visit
from tokenscope.cli.demo_figures import Figures
from tokenscope.cli.demo_process import ChildDied, ChildServer
from tokenscope.cli.demo_receipt import ABORTS_A_DAY, Receipt, broken_promises

PATIENCE = 40.0
QUICK = ("--clients", "6", "--rate", "300")


def tokenscope(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "tokenscope", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


# --- the whole of it ---


@pytest.mark.parametrize("server", ["wsgiref", "waitress", "gunicorn"])
def test_the_demo_keeps_its_promises_on_a_real_server(server):
    """Everyone who leaves is noticed and told, everyone who stays is served, and the status says so."""
    done = tokenscope("demo", *QUICK, "--json", "--server", server)
    assert done.returncode == 0, done.stdout + done.stderr
    receipt = json.loads(done.stdout)
    assert receipt["broken_promises"] == []
    assert receipt["server"] == server
    plain, scoped = receipt["without"], receipt["with"]
    assert plain["aborts"] == scoped["aborts"] == scoped["told_why"] == 4
    assert plain["complete"] == scoped["complete"] == plain["stayed"] == 2
    assert plain["tokens_after"] > scoped["tokens_after"]
    assert plain["orphans"] > scoped["orphans"] == 0
    assert receipt["per_day"]["aborts"] == ABORTS_A_DAY
    assert receipt["saved_per_abort"]["tokens"] > 0


def test_the_demo_tells_how_it_goes_and_ends_with_a_receipt(capsys):
    """People see lines of progress while it runs, and at the end what was saved."""
    assert main(["demo", *QUICK]) == 0
    shown = capsys.readouterr()
    assert "without tokenscope" in shown.err
    assert "with tokenscope" in shown.err
    assert "Saved per abort:" in shown.out
    assert "At 100,000 aborts a day:" in shown.out
    assert "Promises kept: owned, prompt, told, safe." in shown.out


def test_an_app_that_breaks_the_promises_makes_the_demo_fail(monkeypatch, capsys):
    """If tokenscope did nothing at all, the demo would say so and end with status 1."""
    run_once = demo.run_once
    monkeypatch.setattr(demo, "run_once", lambda options, plans, _style: run_once(options, plans, "plain"))
    assert main(["demo", *QUICK]) == 1
    receipt = capsys.readouterr().out
    assert "PROMISES BROKEN" in receipt
    assert "told: 0 of 4" in receipt
    assert "owned: orphans" in receipt


def test_a_server_that_dies_is_told_with_its_log(monkeypatch, capsys):
    """When the demo itself is broken it does not hang, and shows what the server said."""
    monkeypatch.setattr(demo, "APP", "tokenscope.cli.nothing")
    assert main(["demo", *QUICK]) == 1
    assert "No module named tokenscope.cli.nothing" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_clear_line():
    """Nobody has to read a traceback to learn that something else runs there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tokenscope("demo", "--serve", "--port", str(port))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"tokenscope demo: cannot listen on 127.0.0.1:{port}: Address already in use; choose another with --port"
    ]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--port", "99999", "must be 65535 or less, not 99999"),
        ("--port", "-1", "must be 0 or more, not -1"),
        ("--price", "nan", "must be 0 or more, not nan"),
        ("--price", "inf", "must be 0 or more, not inf"),
        ("--price", "-1", "must be 0 or more, not -1"),
        ("--price", "much", "invalid number value: 'much'"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_at_once(capsys, option, value, said):
    """The error names the option and the value, with the status of a wrong command."""
    with pytest.raises(SystemExit) as ended:
        main(["demo", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"error: argument {option}: {said}" in capsys.readouterr().err


def test_the_app_can_be_served_for_other_clients():
    """With --serve the app stays up, tells of a hang-up what was billed, and ends with Ctrl-C."""
    with (
        subprocess.Popen(
            [sys.executable, "-u", "-m", "tokenscope", "demo", "--serve", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        said = process.stdout
        url = said.readline().split()[5].rstrip(".")
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as client:
            order = b'{"effort": "minimal", "tokens": 1000}'
            client.sendall(b"POST /chat/7 HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(order), order))
            assert client.recv(1)
        told = []
        # The helper's own short call of the model may have ended by itself before the hang-up, on a busy machine.
        while {line.split(":")[0] for line in told} != {"app", "model"}:
            line = said.readline()
            assert line, told
            told += [line] if line.startswith(("app:", "model:")) else []
        assert any("request cancelled: endpoint=POST /chat/7 status=200" in line for line in told)
        assert any("its client was gone" in line for line in told)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=PATIENCE)


# --- its parts ---

GOOD = Figures(
    aborts=20,
    left_while_thinking=13,
    tokens_billed=5000,
    tokens_after=3,
    seconds_after=0.1,
    latency_p50_ms=1.0,
    latency_p99_ms=5.0,
    upstream_open_1s_after=0,
    threads_working_1s_after=0,
    orphans=0,
    still_running_at_the_end=0,
    stayed=10,
    complete=10,
    told_why=20,
)


def receipt_for(scoped: Figures) -> Receipt:
    plain = dataclasses.replace(GOOD, tokens_after=2003, seconds_after=36.1, told_why=0, orphans=20)
    return Receipt("wsgiref", 1, 30, 10.0, plain, scoped)


def test_a_receipt_without_a_fault_is_accepted():
    """The judge finds nothing where nothing is wrong, and multiplies what was saved."""
    receipt = receipt_for(GOOD)
    assert broken_promises(receipt) == []
    assert receipt.tokens_saved == 100
    assert receipt.as_dict()["per_day"]["tokens"] == 10_000_000
    assert receipt.as_dict()["per_day"]["usd"] == 100
    assert receipt.as_dict()["per_day"]["thread_hours"] == pytest.approx(50)
    assert "Promises kept" in receipt.as_text()


@pytest.mark.parametrize(
    ("fault", "promise"),
    [
        ({"upstream_open_1s_after": 1}, "owned: upstream"),
        ({"threads_working_1s_after": 1}, "owned: threads"),
        ({"orphans": 1}, "owned: orphans"),
        ({"still_running_at_the_end": 1}, "owned: still running"),
        ({"latency_p50_ms": 1000.0}, "prompt"),
        ({"told_why": 19}, "told: 19 of 20"),
        ({"complete": 9}, "safe: 9 of the 10"),
        ({"tokens_after": 9000}, "saved"),
        ({"aborts": 0, "told_why": 0}, "nobody hung up"),
    ],
)
def test_each_broken_promise_is_named(fault, promise):
    """The judge finds every single fault, and the receipt says which it is."""
    receipt = receipt_for(dataclasses.replace(GOOD, **fault))
    broken = broken_promises(receipt)
    assert len(broken) == 1
    assert broken[0].startswith(promise)
    assert broken[0] in receipt.as_text()


@pytest.mark.parametrize("clients", [1, 2, 3, 30])
def test_the_same_seed_brings_the_same_clients(clients):
    """The demo can be repeated, and whatever the number somebody hangs up before the answer is complete."""
    plans = make_plans(clients, seed=5, rate=50)
    assert plans == make_plans(clients, seed=5, rate=50)
    assert any(plan.leaves is not None for plan in plans)
    assert clients == 1 or plans != make_plans(clients, seed=6, rate=50)


@pytest.mark.parametrize("last_words", [b"", b"HTTP/1.0 200 OK\r\n\r\ndata: half an ans"])
def test_a_client_that_is_sent_away_has_no_whole_answer(last_words):
    """An app that breaks off is not taken for one that answered, nor its client for one that hung up."""
    plan = dataclasses.replace(make_plans(3, seed=1, rate=1e6)[2], comes=0)
    assert plan.leaves is None
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        coming = pool.submit(visit, server.getsockname(), plan)
        connection, _ = server.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(last_words)
        outcome = coming.result(PATIENCE)
    assert not outcome.complete
    assert outcome.hung_up is None
    assert outcome.saw_words is bool(last_words)


def test_a_server_that_does_not_end_is_ended(monkeypatch):
    """A child that ignores the end of its stdin does not outlive the demo, which says so if it is asked."""
    monkeypatch.setattr(demo_process, "PATIENCE", 0.3)
    stubborn = ChildServer("timeit", "import time; time.sleep(60)", aloud=True)
    with stubborn, pytest.raises(ChildDied, match="/ledger"):
        stubborn.ask("/ledger")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(stubborn.address, timeout=PATIENCE)


def test_the_model_speaks_the_streaming_wire_format():
    """The model server answers as OpenAI's chat completions do, and bills words and thoughts alike."""
    with ChildServer("tokenscope.cli.demo_model", "1000", "quiet") as model, requests.Session() as session:
        answer = session.post(
            f"{model.url}/v1/chat/completions",
            json={"stream": True, "reasoning_effort": "low", "max_completion_tokens": 3},
            headers={"X-Call": "one"},
            timeout=PATIENCE,
        )
        *events, done, _end = answer.text.split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert done == "data: [DONE]"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == [
            "",
            " a",
            " thread",
            " that",
            None,
        ]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["usage"]["completion_tokens"] == 23
        assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 20}
        (call,) = model.ask("/ledger")
        assert (call["name"], len(call["tokens"]), call["gone"]) == ("one", 23, False)


def test_the_model_refuses_what_it_does_not_do():
    """A call that is not streamed gets an error, not an answer that never comes."""
    with ChildServer("tokenscope.cli.demo_model", "1000", "quiet") as model, requests.Session() as session:
        answer = session.post(f"{model.url}/v1/chat/completions", json={}, timeout=PATIENCE)
        assert answer.status_code == 400
        assert model.ask("/ledger") == []


# --- the command line ---


def test_without_a_command_the_help_is_shown(capsys):
    """Who does not know what to type learns it."""
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_a_server_that_is_not_installed_is_told_with_the_remedy(monkeypatch, capsys):
    """Asking for gunicorn without having it ends at once, and says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SystemExit) as end:
        main(["demo", "--server", "gunicorn"])
    assert end.value.code == 2
    assert "pip install gunicorn" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [("--clients", "0"), ("--clients", "many"), ("--server", "iis"), ("--rate", "-1"), ("--port", "x")],
)
def test_a_wrong_option_is_refused_by_name(wrong, capsys):
    """A typo does not run a demo of something else."""
    with pytest.raises(SystemExit) as end:
        main(["demo", *wrong])
    assert end.value.code == 2
    assert wrong[0] in capsys.readouterr().err
