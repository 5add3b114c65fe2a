"""Functions in a process of their own: results and errors come back, and a cancel kills."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import traceback
from pathlib import Path

import jobs
import pytest
from shells import WAIT, Program, children, has_no_children, is_living, until

from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    TaskCancelled,
    ThreadScope,
    fail_after,
    process,
    use_token,
)
from tokenscope._core.current import uninterruptible
from tokenscope.process import OffloadError, _forkserver, _pool, _wire, offload


@pytest.fixture(autouse=True)
def _own_pool():
    """Each test has a fresh pool, and leaves none."""
    yield
    _pool.pool().close()
    assert has_no_children()


class Call:
    """A call on a thread of its own, under a token of its own."""

    def __init__(self, fn, *args, **options):
        self.token = CancellationToken()
        self._outcome = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(fn, *args), kwargs=options)
        self._thread.start()

    def _run(self, *args, **options):
        try:
            with use_token(self.token):
                self._outcome.put(offload(*args, **options))
        except BaseException as error:
            self._outcome.put(error)

    def outcome(self):
        found = self._outcome.get(timeout=WAIT)
        self._thread.join(WAIT)
        return found


def functions_of(thread):
    """The names of the functions that it is in."""
    frame = sys._current_frames().get(thread.ident)
    return [summary.name for summary in traceback.extract_stack(frame)]


# --- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "grüße", {"a": [1, 2]}, b"x" * 3_000_000], ids=["none", "text", "dict", "big"])
def test_arguments_go_there_and_a_result_comes_back(value):
    """Also what is larger than a socket holds."""
    assert offload(jobs.echo, value, 2) == (value, 2)


def test_it_runs_in_another_process_which_is_used_again():
    """Two calls, one process: the second finds it warm."""
    first = offload(jobs.here)
    assert first != os.getpid()
    assert offload(jobs.here) == first


def test_an_exception_comes_back_with_its_traceback():
    """Its type is its own; where it was raised, and what caused it, is in a note."""
    with pytest.raises(LookupError, match="outer") as caught:
        offload(jobs.raise_caused, name="search")
    (note,) = caught.value.__notes__
    assert note.startswith("In the process of offload search:\n")
    assert "in raise_caused" in note
    assert "KeyError: 'inner'" in note
    assert "_worker.py" not in note


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (jobs.raise_difficult, r"raised: .*Difficult: one and two.*cannot be pickled.*missing"),
        (jobs.raise_unpicklable, r"raised: LookupError: not found.*cannot be pickled.*lock"),
        (jobs.raise_only_there, r"raised: .*OnlyThere: there"),
        (jobs.return_lock, r"returned a lock, which cannot be pickled"),
        (jobs.return_only_there, r"cannot be unpickled here: only there"),
        (jobs.leave_through_the_door, r"raised what ends a process: SystemExit: bye"),
        (jobs.interrupt, r"raised what ends a process: KeyboardInterrupt"),
    ],
)
def test_what_cannot_come_back_is_told_in_words(fn, words):
    """An exception or a result that does not pickle, and what is no `Exception`: an error that says what it was."""
    with pytest.raises(OffloadError, match=words) as caught:
        offload(fn)
    assert caught.value.returncode is None
    if fn is not jobs.return_only_there:
        assert "In the process" in caught.value.__notes__[0]


def test_a_cancel_of_the_functions_own_is_no_cancel_of_the_caller():
    """A `Cancelled` from there would be a lie here: it is a TaskCancelled with its reason."""
    with pytest.raises(TaskCancelled, match="'mine'") as caught:
        offload(jobs.cancel_oneself)
    assert (caught.value.reason.message, caught.value.reason.tag) == ("no more", "t")


def test_an_error_of_ours_pickles():
    """An offloaded function may offload."""
    again = pickle.loads(pickle.dumps(OffloadError("died", -9)))
    assert (str(again), again.returncode) == ("died", -9)


def test_the_function_may_offload_itself():
    """A worker has a pool of its own, which ends with it."""
    inner = offload(offload, jobs.here)
    assert inner not in (os.getpid(), offload(jobs.here))
    until(lambda: not is_living(inner))


def test_it_finds_path_arguments_and_folder_of_its_caller(monkeypatch, tmp_path):
    """As they are at the call, also in a process that is used again."""
    offload(jobs.here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", "--flag"])
    monkeypatch.syspath_prepend("/no/such/folder")
    path, argv, folder = offload(jobs.surroundings)
    assert (path[0], argv, folder) == ("/no/such/folder", ["program", "--flag"], str(tmp_path))


def test_nothing_of_the_token_gets_there():
    """The function runs outside of all scopes; its end is the kill."""
    with fail_after(60, name="outer"):
        assert offload(jobs.token_here, timeout=50) == (None, "outside")


# --- bad calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "options", "kind", "message"),
    [
        ((3,), {}, TypeError, "fn must be callable, not 3"),
        ((lambda: 0,), {}, TypeError, r"fn=<function .*lambda.* cannot be pickled .*importable by its name"),
        ((jobs.echo, 1, threading.Lock()), {}, TypeError, r"args\[1\]=.*lock.* cannot be pickled"),
        ((jobs.echo,), {"timeout": -1}, ValueError, "timeout"),
        ((jobs.echo,), {"timeout": "soon"}, TypeError, "timeout"),
        ((jobs.echo,), {"name": 3}, TypeError, "name"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_started(args, options, kind, message):
    """An error at the call, with the argument and its value."""
    with pytest.raises(kind, match=message):
        offload(*args, **options)
    assert has_no_children()


def test_a_cancelled_caller_starts_nothing():
    """The call is a checkpoint before anything is begun."""
    token = CancellationToken()
    token.cancel()
    with use_token(token), pytest.raises(Cancelled):
        offload(jobs.here)
    assert has_no_children()


# --- cancelled ---------------------------------------------------------------------------------------------------


def test_a_deadline_kills_what_holds_the_interpreter(tmp_path):
    """A regular expression that nothing in its own process could stop: DeadlineExceeded, and it is gone."""
    assert offload(pow, 2, 2) == 4  # the time goes to the expression, not to the first process of the pool
    call = Call(jobs.hold_the_gil, tmp_path / "pid", timeout=2, name="regex")
    error = call.outcome()
    assert type(error) is DeadlineExceeded
    assert "regex" in str(error)
    assert not is_living(jobs.announced(tmp_path / "pid"))


def test_a_cancel_kills_exactly_its_worker_and_all_that_it_started(tmp_path):
    """Group, other sessions, deaf to TERM: gone when `Cancelled` is raised. A call beside it goes on."""
    beside = Call(jobs.meet, tmp_path, 2)
    call = Call(jobs.hang_with_children, tmp_path.parent / f"{tmp_path.name}-pid")
    path = tmp_path.parent / f"{tmp_path.name}-pid"
    victims = [jobs.announced(f"{path}.{who}") for who in ("own", "child", "session")]
    assert all(map(is_living, victims))
    call.token.cancel("stop", kind="stopped")
    error = call.outcome()
    assert type(error) is Cancelled
    assert error.reason is call.token.reason
    assert not any(map(is_living, victims))
    (tmp_path / "second").touch()
    assert is_living(beside.outcome())


def test_a_cancel_kills_a_worker_that_does_not_take_its_argument():
    """More than a socket holds, for a process that reads nothing: the caller is blocked in sending, and comes back."""
    pid = offload(jobs.here)
    os.kill(pid, signal.SIGSTOP)
    call = Call(jobs.echo, b"x" * 8_000_000)
    until(lambda: not _pool.pool()._idle, "the call to have its worker")
    until(lambda: "_send" in functions_of(call._thread), "the call to be sending")
    call.token.cancel()
    error = call.outcome()
    assert type(error) is Cancelled
    assert not is_living(pid)


def test_a_cancel_continues_a_fork_server_that_somebody_has_stopped(tmp_path):
    """Only the fork server can end a worker; stopped, it would keep the cancelled caller for ever."""
    call = Call(jobs.hang, tmp_path / "pid")
    pid = jobs.announced(tmp_path / "pid")
    (server,) = children()
    os.kill(server, signal.SIGSTOP)
    call.token.cancel()
    assert type(call.outcome()) is Cancelled
    assert not is_living(pid)
    assert children() == [server]


def test_the_pool_closes_though_its_fork_server_was_stopped():
    """It is continued, and leaves."""
    offload(jobs.here)
    (server,) = children()
    _pool.pool()._idle.pop().end()
    os.kill(server, signal.SIGSTOP)
    os.waitid(os.P_PID, server, os.WSTOPPED | os.WNOWAIT)
    closing = threading.Thread(target=_pool.pool().close)
    closing.start()
    closing.join(WAIT)
    assert not is_living(server)


def test_a_killed_worker_is_replaced(tmp_path):
    """The next call runs, in another process."""
    first = offload(jobs.here)
    with pytest.raises(DeadlineExceeded):
        offload(jobs.hang, tmp_path / "pid", timeout=0.1)
    assert not is_living(first)
    assert offload(jobs.here) != first


def test_a_result_that_is_there_is_not_cut():
    """A cancel that comes between the answer and its reader is too late."""
    token = CancellationToken()
    with use_token(token):
        worker = _pool.pool().take()
        request = pickle.dumps(({}, pickle.dumps((jobs.echo, (1,)))))
        worker._send(_wire.header(request) + request, token)
        until(lambda: not worker.is_there())  # that is: there is something to read
        token.cancel()
        assert worker._receive(_wire.HEADER.size, token)
        worker.end()


def test_an_uninterruptible_section_is_not_cut():
    """In a cleanup, a cancel from outside does not reach the call; its own limit does."""
    token = CancellationToken()
    with use_token(token), uninterruptible():
        token.cancel()
        assert offload(jobs.echo, 1) == (1,)
    with pytest.raises(DeadlineExceeded), uninterruptible(0.05):
        offload(signal.pause)


def test_a_failing_sibling_ends_the_call(tmp_path):
    """In a scope it is work like any other."""
    with pytest.raises(ExceptionGroup), ThreadScope() as scope:
        scope.spawn(offload, jobs.hang, tmp_path / "pid")
        pid = jobs.announced(tmp_path / "pid")
        scope.spawn(int, "x")
    assert not is_living(pid)


def test_cancels_at_random_moments_leave_nothing_behind():
    """A result or `Cancelled`, nothing else; no process stays but those that are kept."""
    randoms = random.Random(5)
    outcomes = []
    for _ in range(40):
        call = Call(jobs.here)
        threading.Event().wait(randoms.random() * 0.006)
        call.token.cancel()
        outcomes.append(call.outcome())
    assert {type(outcome) for outcome in outcomes} <= {int, Cancelled}
    kept = {offload(jobs.here)}
    assert {pid for pid in outcomes if isinstance(pid, int) and is_living(pid)} <= kept


# --- the pool ----------------------------------------------------------------------------------------------------


def test_so_many_at_once_as_are_called_and_so_many_kept_as_is_said(tmp_path):
    """Concurrency has no limit; idle workers have."""
    count = _pool.KEPT + 2
    calls = [Call(jobs.meet, tmp_path, count) for _ in range(count)]
    pids = {call.outcome() for call in calls}
    assert len(pids) == count
    assert len(_pool.pool()._idle) == _pool.KEPT
    assert sum(map(is_living, pids)) == _pool.KEPT


@pytest.mark.parametrize("what", jobs.ENDS)
def test_a_worker_that_dies_is_an_error_with_its_status(what):
    """Exit code or signal are named; the next call works."""
    with pytest.raises(OffloadError, match=what) as caught:
        offload(jobs.ENDS[what], name="risky")
    assert "risky" in str(caught.value)
    assert caught.value.returncode == {"exit code 3": 3, "signal 40": -40}.get(what) or -getattr(signal, what)
    assert offload(jobs.echo) == ()


def test_a_worker_that_closes_its_descriptors_hangs_nobody():
    """It cannot answer any more: it is ended and told."""
    with pytest.raises(OffloadError):
        offload(jobs.close_everything)


def test_a_worker_that_dies_and_leaves_a_daemon_hangs_nobody(tmp_path):
    """The daemon still holds the worker's socket open; the fork server tells of the end."""
    with pytest.raises(OffloadError, match="exit code 3"):
        offload(jobs.die_beside_a_daemon, tmp_path / "pid")
    os.kill(jobs.announced(tmp_path / "pid"), signal.SIGKILL)


def test_fork_server_and_workers_are_out_of_the_terminals_reach():
    """Each leads a session of its own."""
    for who in (offload(jobs.here), offload(os.getppid)):
        assert os.getsid(who) == who


def test_closing_the_pool_ends_calls_that_run(tmp_path):
    """Busy workers end with their fork server, and the callers are told."""
    call = Call(jobs.hang, tmp_path / "pid")
    pid = jobs.announced(tmp_path / "pid")
    _pool.pool().close()
    assert type(call.outcome()) is OffloadError
    assert not is_living(pid)


def test_an_idle_worker_that_was_killed_is_not_used():
    """The system may need its memory: the next call has another one."""
    first = offload(jobs.here)
    os.kill(first, signal.SIGKILL)
    until(lambda: not _pool.pool()._idle[0].is_there())
    assert offload(jobs.here) != first


def test_a_killed_fork_server_takes_its_workers_along_and_is_replaced(tmp_path):
    """A call that runs is an error, its process is gone, and the next call has a new server."""
    call = Call(jobs.hang, tmp_path / "pid")
    pid = jobs.announced(tmp_path / "pid")
    (server,) = children()
    os.kill(server, signal.SIGKILL)
    error = call.outcome()
    assert type(error) is OffloadError
    assert "fork server" in str(error)
    until(lambda: not is_living(pid))
    assert offload(jobs.echo) == ()
    assert server not in children()


def test_a_killed_fork_server_is_replaced_once_for_all_who_notice(tmp_path):
    """Several threads that find it dead agree on one new server: nobody ends the workers of another."""
    offload(jobs.here)
    (server,) = children()
    os.kill(server, signal.SIGKILL)
    until(lambda: not is_living(server) and not _pool.pool()._idle[0].is_there())
    calls = [Call(jobs.meet, tmp_path, 4) for _ in range(4)]
    assert len({call.outcome() for call in calls}) == 4
    assert len(children()) == 1


def test_what_a_function_leaves_running_ends_with_its_call():
    """A process with a thread or a child that is still there is not used again."""
    with_thread = offload(jobs.leave_a_thread)
    assert not is_living(with_thread)
    assert not any(map(is_living, offload(jobs.leave_a_process)))


def test_a_fork_that_fails_is_told(monkeypatch):
    """The owner reads why there is no process."""
    monkeypatch.setattr(os, "fork", lambda: (_ for _ in ()).throw(BlockingIOError(11, "no more processes")))
    with contextlib.ExitStack() as stack:
        control, job, line, told = map(stack.enter_context, (*socket.socketpair(), *socket.socketpair()))
        assert _forkserver.ForkServer(control)._fork(job, line) is None
        ended = pickle.loads(_wire.receive(told))
    assert "no more processes" in ended.trouble


# --- interrupts, forks, the end ----------------------------------------------------------------------------------


def program(tmp_path, code, *flags):
    """A program in a file and a process group of its own, as a shell starts it."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(code))
    started = Program("")
    started.finish()
    started.process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", *flags, str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0, env=jobs.with_jobs(),
    )  # fmt: skip
    return started


def test_ctrl_c_kills_the_call_and_no_worker_complains(tmp_path):
    """The terminal sends SIGINT to its whole group: one KeyboardInterrupt, no tracebacks, nobody left."""
    running = program(
        tmp_path,
        f"""
        import jobs
        from tokenscope.process import offload
        if __name__ == "__main__":
            print(offload(jobs.here), flush=True)
            try:
                offload(jobs.hang, {str(tmp_path / "pid")!r})
            except KeyboardInterrupt:
                print("interrupted", offload(jobs.echo), flush=True)
        """,
    )
    running.line()
    pid = jobs.announced(tmp_path / "pid")
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.finish() == (0, "interrupted ()\n", "")
    assert not is_living(pid)


def test_when_the_owner_is_killed_its_workers_leave(tmp_path):
    """Idle or in the middle of a call, and although a forked child of the owner lives on."""
    running = program(
        tmp_path,
        f"""
        import os, threading, jobs
        from tokenscope.process import offload
        if __name__ == "__main__":
            threading.Thread(target=offload, args=(jobs.hang, {str(tmp_path / "pid")!r})).start()
            jobs.announced({str(tmp_path / "pid")!r})
            print(offload(jobs.here), flush=True)
            forked = os.fork()
            if forked == 0:
                jobs.hang({str(tmp_path / "forked")!r})
            print(forked, flush=True)
            os.wait()
        """,
        "-W",
        "ignore::DeprecationWarning",  # of a fork in a program with threads
    )
    busy, idle, forked = jobs.announced(tmp_path / "pid"), int(running.line()), int(running.line())
    jobs.announced(tmp_path / "forked")
    os.kill(running.process.pid, signal.SIGKILL)
    until(lambda: not is_living(busy) and not is_living(idle))
    assert is_living(forked)
    os.kill(forked, signal.SIGKILL)
    running.finish()


def test_a_forked_process_has_a_pool_of_its_own(tmp_path):
    """After a fork (gunicorn's preload) each of the two calls its own workers."""
    running = program(
        tmp_path,
        """
        import os, jobs
        from tokenscope.process import offload
        if __name__ == "__main__":
            first = offload(jobs.here)
            if os.fork() == 0:
                assert offload(jobs.here) not in (first, os.getpid())
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
            assert offload(jobs.here) == first
            print(first)
        """,
    )
    status, out, err = running.finish()
    assert (status, err) == (0, "")
    until(lambda: not is_living(int(out)))


def test_where_no_fork_hooks_run_the_first_call_sees_the_fork(monkeypatch):
    """A pool of another process is not used, and its sockets are closed here."""
    theirs = _pool.Pool()
    socket_of_theirs, other = theirs._pair()
    monkeypatch.setattr(_pool, "_pools", {os.getpid() + 1: theirs})
    assert offload(jobs.echo) == ()
    assert list(_pool._pools) == [os.getpid()]
    assert (socket_of_theirs.fileno(), other.fileno()) == (-1, -1)
    _pool.pool().close()  # while it is in its place


def test_the_end_of_the_interpreter_is_clean(tmp_path):
    """Warnings are errors, and a daemon thread is in the middle of a call: no word, and nobody left."""
    running = program(
        tmp_path,
        f"""
        import threading, jobs
        from tokenscope.process import offload
        if __name__ == "__main__":
            threading.Thread(target=offload, args=(jobs.hang, {str(tmp_path / "pid")!r}), daemon=True).start()
            print(offload(jobs.here), jobs.announced({str(tmp_path / "pid")!r}))
        """,
    )
    status, out, err = running.finish()
    assert (status, err) == (0, "")
    until(lambda: not any(is_living(int(pid)) for pid in out.split()))


# --- __main__ ----------------------------------------------------------------------------------------------------


def test_a_function_of_the_program_itself_runs_behind_a_guard(tmp_path):
    """What stands in `__main__` is found, and what is guarded does not run twice."""
    code = """
        from tokenscope.process import offload
        class Word(str): ...
        def mine(word):
            print("there", flush=True)
            return Word(word + "!")
        if __name__ == "__main__":
            print(type(offload(mine, Word("hi"))) is Word, offload(mine, "ho"))
    """
    assert program(tmp_path, code).finish() == (0, "there\nthere\nTrue ho!\n", "")


def test_a_program_without_a_guard_is_told(tmp_path):
    """Instead of starting processes for ever."""
    code = """
        from tokenscope.process import OffloadError, offload
        def mine(): ...
        try:
            offload(mine)
        except OffloadError as error:
            print(error)
    """
    status, out, _err = program(tmp_path, code).finish()
    assert status == 0
    assert re.search(r"could not make its process like .*: RuntimeError: .*if __name__ == '__main__'", out)


def test_a_function_of_a_module_needs_no_guard(tmp_path):
    """`__main__` is left alone unless something of it is needed."""
    code = "import jobs\nfrom tokenscope.process import offload\nprint(offload(jobs.echo, 1))\n"
    assert program(tmp_path, code).finish() == (0, "(1,)\n", "")


def test_a_function_that_is_not_there_is_told():
    """What was typed into a prompt has no file it could be loaded from."""
    running = Program("""
        from tokenscope import process
        def mine(): ...
        try:
            process.offload(mine)
        except process.OffloadError as error:
            print(error)
    """)
    status, out, err = running.finish()
    assert (status, err) == (0, "")
    assert re.search("could not load the function or its arguments: AttributeError: .*'mine'", out)


def test_the_house_is_light():
    """Whoever imports processes has not yet loaded multiprocessing."""
    code = "import sys, tokenscope, tokenscope.process; print('multiprocessing' in sys.modules)"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # coverage loads it
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=bare) == "False\n"
    assert Path(process.__file__).name == "__init__.py"
