"""The clients of the demo: who comes when, what they ask, and when they hang up."""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from dataclasses import dataclass

import tokenscope
from tokenscope.cli.demo_model import THINKING

__all__ = ["Plan", "Visit", "make_plans", "visit"]

#: Seconds of silence after which a client that wants its answer gives up.
PATIENCE = 15.0


@dataclass(frozen=True)
class Plan:
    """What one client will do; times in seconds. ``leaves`` counts from its coming, None if it stays."""

    number: int
    comes: float
    effort: str
    tokens: int
    leaves: float | None
    resets: bool  # it does not say goodbye, as a killed browser

    @property
    def order(self) -> bytes:
        """The body of its request."""
        return json.dumps({"effort": self.effort, "tokens": self.tokens}).encode()


@dataclass(frozen=True)
class Visit:
    """What became of it. ``hung_up`` monotonic."""

    plan: Plan
    hung_up: float | None
    saw_words: bool  # before it left
    complete: bool  # it got the whole answer


def make_plans(clients: int, seed: int, rate: float) -> list[Plan]:
    """About two of three hang up; at least one does. Those are the ones whose answer takes long."""
    chance = random.Random(seed)  # noqa: S311  # it should repeat
    return [_make_plan(chance, number, clients, rate) for number in range(1, clients + 1)]


def _make_plan(chance: random.Random, number: int, clients: int, rate: float) -> Plan:
    leaves = number % 3 != 0
    effort = chance.choice(("medium", "high") if leaves else ("minimal", "low"))
    tokens = chance.randrange(40, 81)
    whole = (THINKING[effort] + tokens) / rate
    return Plan(
        number,
        comes=number / clients * 40 / rate,
        effort=effort,
        tokens=tokens,
        leaves=chance.uniform(0.15, 0.85) * whole if leaves else None,
        resets=chance.random() < 1 / 4,
    )


def visit(address: tuple[str, int], plan: Plan) -> Visit:
    """Be this client: come, ask, read, and go when it is time."""
    tokenscope.sleep(plan.comes)
    leaves_at = None if plan.leaves is None else time.monotonic() + plan.leaves
    answer = b""
    with socket.create_connection(address, timeout=PATIENCE) as connection:
        try:
            connection.sendall(
                b"POST /chat/%d HTTP/1.0\r\nHost: demo\r\nContent-Length: %d\r\n\r\n%s"
                % (plan.number, len(plan.order), plan.order)
            )
            answer = _read(connection, leaves_at)
        except OSError:  # then the answer is not complete, and that is told
            leaves_at = None
        if leaves_at is not None and plan.resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        hung_up = None if leaves_at is None else time.monotonic()
    return Visit(plan, hung_up, b"data:" in answer, answer.endswith(b"data: [DONE]\n\n"))


def _read(connection: socket.socket, until: float | None) -> bytes:
    """Read to the end of the answer, or until it is time to go."""
    answer = b""
    while True:
        left = PATIENCE if until is None else until - time.monotonic()
        if left <= 0:
            return answer
        connection.settimeout(left)
        try:
            data = connection.recv(1 << 16)
        except TimeoutError:
            if until is None:
                raise
            return answer
        if not data:
            return answer
        answer += data
