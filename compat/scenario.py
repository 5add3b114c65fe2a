"""The story, in numbered steps, the same for every peer.

A visitor asks for work. The app spawns children, which block in calls to an upstream service that has fallen
silent. The visitor hangs up, or a deadline passes. Then everything that the library promises must be seen to
happen, by somebody who stands outside of the process: the upstream, another visitor, the operating system.

Times are seconds between two events in different processes (one monotonic clock serves them all), from the
cause to the last effect; a step that is repeated tells the median. A step fails when its claim is false, or
when it takes `PROMPT` or longer: what is noticed that late was not noticed but found out by accident.

Run by `run.py` in the environment of a cell: `python -m compat.scenario CELL.json RESULT.json`.
"""

from __future__ import annotations

import importlib
import json
import signal
import ssl
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compat.stage import PATIENCE, Server
from compat.upstream import Notes, Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Seconds for a step that has to be prompt. Generous: on any machine it tells "woken" from "by accident".
PROMPT = 1.0

#: Seconds for a shutdown: more than servers need by themselves (gunicorn 21's gthread: 1.2), less than the
#: library's idle threads live (10).
ORDERLY = 5.0

#: How often a hang-up is told; every third visitor leaves by a reset.
ROUNDS = 12


@dataclass(frozen=True)
class Step:
    """One step: `name` is what results and limits call it, `claim` is what it shows."""

    number: int
    name: str
    claim: str
    tell: Callable[[Any], float | None]


class Steps(list[Step]):
    """The steps of one story, in order."""

    def step(self, name: str, claim: str) -> Callable[[Callable[[Any], float | None]], Callable[[Any], float | None]]:
        """Make a method the next step of the story. It returns seconds, if there is something to measure."""

        def add(tell: Callable[[Any], float | None]) -> Callable[[Any], float | None]:
            self.append(Step(len(self) + 1, name, claim, tell))
            return tell

        return add


STEPS = Steps()
step = STEPS.step


@dataclass(frozen=True)
class HangUp:
    """What was seen after one visitor left; seconds since then."""

    noticed: float
    joined: float
    upstream: float


class Story:
    """The story while it is told to one server and one client.

    Args:
        server: The running app.
        upstream: The plain upstream service; its TLS twin writes into the same notes.
        notes: What they have noted.
        calls: The names of the calls that the app makes in /work.
        patience: See `stage.PATIENCE`.
    """

    def __init__(
        self, server: Server, upstream: Upstream, notes: Notes, calls: set[str], patience: float = PATIENCE
    ) -> None:
        self.server = server
        self.ran: dict[str, str] = {}  # versions that the server's process can import
        self._upstream = upstream
        self._notes = notes
        self._calls = calls
        self._patience = patience
        self._visits = 0
        self._seen: list[HangUp] = []

    # --- the steps ------------------------------------------------------------------------------------------

    @step("start", "the server starts with the built wheel, and answers")
    def start(self) -> float:
        began = time.monotonic()
        serving = self.server.journal.expect("serving")
        self.ran = serving["versions"]
        where = Path(serving["tokenscope"])
        assert where.is_relative_to(sys.prefix), f"this is not the wheel: {where}"
        assert self.server.get("/answer") == (200, b"hello")
        return time.monotonic() - began

    @step("work", "a request spawns children, all of which block")
    def work(self) -> None:
        self._seen = [self._hang_up(number) for number in range(ROUNDS)]

    @step("reason", "the visitor hangs up: every child is woken, and told that this is why")
    def reason(self) -> float:
        return self._median("noticed")

    @step("joined", "all children have ended and were joined")
    def joined(self) -> float:
        return self._median("joined")

    @step("upstream", "every call was cut: upstream sees its connections close")
    def upstream(self) -> float:
        return self._median("upstream")

    @step("neighbour", "another visitor's request, running meanwhile, is answered in full")
    def neighbour(self) -> None:
        self._upstream.gate.clear()
        visit = self._new_visit()
        with self.server.visit("/relay?path=gate", visit) as other:
            self._reached(visit, {"relay"})
            self._hang_up(0)
            self._upstream.gate.set()
            status, body = other.answer()
        assert (status, body.isdigit()) == (200, True), f"it got {status} {body!r}"

    @step("stream", "a visitor leaves in the middle of a streamed body: the same")
    def stream(self) -> float:
        return statistics.median(self._leave_a_stream() for _ in range(ROUNDS // 2))

    @step("deadline", "a deadline passes: every child is told that this is why, the visitor gets a 504")
    def deadline(self) -> float:
        return statistics.median(self._wait_too_long() for _ in range(ROUNDS // 4))

    @step("keep-alive", "after a 504 the visitor's connection serves the next request")
    def keep_alive(self) -> None:
        with self.server.visit("/deadline", self._new_visit()) as visitor:
            assert visitor.answer()[0] == 504
            visitor.ask("/answer")
            assert visitor.answer() == (200, b"hello")

    @step("pool", "connections that were cut are never used again, healthy ones are")
    def pool(self) -> None:
        visit = self._new_visit()
        with self.server.visit("/work", visit) as visitor:
            reached = self._reached(visit, self._calls)
            cut = {note.connection for call, note in reached.items() if call.endswith("-http")}
            visitor.leave()
            self._ends(visit, self._children, "client_disconnected")
            self.server.journal.expect("joined", visit=visit)
        first, second = (self.server.get("/relay?path=answer") for _ in range(2))
        assert first[0] == 200, f"the first call after a cut got {first}"
        assert first == second, f"a healthy connection was not used again: {first}, then {second}"
        assert int(first[1]) not in cut, "a connection that was cut was used again"

    @step("nothing left", "no thread and no descriptor is left of all that")
    def nothing_left(self) -> None:
        before = self.server.census()
        for number in range(ROUNDS):
            self._hang_up(number)
            self._leave_a_stream()
        end = time.monotonic() + self._patience
        while left := _more(self.server.census(), before):
            assert time.monotonic() < end, f"left behind: {left}"
            time.sleep(0.02)

    @step("next", "the next request is as good as the first")
    def next(self) -> None:
        assert self.server.get("/answer") == (200, b"hello")
        assert self.server.get("/relay?path=answer")[0] == 200

    @step("shutdown", "on SIGTERM the process ends in good order: parked threads do not hold it up")
    def shutdown(self) -> float:
        asked = time.monotonic()
        status = self.server.shut_down()
        seconds = time.monotonic() - asked
        assert status == 0, f"exit status {status}"
        assert seconds < ORDERLY, f"it took {seconds:.1f} s"
        return seconds

    # --- what happens in them -------------------------------------------------------------------------------

    @property
    def _children(self) -> set[str]:
        return self._calls | {"sleep"}

    def _new_visit(self) -> str:
        self._visits += 1
        return f"v{self._visits}"

    def _hang_up(self, number: int) -> HangUp:
        """One visitor asks for work, waits until all of it blocks, and leaves."""
        visit = self._new_visit()
        with self.server.visit("/work", visit) as visitor:
            self._reached(visit, self._calls)
            self.server.journal.expect("spawned", visit=visit, children=len(self._children))
            left = visitor.leave("rst" if number % 3 == 2 else "fin")
        ends = self._ends(visit, self._children, "client_disconnected")
        joined = self.server.journal.expect("joined", visit=visit)
        assert joined["left"] == 0, f"{joined['left']} children are left after the join"
        return HangUp(max(end["at"] for end in ends) - left, joined["at"] - left, self._left(visit, self._calls) - left)

    def _leave_a_stream(self) -> float:
        """One visitor reads the beginning of a stream, and leaves; seconds until all of it has ended."""
        visit = self._new_visit()
        with self.server.visit("/stream", visit) as visitor:
            visitor.read_until(b"first")
            self.server.journal.expect("waiting", visit=visit)  # for more, which never comes
            left = visitor.leave()
        (end,) = self._ends(visit, {"stream"}, "client_disconnected")
        joined = self.server.journal.expect("joined", visit=visit)
        return _prompt(max(end["at"], joined["at"], self._left(visit, {"stream"})) - left)

    def _wait_too_long(self) -> float:
        """One visitor waits until the deadline; seconds from there to all that follows from it."""
        visit = self._new_visit()
        with self.server.visit("/deadline", visit) as visitor:
            status, _body = visitor.answer()
            answered = time.monotonic()
        assert status == 504, f"the visitor got {status}"
        ends = self._ends(visit, self._children, "deadline")
        return _prompt(max(answered, self._left(visit, self._calls)) - ends[0]["deadline"])

    def _reached(self, visit: str, calls: set[str]) -> Mapping[str, Any]:
        return self._notes.expect("reached", visit, calls, self._patience)

    def _left(self, visit: str, calls: set[str]) -> float:
        """When the last of these calls was cut."""
        return max(note.at for note in self._notes.expect("left", visit, calls, self._patience).values())

    def _ends(self, visit: str, children: set[str], kind: str) -> list[dict[str, Any]]:
        """How these children ended: cancelled, each of them, and for this reason."""
        ends = [self.server.journal.expect("ended", visit=visit, child=child) for child in sorted(children)]
        for end in ends:
            assert end["kind"] == kind, f"the child {end['child']!r} ended with {end['how']}, not with {kind}"
        return ends

    def _median(self, what: str) -> float:
        assert self._seen, "no hang-up was seen to the end"
        return _prompt(statistics.median(getattr(seen, what) for seen in self._seen))


def _prompt(seconds: float) -> float:
    assert seconds < PROMPT, f"it took {seconds:.1f} s"
    return seconds


def _more(now: tuple[list[str], list[str]], before: tuple[list[str], list[str]]) -> str:
    """What there is now and was not before, in words."""
    extra = Counter(now[0]) - Counter(before[0]) + (Counter(now[1]) - Counter(before[1]))
    return ", ".join(f"{count} x {what}" for what, count in sorted(extra.items()))


# --- telling it ---------------------------------------------------------------------------------------------


def tell(story: Story, limits: Mapping[str, str]) -> list[dict[str, Any]]:
    """Tell the whole story; a record for each step. `limits`: why some steps cannot be told to this peer."""
    records: list[dict[str, Any]] = []
    for told in STEPS:
        record: dict[str, Any] = {"step": told.name}
        if told.name in limits:
            record |= {"status": "not applicable", "reason": limits[told.name]}
        elif records and records[0]["status"] != "pass":
            record |= {"status": "fail", "reason": "the server did not start"}
        else:
            record |= _try(told, story)
        records.append(record)
    return records


def _try(told: Step, story: Story) -> dict[str, Any]:
    try:
        seconds = told.tell(story)
    except Exception as error:
        traceback.print_exc()
        print(f"--- the server's log:\n{story.server.last_words()}\n---", file=sys.stderr)
        return {"status": "fail", "reason": " ".join(f"{error}".split()) or repr(error)}
    return {"status": "pass"} if seconds is None else {"status": "pass", "seconds": round(seconds, 6)}


def perform(
    server: Sequence[str], client: str, limits: Mapping[str, str], folder: Path, patience: float = PATIENCE
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Set everything up, tell the story, and take everything down; the records, and all versions that ran."""
    notes = Notes()
    context, authority = _certificates(folder)
    plain, secret = Upstream(notes.tell), Upstream(notes.tell, context)
    environ = {
        "COMPAT_CLIENT": client,
        "COMPAT_AUTHORITY": str(authority),
        "COMPAT_UPSTREAM": json.dumps({"http": plain.address, "https": secret.address}),
    }
    with Server(server, environ, folder / "server.log", patience) as running:
        story = Story(running, plain, notes, _calls_of(client), patience)
        records = tell(story, limits)
    plain.close()
    secret.close()
    return records, story.ran


def _certificates(folder: Path) -> tuple[ssl.SSLContext, Path]:
    import trustme

    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    path = folder / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return context, path


def _calls_of(client: str) -> set[str]:
    """The names of all calls that block, as the app makes them from the client's `CALLS`."""
    calls = importlib.import_module(f"compat.peers.{client}").CALLS
    return {f"{name}-{scheme}" for name in calls for scheme in ("http", "https")}


def main(cell: str, result: str) -> None:
    """Read what to do from one file, write what was seen into another."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the story was stopped"))
    todo = json.loads(Path(cell).read_text())
    with tempfile.TemporaryDirectory() as folder:
        records, ran = perform(todo["server"], todo["client"], todo["limits"], Path(folder))
    Path(result).write_text(json.dumps({"steps": records, "ran": ran}))


if __name__ == "__main__":
    main(*sys.argv[1:])
