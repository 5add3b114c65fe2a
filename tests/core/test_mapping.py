"""ThreadScope.map: lazy, bounded, ordered or not, and never left running."""

from __future__ import annotations

import gc
import itertools
import os
import threading

import pytest
from actors import WAIT, Gate, Sleeper, fail, until

from tokenscope import CancellationToken, Cancelled, ScopeClosed, StragglersLeft, TaskCancelled, ThreadScope


class Source:
    """Items without end, which count how many were pulled and whether they were closed."""

    def __init__(self) -> None:
        self.pulled = 0
        self.closed = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.pulled += 1
        return self.pulled

    def close(self):
        self.closed += 1


def test_map_gives_the_results_in_the_order_of_the_items():
    """Ordered is the default, whichever ends first."""
    gates = [Gate(), Gate()]
    with ThreadScope() as scope:
        results = scope.map(lambda n: gates[n].hold(n) if n < 2 else n, range(3), limit=3)
        gates[1].open()
        threading.Thread(target=lambda: (gates[1].await_arrival(), gates[0].open())).start()
        assert list(results) == [0, 1, 2]


def test_map_unordered_gives_the_results_as_they_are_done():
    """A slow item holds up nobody behind it."""
    gate = Gate()
    with ThreadScope() as scope:
        results = scope.map(lambda n: gate.hold(n) if n == 0 else n, range(4), limit=2, ordered=False)
        first = [next(results) for _ in range(3)]
        gate.open()
        assert first == [1, 2, 3]
        assert list(results) == [0]


@pytest.mark.parametrize("ordered", [True, False])
def test_map_pulls_nothing_before_it_is_asked(ordered):
    """Making a map starts nothing and pulls nothing."""
    source = Source()
    with ThreadScope() as scope:
        scope.map(str, source, ordered=ordered)
        assert source.pulled == 0
    assert scope.report.tasks.spawned == 0


@pytest.mark.parametrize("ordered", [True, False])
def test_map_pulls_no_more_than_was_taken_and_the_limit(ordered):
    """After n results at most n + limit items were pulled from the source."""
    source = Source()
    with ThreadScope() as scope, scope.map(str, source, limit=3, ordered=ordered) as results:
        for taken in range(1, 20):
            next(results)
            assert source.pulled <= taken + 3
    assert source.closed == 1


def test_map_runs_at_most_limit_items_at_a_time():
    """Never more than `limit` are in flight, and they do run beside each other."""
    together, most, guard = threading.Barrier(3, timeout=WAIT), [0, 0], threading.Lock()

    def count(_):
        with guard:
            most[0] += 1
            most[1] = max(most)
        together.wait()
        with guard:
            most[0] -= 1

    with ThreadScope() as scope:
        assert len(list(scope.map(count, range(12), limit=3))) == 12
    assert most[1] == 3


def test_maps_default_limit_follows_the_machine():
    """None means min(32, cpus + 4)."""
    source, gate = Source(), Gate()
    with ThreadScope() as scope:
        results = scope.map(gate.hold, source)
        taker = scope.spawn(next, results)
        expected = min(32, (os.cpu_count() or 1) + 4)
        until(lambda: source.pulled == expected)
        gate.open()
        taker.result(WAIT)
        results.close()
    assert expected <= source.pulled <= expected + 1


def test_a_failing_item_raises_its_error_and_cancels_the_rest():
    """In a scope that cancels on error the first failing item ends it all, and the source is closed."""
    source, sleeper, error = Source(), Sleeper(), ValueError("item 2")

    def work(item):
        if item == 2:
            sleeper.await_arrival()
            raise error
        sleeper.sleep()

    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            list(scope.map(work, source, limit=2))
    assert caught.value.exceptions == (error,)
    assert sleeper.left() == ["sibling_failed"]
    assert source.closed == 1


@pytest.mark.parametrize("ordered", [True, False])
def test_a_failing_item_is_told_once_and_the_others_can_still_be_had(ordered):
    """In a collecting scope the error comes in the item's turn, and next() goes on after it."""
    error, got = ValueError("item 1"), []
    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope(on_error="collect") as scope:
            results = scope.map(lambda n: fail(error) if n == 1 else n, range(4), limit=2, ordered=ordered)
            for _ in range(4):
                try:
                    got.append(next(results))
                except ValueError as raised:
                    got.append(raised)
            assert next(results, "end") == "end"
    assert sorted(got, key=str) == [0, 2, 3, error]
    assert got == [0, error, 2, 3] or not ordered
    assert caught.value.exceptions == (error,)


def test_a_failing_source_raises_in_its_turn():
    """Ordered, the results of the items before it come first, then the error, then the end."""
    gate = Gate()

    def source():
        yield 1
        yield 2
        gate.open()
        raise ConnectionError("the source")

    with ThreadScope() as scope:
        results = scope.map(gate.hold, source(), limit=5)
        assert [next(results), next(results)] == [1, 2]
        with pytest.raises(ConnectionError, match="the source"):
            next(results)
        assert next(results, "end") == "end"


def test_a_result_that_is_there_is_handed_out_to_a_cancelled_consumer():
    """As with Task.result(): what is finished is given, a failure too, whatever has been cancelled because of it."""
    gate, error = Gate(), ValueError("item 1")
    with pytest.raises(ValueError, match="item 1") as caught:
        with ThreadScope() as scope:
            results = scope.map(lambda n: gate.fail(error) if n == 1 else n, range(2), limit=2)
            assert next(results) == 0
            gate.open()
            assert scope.token.wait(WAIT)  # the failing item has cancelled the body as well
            next(results)
    assert caught.value is error


def test_unordered_a_failing_source_raises_where_it_is_pulled():
    """An error of the source comes out of next(), and what was started before is stopped with the scope."""
    sleeper = Sleeper()

    def source():
        yield 1
        sleeper.await_arrival()
        raise ConnectionError("the source")

    with pytest.raises(ConnectionError, match="the source"):
        with ThreadScope() as scope:
            next(scope.map(lambda _: sleeper.sleep(), source(), limit=5, ordered=False))
    assert len(sleeper.left()) == 1


@pytest.mark.parametrize("leave", ["close", "with", "scope exit"])
def test_a_map_left_unfinished_is_cancelled_joined_and_its_source_closed(leave):
    """On close(), on leaving its `with`, at the latest with its scope: with `scope_ended`, as no failure."""
    source, sleeper = Source(), Sleeper()

    def work(item):
        if item > 1:
            sleeper.sleep()
        return item

    with ThreadScope() as scope:
        results = scope.map(work, source, limit=3)
        assert next(results) == 1
        sleeper.await_arrival(2)
        if leave == "close":
            results.close()
            assert scope.snapshot().tasks == ()
            assert source.closed == 1
        elif leave == "with":
            with results:
                pass
            assert scope.snapshot().tasks == ()
            assert source.closed == 1
    assert sleeper.left(2) == ["scope_ended"] * 2
    assert source.closed == 1
    assert scope.report.outcome == "succeeded"
    if leave == "scope exit":
        with pytest.raises(TaskCancelled, match="left before"):
            next(results)
    else:
        assert next(results, "end") == "end"


def test_closing_a_map_twice_closes_its_source_once():
    """close() is idempotent, also after the scope closed it."""
    source = Source()
    with ThreadScope() as scope:
        results = scope.map(str, source)
        next(results)
        results.close()
        results.close()
    results.close()
    assert source.closed == 1


def test_a_generator_that_feeds_a_map_is_closed():
    """Its finally runs when the map is left."""
    closed = []

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    with ThreadScope() as scope, scope.map(str, source()) as results:
        next(results)
    assert closed == [True]


def test_a_map_that_is_dropped_cancels_what_is_in_flight():
    """Breaking out of a loop over a map drops it: its children are cancelled long before the scope ends."""
    sleeper = Sleeper()

    def work(item):
        return item if item == 0 else sleeper.sleep()

    with ThreadScope() as scope:
        for _ in scope.map(work, range(3), limit=3):
            sleeper.await_arrival(2)
            break
        gc.collect()
        assert sleeper.left(2) == ["scope_ended"] * 2
        assert not scope.token.cancelled
    assert scope.report.outcome == "succeeded"


def test_finished_and_dropped_maps_are_not_kept_by_their_scope():
    """A scope that maps for hours does not grow with it."""
    with ThreadScope() as scope:
        for _ in range(100):
            assert list(scope.map(str, range(2))) == ["0", "1"]
        gc.collect()
        assert len(scope._maps) <= 1


def test_taking_from_a_map_is_a_checkpoint():
    """A cancelled consumer gets Cancelled, and nothing more is pulled for it."""
    source = Source()
    gate = Gate()
    with ThreadScope() as scope:
        results = scope.map(lambda n: n if n == 1 else gate.hold(n), source, limit=2)
        next(results)
        scope.cancel()
        pulled = source.pulled
        with pytest.raises(Cancelled):
            next(results)
        gate.open()
    assert source.pulled == pulled


@pytest.mark.parametrize("ordered", [True, False])
def test_a_consumer_that_waits_for_a_result_is_woken_by_its_cancel(ordered):
    """Blocked in next(), the consumer comes back with Cancelled while the items run on deaf."""
    parent, gate = CancellationToken(), Gate()

    def cancel_when_it_runs():
        gate.await_arrival()
        parent.cancel()

    canceller = threading.Thread(target=cancel_when_it_runs)
    with ThreadScope() as outer:
        with pytest.raises(Cancelled), ThreadScope(token=parent):
            canceller.start()
            next(outer.map(gate.hold, range(2), ordered=ordered))
        gate.open()
    canceller.join(WAIT)


def test_an_item_that_is_cancelled_alone_raises_task_cancelled():
    """A cancelled item is told to a healthy consumer as such, and the others can be had."""
    sleeper, gate = Sleeper(), Gate()

    def take_two():
        with pytest.raises(TaskCancelled):
            next(results)
        return next(results)

    with ThreadScope() as scope:
        results = scope.map(lambda n: gate.hold(n) if n else sleeper.sleep(), range(2), limit=2)
        taker = scope.spawn(take_two)
        sleeper.await_arrival()
        gate.await_arrival()
        results._tasks[0].cancel()
        gate.open()
        assert taker.result(WAIT) == 1


def test_a_source_whose_close_fails_is_reported_and_everything_else_still_done():
    """An error of a source's close() is one failure among others: cleanups run and the scope ends."""
    error, cleaned = ValueError("close"), []

    def source():
        try:
            yield from itertools.count()
        finally:
            raise error

    with pytest.raises(ExceptionGroup) as caught:
        with ThreadScope() as scope:
            scope.defer(cleaned.append, True)
            results = scope.map(str, source())
            next(results)
    assert caught.value.exceptions == (error,)
    assert cleaned == [True]
    assert scope.report.outcome == "failed"


def test_a_source_that_an_abandoned_child_is_stuck_in_does_not_hide_the_stragglers():
    """A generator that runs cannot be closed: the scope still tells whom it gave up."""
    gate = Gate()

    def source():
        yield gate.hold(1)

    with pytest.raises(StragglersLeft) as caught:
        with ThreadScope(on_straggler="abandon", grace=0.01) as scope:
            results = scope.map(str, source())
            scope.spawn(next, results, name="stuck")
            gate.await_arrival()
            scope.cancel()
    until_orphans_end(scope, gate)
    assert caught.value.names == ("stuck",)
    assert scope.report.orphans == ("stuck",)


def until_orphans_end(scope, gate):
    orphans = list(scope._crew.orphans)
    gate.open()
    until(lambda: all(task.done() for task in orphans))


def test_a_map_that_a_child_consumes_while_the_scope_ends_breaks_nothing():
    """The exit cancels what the map has in flight while another thread takes from it, a hundred times."""
    for _ in range(100):
        started = threading.Event()

        def consume(results, started=started):
            started.set()
            try:
                for _ in results:
                    pass
            except TaskCancelled:
                return

        with ThreadScope() as scope:
            scope.spawn(consume, scope.map(str, range(1000), limit=4))
            assert started.wait(WAIT)
        assert scope.report.outcome == "succeeded", scope.report


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((str, 5), TypeError, r"map\(\) takes an iterable, not 5"),
        ((str, None), TypeError, r"map\(\) takes an iterable, not None"),
        (("str", []), TypeError, "callable"),
        ((None, []), TypeError, "callable"),
    ],
)
def test_bad_arguments_of_map_are_errors_at_the_call(arguments, error, says):
    """What is no function and what is no iterable is refused before anything runs."""
    with ThreadScope() as scope:
        with pytest.raises(error, match=says):
            scope.map(*arguments)


@pytest.mark.parametrize(
    ("limit", "error"),
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("3", TypeError), (True, TypeError)],
)
def test_a_bad_limit_of_map_is_an_error_at_the_call(limit, error):
    """The limit is a whole number above 0."""
    with ThreadScope() as scope:
        with pytest.raises(error, match="limit"):
            scope.map(str, [], limit=limit)


def test_map_outside_of_the_scopes_life_is_an_error():
    """Before it is entered and after it has ended a scope maps nothing."""
    scope = ThreadScope()
    with pytest.raises(RuntimeError, match="not open"):
        scope.map(str, [])
    with scope:
        pass
    with pytest.raises(ScopeClosed, match="ended"):
        scope.map(str, [])


def test_a_map_taken_from_after_its_scope_has_ended_is_no_false_end():
    """What the scope cut off raises, and starts nothing; what was finished before is simply at its end."""
    source = Source()
    with ThreadScope() as scope:
        unfinished, finished, closed = scope.map(str, source), scope.map(str, []), scope.map(str, source)
        assert list(finished) == []
        closed.close()
    with pytest.raises(TaskCancelled, match="left before"):
        list(unfinished)
    assert list(finished) == list(closed) == []
    assert source.pulled == 0
