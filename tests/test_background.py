"""Work that outlives the request: owned, bounded, drained, and out of reach of the request's cancel."""

from __future__ import annotations

import contextvars
import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import OrderedDict

import pytest

from tokenscope import (
    BackgroundFull,
    BackgroundScope,
    Cancelled,
    ScopeClosed,
    TaskCancelled,
    ThreadScope,
    TokenScopeError,
    check,
    current_scope,
    current_token,
    defer,
    sleep,
)
from tokenscope._core import events

WAIT = 10.0
variable = contextvars.ContextVar("variable", default="unset")


class Gate:
    """A door for one task, which stands there, deaf to every cancel, until it is opened."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.opened = threading.Event()

    def hold(self, value=None):
        self.arrived.set()
        assert self.opened.wait(WAIT), "nobody opened the gate"
        return value


def fail(error):
    raise error


@pytest.fixture
def heard():
    """What went wrong in the background, as events."""
    import queue

    told = queue.Queue()
    unsubscribe = events.subscribe(told.put, events.TaskFailed, events.Orphaned, events.BackgroundCut)
    yield told
    unsubscribe()


def test_work_outlives_the_request_that_spawned_it():
    """The request is cancelled and left, the background task goes on to its end."""
    gate = Gate()
    with BackgroundScope() as background:
        with ThreadScope() as request:
            task = background.spawn(gate.hold, "written")
            gate.arrived.wait(WAIT)
            request.cancel(kind="client_disconnected")
        assert not task.done()
        gate.opened.set()
        assert task.result(WAIT) == "written"


def test_context_variables_reach_the_work_and_the_request_does_not():
    """The context is a copy; the token, the scope and defer() are those of the background."""
    cleaned = []

    def look():
        defer(cleaned.append, True)
        check()
        return variable.get(), current_scope(), current_token()

    with BackgroundScope() as background, ThreadScope() as request:
        reset = variable.set("the request's")
        try:
            request.cancel()
            task = background.spawn(look, name="audit", kind="write")
        finally:
            variable.reset(reset)
        with ThreadScope():  # of nobody: the request's cancel is its own
            pass
        while not task.done():
            background.token.wait(0.001)
        found, scope, token = task.result()
    assert (found, scope) == ("the request's", background)
    assert token is task.token
    assert (task.name, task.kind) == ("audit", "write")
    assert cleaned == [True]
    assert request.cancelled_caught is False


def test_spawning_is_no_checkpoint_of_the_request():
    """A cancelled request can still have its audit line written."""
    with BackgroundScope() as background:
        with ThreadScope() as request:
            request.cancel()
            task = background.spawn(str, "audit")
        assert task.result(WAIT) == "audit"


def test_a_full_queue_is_an_error_that_takes_nothing():
    """Capacity tasks may wait; one more raises BackgroundFull at once, and what waits still runs."""
    gate = Gate()
    with BackgroundScope(capacity=2, max_threads=1) as background:
        running = background.spawn(gate.hold)
        assert gate.arrived.wait(WAIT)
        waiting = [background.spawn(str, n) for n in range(2)]
        with pytest.raises(BackgroundFull, match="nothing was taken"):
            background.spawn(fail, AssertionError("it was taken"))
        assert issubclass(BackgroundFull, TokenScopeError)
        gate.opened.set()
        assert [task.result(WAIT) for task in [running, *waiting]] == [None, "0", "1"]
        assert background.spawn(str, "again").result(WAIT) == "again"


def test_a_full_queue_is_full_for_many_threads_at_once():
    """Counting and taking in are one step: of a hundred spawns at a time exactly the capacity is taken."""
    gate, together = Gate(), threading.Barrier(20, timeout=WAIT)
    with BackgroundScope(capacity=10, max_threads=1) as background, ThreadScope() as scope:
        background.spawn(gate.hold)
        assert gate.arrived.wait(WAIT)

        def spawn_some():
            together.wait()
            taken = 0
            for _ in range(5):
                try:
                    background.spawn(str)
                    taken += 1
                except BackgroundFull:
                    pass
            return taken

        tasks = [scope.spawn(spawn_some) for _ in range(20)]
        assert sum(task.result(WAIT) for task in tasks) == 10
        gate.opened.set()


def test_counting_what_waits_and_taking_in_are_under_one_lock():
    """Both are seen from the inside, since the moment in between is too short for a crowd to hit it."""
    gate, owned = Gate(), []

    class Waiting(OrderedDict):
        def __len__(self):
            owned.append(("counted", background._gate.owned()))
            return super().__len__()

        def __setitem__(self, task, value):
            owned.append(("taken in", background._gate.owned()))
            super().__setitem__(task, value)

    with BackgroundScope(capacity=1, max_threads=1) as background:
        background.spawn(gate.hold)
        assert gate.arrived.wait(WAIT)
        background._crew.ready = Waiting()
        background.spawn(str)
        gate.opened.set()
    assert [seen for seen in owned if seen[1]][:2] == [("counted", True), ("taken in", True)]
    assert ("taken in", False) not in owned


def test_a_failing_task_is_told_and_stops_nobody(heard, caplog):
    """TaskFailed with scope, task and error, a log line, the future; the others go on."""
    gate, error = Gate(), ValueError("audit")
    with BackgroundScope(name="bg") as background:
        other = background.spawn(gate.hold, "alive")
        task = background.spawn(fail, error, name="writer")
        told = heard.get(timeout=WAIT)
        assert task.exception(WAIT) is error
        assert not background.token.cancelled
        gate.opened.set()
        assert other.result(WAIT) == "alive"
        assert background._crew.failures == []
    assert (told.scope, told.task, told.error) == ("bg", "writer", error)
    assert "writer" in caplog.text


def test_a_cleanup_that_fails_in_the_background_is_logged_once(heard, caplog):
    """It is told when it raises; that the task has therefore failed is no second error in the log."""

    def work():
        defer(int, "no number")

    with BackgroundScope(name="audit") as scope:
        task = scope.spawn(work)
        assert isinstance(task.exception(timeout=WAIT), ValueError)
    (record,) = caplog.records
    assert "CleanupFailed" in record.message
    assert heard.empty()


def test_close_waits_for_all_work_and_takes_no_more():
    """Queued and running work is done when close() returns True; later spawns are refused."""
    background = BackgroundScope(max_threads=1)
    gate, done = Gate(), []
    background.spawn(gate.hold)
    for number in range(5):
        background.spawn(done.append, number)
    closer = threading.Thread(target=lambda: done.append(background.close()))
    closer.start()
    end = time.monotonic() + WAIT
    while not background._closing:
        assert time.monotonic() < end
        background.token.wait(0.001)
    with pytest.raises(ScopeClosed, match="closed"):
        background.spawn(str)
    gate.opened.set()
    closer.join(WAIT)
    assert done == [0, 1, 2, 3, 4, True]
    assert background.close() is True
    assert "closed" in repr(background)


def test_close_cancels_what_takes_longer_than_the_drain_timeout():
    """With `shutdown`: what runs is woken, what is queued never starts, close() says False."""
    reasons, started = [], threading.Event()

    def stays():
        started.set()
        try:
            sleep(WAIT)
        except Cancelled as cancelled:
            reasons.append(cancelled.reason.kind)
            raise

    background = BackgroundScope(max_threads=1, drain_timeout=0.02)
    running, queued = background.spawn(stays), background.spawn(fail, AssertionError("it must not start"))
    assert started.wait(WAIT)
    assert background.close() is False
    assert reasons == ["shutdown"]
    for task in (running, queued):
        with pytest.raises(TaskCancelled):
            task.result(0)
    with pytest.raises(ScopeClosed) as caught:
        background.spawn(str)
    assert caught.value.reason is background.token.reason


def test_close_gives_up_what_does_not_obey_and_says_so(heard):
    """After drain and grace a deaf task is an orphan, told with its stack; its late failure is told, too."""
    gate, error = Gate(), ValueError("late")

    def deaf():
        gate.hold()
        raise error

    background = BackgroundScope(drain_timeout=0.01, name="bg")
    background._grace = 0.01
    background.spawn(deaf, name="deaf")
    assert gate.arrived.wait(WAIT)
    assert background.close() is False
    assert heard.get(timeout=WAIT).running == ("deaf",)
    told = heard.get(timeout=WAIT)
    assert told.scope == "bg"
    assert "gate.hold()" in told.stacks["deaf"]
    gate.opened.set()
    late = heard.get(timeout=WAIT)
    assert (late.task, late.error) == ("deaf", error)


def test_close_tells_by_name_what_it_cut(heard):
    """Work that was promised to outlive its request does not vanish without a word."""
    started = threading.Event()

    def stays():
        started.set()
        sleep(WAIT)

    background = BackgroundScope(max_threads=1, drain_timeout=0.02, name="bg")
    background.spawn(stays, name="audit")
    assert started.wait(WAIT)
    background.spawn(str, name="billing")
    background.spawn(str, name="mail")
    assert background.close() is False
    told = heard.get(timeout=WAIT)
    assert (told.scope, told.running, sorted(told.waiting)) == ("bg", ("audit",), ["billing", "mail"])


def test_a_cancelled_background_scope_takes_no_more_work():
    """Its own token ends it as close() does; nothing is taken that would never run."""
    background = BackgroundScope(name="bg")
    background.token.cancel("enough")
    with pytest.raises(ScopeClosed, match=r"bg.*cancelled") as caught:
        background.spawn(str)
    assert caught.value.reason is background.token.reason
    background.close()


def test_closing_from_a_task_of_its_own_is_an_error():
    """It would wait for itself."""
    with BackgroundScope(name="bg") as background:
        task = background.spawn(background.close)
        with pytest.raises(RuntimeError, match="wait for itself"):
            task.result(WAIT)


def test_close_is_no_checkpoint():
    """A cancelled thread that shuts the process down still drains the background."""
    gate = Gate()
    with ThreadScope() as scope:
        background = BackgroundScope()
        task = background.spawn(gate.hold, "done")
        scope.cancel()
        threading.Thread(target=lambda: (gate.arrived.wait(WAIT), gate.opened.set())).start()
        assert background.close() is True
    assert task.result() == "done"


def test_spawns_beside_a_close_are_run_or_refused():
    """Whatever close() did not refuse has ended when it returns."""
    for _ in range(50):
        background = BackgroundScope()
        together, accepted = threading.Barrier(3, timeout=WAIT), []

        def spawn_until_refused(background=background, together=together, accepted=accepted):
            together.wait()
            try:
                while True:
                    accepted.append(background.spawn(str))
            except ScopeClosed:
                return

        spawners = [threading.Thread(target=spawn_until_refused) for _ in range(2)]
        for spawner in spawners:
            spawner.start()
        together.wait()
        assert background.close() is True
        for spawner in spawners:
            spawner.join(WAIT)
        assert all(task.done() for task in accepted)


def test_nothing_is_kept_of_finished_work():
    """A scope for the life of the process must not grow, also not by what had to wait."""
    refs = []

    class Payload:
        pass

    with BackgroundScope(max_threads=1) as background:
        for _ in range(50):
            payload = Payload()
            task = background.spawn(lambda value: value, payload)
            refs += [weakref.ref(payload), weakref.ref(task), weakref.ref(task.token)]
        task.result(WAIT)
        del payload, task
        end = time.monotonic() + WAIT
        while any(ref() for ref in refs):
            assert time.monotonic() < end
            gc.collect()


def test_waiting_work_does_not_keep_the_request_alive():
    """What waits in the queue holds a copy of the context, but not the request's scope and token in it."""
    gate, refs = Gate(), []
    with BackgroundScope(max_threads=1) as background:
        background.spawn(gate.hold)
        with ThreadScope() as request:
            background.spawn(str)
            refs += [weakref.ref(request), weakref.ref(request.token)]
        del request
        gc.collect()
        assert not any(ref() for ref in refs)
        gate.opened.set()


def test_a_process_that_closes_its_background_scope_exits_promptly():
    """And one that forgets to is not kept by it."""
    for close in ("background.close()", "pass"):
        began = time.monotonic()
        code = f"""
            from tokenscope import BackgroundScope, sleep
            background = BackgroundScope(drain_timeout=0.05)
            background.spawn(sleep, 60)
            {close}
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=WAIT)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("setting", "bad", "error"),
    [
        ("capacity", 0, ValueError),
        ("capacity", -1, ValueError),
        ("capacity", 1.5, TypeError),
        ("capacity", None, TypeError),
        ("capacity", True, TypeError),
        ("max_threads", 0, ValueError),
        ("max_threads", "4", TypeError),
        ("max_threads", None, TypeError),
        ("drain_timeout", -1, ValueError),
        ("drain_timeout", float("nan"), ValueError),
        ("drain_timeout", "1", TypeError),
        ("name", 5, TypeError),
        ("name", None, TypeError),
    ],
)
def test_a_bad_setting_is_an_error_when_the_scope_is_made(setting, bad, error):
    """The error names the setting and shows the value."""
    with pytest.raises(error, match=setting) as caught:
        BackgroundScope(**{setting: bad})
    assert repr(bad) in str(caught.value)


def test_spawning_what_cannot_be_called_is_an_error_at_the_call():
    """Nothing is taken."""
    with BackgroundScope() as background:
        for bad in (None, 5, "str"):
            with pytest.raises(TypeError, match="callable"):
                background.spawn(bad)
        with pytest.raises(TypeError, match="name"):
            background.spawn(str, name=5)
