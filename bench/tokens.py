"""Rows about tokens alone: looking, making, forgetting, cancelling a tree."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import time
import tracemalloc
import types
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from bench._peers import Peers
from bench._rounds import in_turn, per_loop
from bench._table import Bar, Contest, Row, Size
from tokenscope import CancellationToken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEEP = 1_000


class Bare:
    """The least that a checkpoint can be: a slot, and a method that looks at it."""

    __slots__ = ("_flag",)

    def __init__(self) -> None:
        self._flag: BaseException | None = None

    def check(self) -> None:
        if self._flag is not None:
            raise self._flag


def _ten_checks(thing: Any, turns: int) -> None:
    # Ten in a row, so that the loop itself weighs little.
    for _ in itertools.repeat(None, turns):
        thing.check()
        thing.check()
        thing.check()
        thing.check()
        thing.check()
        thing.check()
        thing.check()
        thing.check()
        thing.check()
        thing.check()


def _ten_calls(function: Callable[[], object], turns: int) -> None:
    for _ in itertools.repeat(None, turns):
        function()
        function()
        function()
        function()
        function()
        function()
        function()
        function()
        function()
        function()


def _own(loop: Callable[[Any, int], None], subject: object) -> Callable[[int], None]:
    """A copy of the loop for one contender: the interpreter specialises code for the class that it meets."""
    function = cast("types.FunctionType", loop)
    return partial(types.FunctionType(function.__code__.replace(), function.__globals__), subject)


def deep_token(depth: int) -> CancellationToken:
    """A token with ``depth`` tokens above it."""
    token = CancellationToken()
    for _ in range(depth):
        token = token.child()
    return token


@contextlib.contextmanager
def check(size: Size) -> Iterator[Contest]:
    """A checkpoint on a token that is live, nanoseconds."""
    peers = Peers(cantok="cantok", cancelscope="cancelscope")
    turns = size.of(10_000, 50)

    def timed(loop: Callable[[Any, int], None], subject: object, turns: int = turns) -> Callable[[], float]:
        return per_loop(_own(loop, subject), turns, scale=1e8)

    with contextlib.ExitStack() as stack:
        others: dict[str, Callable[[], float]] = {}
        if peers.cantok:
            token = peers.cantok.SimpleToken(peers.cantok.SimpleToken())
            others["cantok"] = timed(_ten_checks, token, turns // 20 or 1)
        if peers.cancelscope:
            stack.enter_context(peers.cancelscope.CancelScope())
            others["cancelscope"] = timed(_ten_calls, peers.cancelscope.checkpoint, turns // 4 or 1)
        play = in_turn(
            5,
            bare=timed(_ten_checks, Bare()),
            ours=timed(_ten_checks, deep_token(1)),
            deep=timed(_ten_checks, deep_token(DEEP)),
            **others,
        )
        yield Contest(play, peers.missing)


@contextlib.contextmanager
def child(size: Size) -> Iterator[Contest]:
    """Make a child of a live token and drop it, nanoseconds."""
    peers = Peers(cantok="cantok", cancelscope="cancelscope", trio="trio")
    turns = size.of(20_000, 50)
    root = CancellationToken()

    def ours(turns: int) -> None:
        make = root.child
        for _ in itertools.repeat(None, turns):
            make()

    def cantok(turns: int) -> None:
        make, parent = peers.cantok.SimpleToken, peers.cantok.SimpleToken()
        for _ in itertools.repeat(None, turns):
            make(parent)

    def cancelscope(turns: int) -> None:
        make = peers.cancelscope.CancelScope
        with make():
            for _ in itertools.repeat(None, turns):
                with make():
                    pass

    def trio(turns: int) -> None:
        async def main() -> None:
            make = peers.trio.CancelScope
            for _ in itertools.repeat(None, turns):
                with make():
                    pass

        peers.trio.run(main)

    play = in_turn(
        3,
        ours=per_loop(ours, turns),
        cantok=per_loop(cantok, turns) if peers.cantok else None,
        cancelscope=per_loop(cancelscope, turns // 4 or 1) if peers.cancelscope else None,
        trio=per_loop(trio, turns // 4 or 1) if peers.trio else None,
    )
    yield Contest(play, peers.missing)


@contextlib.contextmanager
def memory(size: Size) -> Iterator[Contest]:
    """Many children of one token, alive at once: bytes of each."""
    peers = Peers(cantok="cantok")
    count = size.of(100_000, 500)
    root = CancellationToken()

    def held(make: Callable[[], object]) -> float:
        children: list[object] = [None] * count
        tracemalloc.start()
        try:
            for place in range(count):
                children[place] = make()
            return tracemalloc.get_traced_memory()[0] / count
        finally:
            tracemalloc.stop()

    def cantok() -> float:
        return held(partial(peers.cantok.SimpleToken, peers.cantok.SimpleToken()))

    play = in_turn(ours=partial(held, root.child), cantok=cantok if peers.cantok else None)
    yield Contest(play, peers.missing, rounds=3)


@contextlib.contextmanager
def leaves(size: Size) -> Iterator[Contest]:
    """Cancel one token with many children, microseconds of the call."""
    peers = Peers(cancelscope="cancelscope", trio="trio")
    count = size.of(10_000, 100)

    def ours() -> float:
        root = CancellationToken()
        kept = [root.child() for _ in range(count)]
        spent = _microseconds(root.cancel)
        assert all(token.cancelled for token in kept)
        return spent

    def cancelscope() -> float:
        # A scope's children are those entered while it is the current one: each in a context of its own.
        with peers.cancelscope.CancelScope() as root:
            here = contextvars.copy_context()
            kept = [peers.cancelscope.CancelScope() for _ in range(count)]
            for scope in kept:
                here.copy().run(scope.__enter__)
            spent = _microseconds(root.cancel)
        assert all(scope.cancelled for scope in kept)
        return spent

    def trio() -> float:
        return float(peers.trio.run(_trio_leaves, peers.trio, count))

    play = in_turn(
        ours=ours,
        cancelscope=cancelscope if peers.cancelscope else None,
        trio=trio if peers.trio else None,
    )
    yield Contest(play, peers.missing)


async def _trio_leaves(trio: Any, count: int) -> float:
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(trio.sleep_forever)
        for _ in range(3):  # after one step of each they sleep
            await trio.lowlevel.checkpoint()
        return _microseconds(nursery.cancel_scope.cancel)


@contextlib.contextmanager
def chain(size: Size) -> Iterator[Contest]:
    """Make, cancel and drop a chain 10,000 deep; a recursion anywhere would end it."""
    depth = size.of(10_000, 2_000)

    def ours() -> float:
        root = token = CancellationToken()
        for _ in range(depth):
            token = token.child()
        spent = _microseconds(root.cancel)
        assert token.reason is root.reason is not None
        return spent

    yield Contest(in_turn(ours=ours))


def _microseconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return (time.perf_counter() - start) * 1e6


_BESIDE_CHECK = ("cancelscope", "cantok")
ROWS = (
    Row("check", "a live token, depth 1", "ns", Bar("<=", 1.15), check, peer="bare", also=_BESIDE_CHECK),
    Row("check-deep", f"the same at depth {DEEP:,}", "ns", Bar("<=", 1.15), check, ours="deep", peer="bare"),
    Row(
        "child",
        "make and drop a plain child",
        "ns",
        Bar("<=", 0.75),
        child,
        peer="cantok",
        also=("cancelscope", "trio"),
    ),
    Row("child-bytes", "each of 100,000 children", "bytes", Bar("<=", 250, "bytes"), memory, peer="cantok"),
    Row(
        "cancel-leaves",
        "cancel 10,000 leaves",
        "us",
        Bar("<=", 0.1),
        leaves,
        peer="cancelscope",
        also=("trio",),
    ),
    Row("cancel-chain", "cancel a chain 10,000 deep", "us", Bar("<", 10_000, "us"), chain),
)
