"""``python -m tokenscope demo``: the same clients come to the app without tokenscope and with it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from typing import TYPE_CHECKING

import tokenscope
from tokenscope.cli.demo_clients import make_plans, visit
from tokenscope.cli.demo_desk import Job
from tokenscope.cli.demo_figures import Run, figures_of
from tokenscope.cli.demo_model import Call
from tokenscope.cli.demo_process import CannotListen, ChildDied, ChildServer
from tokenscope.cli.demo_receipt import Receipt, broken_promises

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from tokenscope.cli.demo_clients import Plan, Visit

__all__ = ["run", "serve", "what_is_missing"]

MODEL, APP = "tokenscope.cli.demo_model", "tokenscope.cli.demo_servers"
#: Seconds between two lines of progress.
BEAT = 0.5
#: Seconds in which everything of a run comes to an end by itself.
SETTLES = 30.0


def what_is_missing(server: str) -> str | None:
    """What has to be installed before this server can be used; None if nothing."""
    if server == "wsgiref" or importlib.util.find_spec(server) is not None:
        return None
    return f"--server {server} needs {server}, which is not installed: pip install {server}"


def run(options: argparse.Namespace) -> int:
    """Run it all and print the receipt; 1 if a promise did not hold."""
    plans = make_plans(options.clients, options.seed, options.rate)
    try:
        without = figures_of(run_once(options, plans, "plain"))
        scoped = figures_of(run_once(options, plans, "scoped"))
    except ChildDied as error:
        print(f"the demo could not be run: {error}", file=sys.stderr)
        return 1
    receipt = Receipt(options.server, options.seed, options.clients, options.price, without, scoped)
    print(json.dumps(receipt.as_dict(), indent=2) if options.json else f"\n{receipt.as_text()}")
    return 1 if broken_promises(receipt) else 0


def run_once(options: argparse.Namespace, plans: Sequence[Plan], style: str) -> Run:
    """All clients come once, to an app of this style; returns when everything has ended."""
    with (
        ChildServer(MODEL, str(options.rate), "quiet") as model,
        ChildServer(APP, options.server, model.url, style) as app,
    ):
        model.ask("/ledger")
        app.ask("/desk")
        visits = send_clients(plans, app, Progress("without" if style == "plain" else "with", model))
        settle(model, app)
        calls = [Call(**call) for call in model.ask("/ledger")]
        desk = app.ask("/desk")
    until = time.monotonic()
    told = {int(number): why for number, why in desk["told"].items()}
    return Run(visits, calls, [Job(**job) for job in desk["jobs"]], told, until)


def send_clients(plans: Sequence[Plan], app: ChildServer, progress: Progress) -> list[Visit]:
    """Let them come, and tell how it goes."""
    with tokenscope.ThreadScope(name="clients") as scope:
        tasks = [scope.spawn(visit, app.address, plan) for plan in plans]
        while not scope.join(timeout=BEAT):
            progress.tell([task.result() for task in tasks if task.done()])
    visits = [task.result() for task in tasks]
    progress.tell(visits)
    return visits


def settle(model: ChildServer, app: ChildServer) -> None:
    """Wait until nothing runs any more, so that all of it is on the bill, or far too long."""
    end = time.monotonic() + SETTLES
    while time.monotonic() < end:
        calls, jobs = model.ask("/ledger"), app.ask("/desk")["jobs"]
        if all(call["closed"] is not None for call in calls) and all(job["ended"] is not None for job in jobs):
            return
        tokenscope.sleep(0.1)


class Progress:
    """A line now and then, so that nobody waits before a silent screen."""

    def __init__(self, what: str, model: ChildServer) -> None:
        self._what = what
        self._model = model
        self._began = time.monotonic()

    def tell(self, visits: Sequence[Visit]) -> None:
        """Say how it stands."""
        calls = self._model.ask("/ledger")
        left = sum(visit.hung_up is not None for visit in visits)
        running = sum(call["closed"] is None for call in calls)
        billed = sum(len(call["tokens"]) for call in calls)
        print(
            f"{self._what:>7} tokenscope {time.monotonic() - self._began:4.1f} s: {left:3} clients hung up,"
            f" {running:3} calls of the model running, {billed:6,} tokens billed",
            file=sys.stderr,
            flush=True,
        )


HOWTO = """The chat app is at {url}. In another terminal:

    curl -N -d '{{}}' {url}/chat/1                  # wait for the answer
    curl -N -d '{{}}' {url}/chat/2 --max-time 2     # hang up after two seconds

Here you see when the app noticed, and what the model billed. Ctrl-C ends it.
"""


def serve(options: argparse.Namespace) -> int:
    """Serve the app with tokenscope until Ctrl-C, telling what happens; 2 if the port cannot be had."""
    try:
        _serve(options)
    except CannotListen as error:
        print(f"tokenscope demo: {error}; choose another with --port", file=sys.stderr)
        return 2
    return 0


def _serve(options: argparse.Namespace) -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),
        ChildServer(MODEL, str(options.rate), "aloud", aloud=True) as model,
        ChildServer(APP, options.server, model.url, "aloud", port=options.port, aloud=True) as app,
    ):
        app.ask("/desk")
        print(HOWTO.format(url=app.url), flush=True)
        app.wait()
