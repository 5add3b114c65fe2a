"""Processes under a token: as `subprocess` when all is well, ended with all that they started when not."""

from __future__ import annotations

import os
import queue
import random
import signal
import subprocess
import threading
import time
import warnings

import pytest
from shells import DEAF, SLEEPER, WAIT, Program, children, has_no_children, is_living, living, python, until

from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    ScopeClosed,
    TaskCancelled,
    ThreadScope,
    current_token,
    fail_after,
    move_on_after,
    process,
    use_token,
)
from tokenscope._core import events
from tokenscope._core.current import uninterruptible
from tokenscope.process import _child, _pipes, _tree, _waiting

PIPE = process.PIPE
SH = {"shell": True, "stdout": PIPE, "text": True}


def started(command=SLEEPER, **options):
    """A process that has said that it is ready."""
    proc = process.Popen(command, **{**SH, **options})
    assert proc.stdout.readline() in ("ready\n", b"ready\n")
    return proc


def cancelled_at(token, command, block, **options):
    """Block on a process under a token, cancel when it blocks; the process and what was raised."""
    caught = queue.Queue()

    def work():
        try:
            with use_token(token), started(command, **options) as proc:
                caught.put(proc)
                caught.put(block(proc))
        except BaseException as error:
            caught.put(error)

    thread = threading.Thread(target=work)
    thread.start()
    proc = caught.get(timeout=WAIT)
    token.cancel("stop", kind="stopped")
    error = caught.get(timeout=WAIT)
    thread.join(WAIT)
    return proc, error


# --- as subprocess -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (["true"], {}),
        (["sh", "-c", "exit 3"], {}),
        (["sh", "-c", "kill -9 $$"], {"capture_output": True}),
        ("echo out; echo err >&2", {"shell": True, "capture_output": True}),
        ("echo out; echo err >&2", {"shell": True, "stdout": PIPE, "stderr": process.STDOUT, "text": True}),
        (["cat"], {"input": b"x" * 300_000, "capture_output": True}),
        (["cat"], {"input": "grüße\r\nzwei\n", "capture_output": True, "encoding": "utf-8"}),
        (["cat"], {"input": "grüße", "capture_output": True, "encoding": "latin-1", "bufsize": 0}),
        (["true"], {"input": b"x" * 300_000, "stdout": PIPE}),
        (["cat"], {"input": "", "stdout": PIPE, "text": True}),
        (["env"], {"env": {"A": "1"}, "stdout": PIPE}),
        (["pwd"], {"cwd": "/", "stdout": PIPE}),
        (["head", "-c", "1000000", "/dev/zero"], {"stdout": PIPE, "stderr": PIPE}),
        ("head -c 200000 /dev/zero; head -c 200000 /dev/zero >&2", {"shell": True, "capture_output": True}),
    ],
)
def test_run_answers_as_subprocess_run(args, options):
    """Status and output are the same, with text, bytes, input, and more than a pipe holds."""
    assert vars(process.run(args, **options)) == vars(subprocess.run(args, check=False, **options))


@pytest.mark.parametrize(
    ("args", "options", "kind"),
    [
        (["no-such-program"], {}, FileNotFoundError),
        (["true"], {"cwd": "/no/such/folder"}, FileNotFoundError),
        (["sh", "-c", "echo x; exit 3"], {"check": True, "capture_output": True}, process.CalledProcessError),
        (["true"], {"input": b"", "stdin": PIPE}, ValueError),
        (["true"], {"capture_output": True, "stderr": PIPE}, ValueError),
        (["true"], {"no_such_option": 1}, TypeError),
    ],
)
def test_run_fails_as_subprocess_run(args, options, kind):
    """The same errors, with the same status and output."""
    with pytest.raises(kind) as theirs:
        subprocess.run(args, **options)  # noqa: PLW1510
    with pytest.raises(kind) as ours:
        process.run(args, **options)
    if kind is not TypeError:
        assert (str(ours.value), vars(ours.value)) == (str(theirs.value), vars(theirs.value))


def test_a_pipeline_as_in_the_manual():
    """The output of one process is the input of another, which finds an ordinary blocking pipe."""
    with process.Popen(["echo", "a needle"], stdout=PIPE) as first:
        with process.Popen(["cat"], stdin=first.stdout, stdout=PIPE) as second:
            first.stdout.close()
            assert second.communicate() == (b"a needle\n", None)
    assert (first.returncode, second.returncode) == (0, 0)


def test_talking_line_by_line():
    """Writing and reading text in turns works, and closing standard input ends `cat`."""
    with process.Popen(["cat"], stdin=PIPE, bufsize=1, **{**SH, "shell": False}) as proc:
        for line in ("one\n", "two\n"):
            proc.stdin.write(line)
            assert proc.stdout.readline() == line
        proc.stdin.close()
        assert list(proc.stdout) == []
    assert proc.returncode == 0


def test_communicate_goes_on_after_its_time_was_up():
    """A wait that ran out of time changes nothing, and what was written before is flushed."""
    with process.Popen(["cat"], stdin=PIPE, stdout=PIPE) as proc:
        proc.stdin.write(b"one")
        with pytest.raises(process.TimeoutExpired) as caught:
            proc.wait(0.05)
        assert caught.value.timeout == 0.05
        assert proc.communicate(b"two") == (b"onetwo", None)


def test_input_is_taken_once():
    """Once the talk has begun, more input is an error, as in subprocess."""
    with process.Popen("cat; echo more; sleep 0.2", stdin=PIPE, **SH) as proc:
        with pytest.raises(process.TimeoutExpired) as caught:
            proc.communicate("one\n", timeout=0.02)
        assert caught.value.stdout in (b"one\nmore\n", b"one\n", b"")
        with pytest.raises(ValueError, match="after starting"):
            proc.communicate("x")
        assert proc.communicate() == ("one\nmore\n", None)


def test_poll_and_wait_tell_the_status():
    """None while it runs, then the status; again and again."""
    with started() as proc:
        assert proc.poll() is None
        with pytest.raises(process.TimeoutExpired):
            proc.wait(0)
        proc.kill()
        assert proc.wait() == proc.wait(timeout=0) == proc.poll() == proc.returncode == -9


def test_terminate_reaches_the_group_and_send_signal_the_process_alone():
    """A shell that is told to stop takes its children with it."""
    with started("trap 'echo heard' USR1; echo ready; sleep 1000 & wait; wait") as proc:
        proc.send_signal(signal.SIGUSR1)
        assert proc.stdout.readline() == "heard\n"
        proc.terminate()
        proc.wait()
    assert living(proc.pid) == []
    proc.terminate()
    proc.kill()
    proc.send_signal(signal.SIGTERM)  # nothing: its number may be somebody else's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grace": -1}, "grace"),
        ({"grace": None}, "grace"),
        ({"grace": float("inf")}, "grace"),
        ({"grace": "soon"}, "grace"),
        ({"token": "mine"}, "token"),
        ({"process_group": 0}, "process_group=0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    """An error at the call names the argument and its value; nothing is started."""
    with pytest.raises((ValueError, TypeError), match=message):
        process.Popen(["true"], **options)
    assert has_no_children()


@pytest.mark.parametrize("timeout", ["x", True, float("nan"), 1j])
def test_a_bad_timeout_is_named_before_anything_starts(timeout, tmp_path):
    """`run` refuses it at once; `wait` and `communicate` do, and leave the process alone."""
    trace = tmp_path / "trace"
    with pytest.raises((ValueError, TypeError), match="timeout must be"):
        process.run(["touch", str(trace)], timeout=timeout)
    assert not trace.exists()
    with process.Popen(["cat"], stdin=PIPE) as child:
        for ask in (child.wait, lambda timeout: child.communicate(timeout=timeout)):
            with pytest.raises((ValueError, TypeError), match="timeout must be"):
                ask(timeout)
        assert child.poll() is None


def test_a_negative_timeout_is_no_time_at_all():
    """As in `subprocess`."""
    with process.Popen(["cat"], stdin=PIPE) as child:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(-1)


@pytest.mark.parametrize(("given", "text"), [("a str", False), (5, False), (b"bytes", True), (5, True)])
def test_an_input_of_the_wrong_kind_is_named(given, text):
    """The error says what the pipe takes; nothing is left running."""
    with pytest.raises(TypeError, match=f"input must be .* not {given!r}"):
        process.run(["cat"], input=given, text=text)
    assert has_no_children()


# --- cancelled ---------------------------------------------------------------------------------------------------


BLOCKS = {
    "wait": lambda p: p.wait(),
    "wait with a timeout": lambda p: p.wait(1000),
    "communicate": lambda p: p.communicate(),
    "readline": lambda p: p.stdout.readline(),
    "iteration": lambda p: list(p.stdout),
    "read": lambda p: p.stdout.read(),
    "write": lambda p: p.stdin.write("x" * 1_000_000),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_cancel_ends_the_group_and_the_blocked_call(block):
    """Whatever its owner is blocked in raises `Cancelled` with the reason, after everything is gone."""
    token = CancellationToken()
    proc, error = cancelled_at(token, "echo ready; sleep 1000 & sleep 1000", block, stdin=PIPE)
    assert type(error) is Cancelled
    assert error.reason is token.reason
    assert living(proc.pid) == []
    assert proc.poll() == -15
    assert has_no_children()


@pytest.mark.parametrize("block", [BLOCKS["wait"], BLOCKS["iteration"]], ids=["wait", "iteration"])
def test_a_tool_that_forks_and_ignores_term_is_gone_after_the_grace(block):
    """KILL reaches the whole group, also those who do not hear TERM."""
    began = time.monotonic()
    proc, error = cancelled_at(CancellationToken(), DEAF, block, grace=0.1)
    assert type(error) is Cancelled
    assert living(proc.pid) == []
    assert proc.returncode == -9
    assert 0.1 <= time.monotonic() - began < WAIT


def test_grace_zero_kills_at_once():
    """Who does not want to wait need not."""
    proc, error = cancelled_at(CancellationToken(), DEAF, BLOCKS["wait"], grace=0)
    assert (type(error), proc.returncode, living(proc.pid)) == (Cancelled, -9, [])


def test_a_stopped_process_is_ended_too():
    """TERM is followed by CONT: who is stopped hears it."""
    token = CancellationToken()
    with use_token(token), pytest.raises(Cancelled):
        with started("trap 'exit 5' TERM; echo ready; kill -STOP $$; sleep 1000", grace=1000) as proc:
            until(lambda: _state(proc.pid) == "T")
            token.cancel()
            proc.wait()
    assert proc.returncode == 5


def _state(pid):
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()[0]


def test_a_grandchild_in_a_session_of_its_own_is_found_by_its_parent():
    """What called setsid is ended too, as long as the chain of its parents is there."""
    token = CancellationToken()
    with use_token(token), pytest.raises(Cancelled):
        inner = python("import os; os.setsid(); print(os.getpid(), flush=True); import time; time.sleep(1000)")
        outer = python(f"import subprocess; subprocess.run({inner!r})")
        with process.Popen(outer, stdout=PIPE, text=True) as proc:
            grandchild = int(proc.stdout.readline())
            assert os.getsid(grandchild) == grandchild
            token.cancel()
            proc.wait()
    assert not is_living(grandchild)


def test_a_daemon_has_left_for_good():
    """The limit: a session of its own and no parent any more. It is left alone, and its pipe hangs nobody."""
    daemon = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            pid = os.fork()
            while pid == 0:
                time.sleep(1000)
            print(os.getpid(), pid, flush=True)  # before it ends: what is said after the group's end is not heard
            os._exit(0)
        os.wait()
    """
    done = process.run(python(daemon), capture_output=True, text=True)
    lived = [pid for pid in map(int, done.stdout.split()) if is_living(pid)]
    for pid in lived:
        os.kill(pid, signal.SIGKILL)
    assert len(lived) == 1
    assert done.returncode == 0


def test_a_daemon_that_floods_the_pipe_hangs_nobody():
    """What a stranger goes on writing is not read for ever."""
    flood = """
        import os
        if os.fork() == 0:
            os.setsid()
            pid = os.fork()
            while pid == 0:
                os.write(1, b"x" * 65536)
            os.write(2, b"%d\\n" % pid)  # before it ends: what is said after the group's end is not heard
            os._exit(0)
        os.wait()
    """
    with process.Popen(python(flood), stdout=PIPE, stderr=PIPE) as proc:
        pid = int(proc.stderr.readline())
        try:
            assert proc.communicate()[0].strip(b"x") == b""
        finally:
            os.kill(pid, signal.SIGKILL)


def test_of_a_pipe_that_does_not_dry_up_so_much_is_read_and_no_more(monkeypatch):
    """When all is over, the number of last reads is bounded: the rest stays in the pipe, which is closed."""
    monkeypatch.setattr(_pipes, "_CHUNK", 1000)
    monkeypatch.setattr(_pipes, "_LAST_READS", 3)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", buffering=0) as ours, os.fdopen(write_end, "wb", buffering=0) as strangers:
        strangers.write(bytes(10_000))
        talk = _pipes.Talk(None, ours, None, None)
        talk.finish()
        assert len(talk.so_far("stdout")) == 3000
        assert ours.closed


def test_a_background_job_that_holds_the_pipe_hangs_nobody(monkeypatch):
    """When the command has ended, what it left in its group is ended as well."""
    monkeypatch.setattr(_tree, "LINGER", 0.02)
    with process.Popen("echo hi; sleep 1000 & exit 3", shell=True, stdout=PIPE) as proc:
        assert proc.communicate() == (b"hi\n", None)
        assert proc.returncode == 3
        assert living(proc.pid) == []
    done = process.run("trap '' TERM; sleep 1000 & echo hi", shell=True, stdout=PIPE, grace=0.02)
    assert (done.returncode, done.stdout) == (0, b"hi\n")


def test_reading_to_the_end_does_not_wait_for_a_background_job(monkeypatch):
    """A loop over the lines ends when the command has ended and its group too."""
    monkeypatch.setattr(_tree, "LINGER", 0.02)
    with process.Popen("sleep 1000 & echo one; echo two", **SH) as proc:
        assert list(proc.stdout) == ["one\n", "two\n"]
    assert living(proc.pid) == []


def test_what_is_left_in_the_group_may_finish():
    """A `tee` behind a command, say, gets its time."""
    done = process.run("(sleep 0.05; echo late) & echo early", shell=True, capture_output=True, text=True)
    assert done.stdout.split() == ["early", "late"]


def test_poll_alone_ends_what_is_left(monkeypatch):
    """Nobody need wait: a worker sees to the rest of the group."""
    monkeypatch.setattr(_tree, "LINGER", 0.02)
    proc = process.Popen("sleep 1000 &", shell=True)
    until(lambda: proc.poll() is not None)
    until(lambda: living(proc.pid) == [])
    assert has_no_children()


def test_partial_output_stays_with_the_cancel():
    """The cause of `Cancelled` has the status and what was read until the end, last words included."""
    token = CancellationToken()
    command = "trap 'echo bye; exit 7' TERM; echo first; echo oops >&2; sleep 1000 & wait"
    caught = queue.Queue()

    def work():
        with use_token(token):
            try:
                process.run(command, shell=True, capture_output=True, text=True)
            except Cancelled as error:
                caught.put(error.__cause__)

    thread = threading.Thread(target=work)
    with heard_by(thread):
        until(children)
        token.cancel()
        cause = caught.get(timeout=WAIT)
    assert type(cause) is process.CalledProcessError
    assert (cause.returncode, cause.stdout, cause.stderr) in (
        (7, "first\nbye\n", "oops\n"),
        (-15, "", ""),  # the cancel was faster than the shell
    )


def heard_by(thread):
    class Running:
        def __enter__(self):
            thread.start()

        def __exit__(self, *_):
            thread.join(WAIT)

    return Running()


def test_a_timeout_keeps_all_that_was_said():
    """TimeoutExpired has the output until the end, also what came after TERM, more than a pipe holds."""
    command = "trap 'head -c 200000 /dev/zero; exit' TERM; echo ready; sleep 1000 & wait"
    with pytest.raises(process.TimeoutExpired) as caught:
        process.run(command, shell=True, capture_output=True, timeout=0.3, grace=WAIT)
    assert caught.value.timeout == 0.3
    assert len(caught.value.stdout) in (200_006, 0)
    assert caught.value.stderr == b""
    assert has_no_children()


def test_a_deadline_ends_it_and_is_told_by_its_owner():
    """The boundary raises DeadlineExceeded, as ever; there is time to start a process on a machine that is busy."""
    with pytest.raises(DeadlineExceeded) as caught, fail_after(0.5):
        process.run(["sleep", "1000"])
    assert type(caught.value.__cause__) is Cancelled
    assert caught.value.__cause__.__cause__.returncode == -15


def test_a_cancelled_caller_starts_nothing():
    """The call is a checkpoint before anything is begun."""
    token = CancellationToken()
    token.cancel()
    with use_token(token), pytest.raises(Cancelled):
        process.run(["true"])
    assert has_no_children()


def test_a_cancel_while_it_is_being_started_is_not_lost(monkeypatch):
    """Between the start and the first wait there is no gap."""
    token = CancellationToken()
    original = _tree.ProcessTree.__init__

    def late(self, *args):
        token.cancel()
        original(self, *args)

    monkeypatch.setattr(_tree.ProcessTree, "__init__", late)
    with use_token(token), pytest.raises(Cancelled):
        process.run(["sleep", "1000"])
    assert has_no_children()


def test_it_is_ended_although_nobody_waits_for_it():
    """The owner may be busy elsewhere; a worker ends the process."""
    token = CancellationToken()
    with use_token(token):
        proc = started(DEAF, grace=0.05)
    token.cancel()
    until(lambda: living(proc.pid) == [])
    until(has_no_children)
    with pytest.raises(TaskCancelled):
        proc.wait()
    assert proc.returncode == -9
    proc.stdout.close()


def test_a_process_that_ended_by_itself_is_not_cut():
    """Its status is told also after a cancel: nothing that was finished looks cut."""
    token = CancellationToken()
    with use_token(token), process.Popen(["true"]) as proc:
        until(lambda: proc.poll() is not None)
        token.cancel()
        assert proc.wait() == 0
        assert proc.communicate() == (None, None)


def test_reading_is_a_checkpoint_also_after_the_process_ended():
    """What it left in its pipe is not handed to cancelled work."""
    token = CancellationToken()
    with use_token(token), process.Popen(["echo", "hi"], stdout=PIPE) as proc:
        proc.wait()
        token.cancel()
        with pytest.raises(Cancelled):
            proc.stdout.read()


# --- whose it is -------------------------------------------------------------------------------------------------


def test_a_scope_ends_what_was_started_in_it():
    """Started by a child, waited for by nobody: gone when the scope is left."""
    with ThreadScope() as scope:
        proc = scope.spawn(started, DEAF, grace=0.05).result(WAIT)
        scope.spawn(started).result(WAIT).stdout.close()
        assert living(proc.pid)
    assert living(proc.pid) == []
    assert proc.wait() == -9
    proc.stdout.close()
    assert has_no_children()


def test_a_process_that_has_ended_is_not_kept_by_its_scope():
    """A scope that starts a thousand processes holds none of them."""
    with ThreadScope() as scope:
        for _ in range(3):
            process.run(["true"])
        nursery = scope.extension(_child.Nursery, _child.Nursery)
        assert nursery.children == set()
        assert len(scope._cleanups.items) == 1


def test_a_scope_that_has_ended_starts_nothing():
    """An orphan of it gets an error, and leaves no process behind."""
    caught = []

    def orphan():
        arrived.set()
        gate.wait(WAIT)
        try:
            with uninterruptible():
                process.Popen(["sleep", "1000"])
        except ScopeClosed as error:
            caught.append(error)
        over.set()

    arrived, gate, over = threading.Event(), threading.Event(), threading.Event()
    with pytest.raises(Exception, match="gave up"):
        with ThreadScope(on_straggler="abandon", grace=0.01) as scope:
            scope.spawn(orphan)
            arrived.wait(WAIT)
            scope.cancel()
    gate.set()
    assert over.wait(WAIT)
    assert len(caught) == 1
    assert has_no_children()


def test_somebody_elses_process_is_left_alone():
    """Who waits for it and is cancelled gets its `Cancelled`; the process goes on."""
    with started() as proc:
        for block in (proc.wait, proc.stdout.readline, proc.communicate):
            with move_on_after(0.02) as token:
                block()
            assert token.cancelled_caught
        assert proc.poll() is None
        proc.kill()


def test_the_owner_of_the_process_is_cancelled_and_not_the_one_who_waits():
    """A TaskCancelled, with the reason: a Cancelled would be a lie."""
    token = CancellationToken()
    with use_token(token):
        proc = started()
    threading.Timer(0.02, token.cancel).start()
    with pytest.raises(TaskCancelled) as caught:
        proc.wait()
    assert caught.value.reason is token.reason
    assert type(caught.value.__cause__) is process.CalledProcessError
    with pytest.raises(TaskCancelled):
        proc.stdout.readline()
    proc.stdout.close()


def test_an_explicit_token_is_added():
    """It ends the process, and so does the current one."""
    for which in (0, 1):
        mine, current = CancellationToken(), CancellationToken()
        with use_token(current), pytest.raises(Cancelled) as caught:
            with started(token=mine) as proc:
                (mine, current)[which].cancel()
                proc.wait()
        assert caught.value.reason is (mine, current)[which].reason


def test_an_uninterruptible_section_keeps_its_process():
    """Started in a commit or a cleanup: a cancel from outside does not reach it."""
    token = CancellationToken()
    with use_token(token), uninterruptible():
        with process.Popen(["cat"], stdin=PIPE, stdout=PIPE) as proc:
            token.cancel()
            assert proc.communicate(b"committed") == (b"committed", None)
    assert proc.returncode == 0


def test_a_cancel_is_put_off_while_an_uninterruptible_section_waits():
    """Started before, waited for inside: it is not cut there. What comes to block after it is."""
    token = CancellationToken()
    with use_token(token):
        proc = process.Popen(["cat"], stdin=PIPE, stdout=PIPE, text=True)
        with uninterruptible():
            helper = threading.Timer(0.02, lambda: (token.cancel(), os.write(proc.stdin.fileno(), b"ok\n")))
            with process_shielded(proc):
                helper.start()
                assert proc.stdout.readline() == "ok\n"
                helper.join(WAIT)
        with pytest.raises(Cancelled):
            proc.wait()
    assert proc.returncode == -15
    with pytest.raises(Cancelled), use_token(token):
        proc.stdout.read()
    proc.stdout.close()
    proc.stdin.close()


def process_shielded(proc):
    """The section as a whole is one long call: else the cancel could strike between two reads of the file."""
    return proc._child.shielded()


def test_an_uninterruptible_sections_own_limit_cuts():
    """The time of a cleanup is its own, and does reach the process that it started."""
    with pytest.raises(DeadlineExceeded), uninterruptible(0.02):
        process.run(["sleep", "1000"])
    assert has_no_children()


# --- interrupts, forks, the end of the interpreter ----------------------------------------------------------------


def test_ctrl_c_ends_the_group():
    """The child has a session of its own, so the terminal does not reach it: we do.

    It speaks when it has heard us, for then its start is over.
    """
    program = Program("""
        from tokenscope import process
        try:
            process.run("read go; echo $$; exec sleep 1000", shell=True, input="go\\n", text=True, grace=0.1)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """)
    pid = int(program.line())
    program.interrupt()
    assert program.finish() == (0, "interrupted\n", "")
    assert not is_living(pid)


def test_ctrl_c_while_it_is_being_started_is_put_off():
    """Between the start of the process and the line that knows its number no interrupt can fall."""
    pressed = []

    class Impatient(process.Popen):
        def _execute_child(self, *args):
            super()._execute_child(*args)
            pressed.append(self.pid)
            pid, self.pid = self.pid, None  # as if the number had not been stored yet
            signal.raise_signal(signal.SIGINT)
            self.pid = pid

    with pytest.raises(KeyboardInterrupt):
        Impatient(["sleep", "1000"])
    assert not is_living(pressed[0])
    assert has_no_children()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_random_moments_leaves_nobody_behind():
    """Wherever it falls between the start and the end of `run`, the command is gone when it is told."""
    randoms = random.Random(3)
    for _ in range(10):
        program = Program("""
            from tokenscope import process
            try:
                process.run("echo $$; exec sleep 1000", shell=True, grace=0.1)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
        """)
        pid = int(program.line())
        threading.Event().wait(randoms.random() * 0.002)
        assert program.interrupt_until_it_ends()[:2] == (0, "interrupted\n")
        assert not is_living(pid)


def test_a_second_ctrl_c_does_not_wait_for_the_grace():
    """An impatient user gets KILL at once."""
    program = Program("""
        import sys
        from tokenscope import process
        command = "trap 'echo term >&2' TERM; echo $$; while :; do sleep 0.01; done"
        try:
            with process.Popen(command, shell=True, stdout=process.PIPE, stderr=sys.stdout, text=True,
                               grace=1000) as proc:
                print(proc.stdout.readline(), end="", flush=True)
                proc.wait()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """)
    try:
        pid = int(program.line())
        program.interrupt()
        while (line := program.line()) != "term":  # the shell may have a word about its `sleep`
            assert line == "Terminated"
        program.interrupt()
    finally:
        status, out, _err = program.finish()
    assert (status, out.split()[-1]) == (0, "interrupted")
    assert not is_living(pid)


def test_a_failing_body_ends_the_process():
    """Leaving the `with` by an error does not wait for a process that never ends."""
    with pytest.raises(KeyError):
        with started() as proc:
            raise KeyError
    assert (proc.returncode, living(proc.pid)) == (-15, [])


def test_a_forked_process_leaves_it_alone():
    """The copy of the object in a forked child signals nobody and hangs nowhere."""
    token = CancellationToken()
    with use_token(token), started() as proc:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork in a program with threads
            pid = os.fork()
        if pid == 0:
            try:
                token.cancel()
                proc.kill()
                status = 0 if proc.poll() == 0 else 1
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert proc.poll() is None
        proc.kill()


def test_the_end_of_the_interpreter_is_prompt():
    """A thread that waits for a process holds nothing up."""
    program = Program("""
        import threading
        from tokenscope import process
        with process.Popen("echo $$; exec sleep 1000", shell=True, stdout=process.PIPE, text=True) as proc:
            print(proc.stdout.readline(), end="", flush=True)
            threading.Thread(target=proc.wait, daemon=True).start()
            raise SystemExit(3)
    """)
    pid = int(program.line())
    assert program.finish()[0] == 3
    assert not is_living(pid)


def test_a_dropped_process_warns_as_in_subprocess():
    """Outside of all scopes nobody would ever end it, and nobody else says so."""
    proc = started()
    proc.stdout.close()
    pid = proc.pid
    with pytest.warns(ResourceWarning, match="still running"):
        del proc
    os.kill(pid, signal.SIGKILL)
    until(lambda: (subprocess._cleanup(), has_no_children())[1])


def test_in_a_scope_it_may_be_dropped():
    """Started and forgotten: the scope remembers."""
    with ThreadScope():
        proc = started()
        pid = proc.pid
        proc.stdout.close()
        del proc
        assert is_living(pid)
    assert not is_living(pid)


# --- how it is seen ----------------------------------------------------------------------------------------------


def test_without_pidfd_a_thread_waits_and_it_is_told_once(monkeypatch):
    """An old kernel or a sandbox: everything works, and the log says how."""
    monkeypatch.setattr(_waiting, "_told", threading.Event())
    monkeypatch.setattr(os, "pidfd_open", lambda _pid: (_ for _ in ()).throw(PermissionError(1, "no pidfd here")))
    told = []
    unsubscribe = events.subscribe(told.append, events.FallbackUsed)
    try:
        assert process.run(["echo", "hi"], capture_output=True).stdout == b"hi\n"
        proc, error = cancelled_at(CancellationToken(), DEAF, BLOCKS["wait"], grace=0.05)
    finally:
        unsubscribe()
    assert type(error) is Cancelled
    until(lambda: living(proc.pid) == [])
    assert len(told) == 1
    assert "no pidfd here" in told[0].why


def test_somebody_else_may_have_reaped_it():
    """Where SIGCHLD is ignored the status is lost, as in subprocess; nothing hangs."""
    program = Program("""
        import signal
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        from tokenscope import process
        print(process.run("echo hi; exit 3", shell=True, capture_output=True).returncode)
    """)
    assert program.finish() == (0, "0\n", "")


def test_what_cannot_be_killed_is_told_and_not_waited_for(monkeypatch):
    """Stuck in the kernel, or somebody else's (sudo): an event names it, the caller goes on."""
    monkeypatch.setattr(_tree, "PATIENCE", 0.02)
    monkeypatch.setattr(_tree.ProcessTree, "_signal_locked", lambda *_: None)
    told = []
    unsubscribe = events.subscribe(told.append, events.Orphaned)
    token = CancellationToken()
    with use_token(token):
        proc = started(grace=0)
        token.cancel()
        with pytest.raises(Cancelled):
            proc.wait()
    until(lambda: told, "the event")
    unsubscribe()
    assert str(proc.pid) in next(iter(told[0].stacks))
    os.killpg(proc.pid, signal.SIGKILL)
    until(lambda: proc.poll() == -9)  # it is reaped all the same, should it end later
    proc.stdout.close()


def test_the_name_of_a_program_does_not_confuse_the_list():
    """Brackets and spaces in a name are part of the name."""
    with process.Popen(["/bin/sh", "-c", "printf 'a) Z 1 1 1' > /proc/self/comm; echo ready; read x"], stdin=PIPE,
                       stdout=PIPE) as proc:  # fmt: skip
        assert proc.stdout.readline() == b"ready\n"
        found = [entry.pid for entry in _tree._belonging_to(proc.pid)]
        assert found == [proc.pid]


def test_cancels_at_random_moments_leave_nothing_behind():
    """The result or Cancelled, nothing else; no process, no zombie, no descriptor (the fixture counts those)."""
    outcomes = []
    randoms = random.Random(7)

    def tool():
        try:
            done = process.run("echo a; sleep 0.01 & echo b", shell=True, capture_output=True, grace=0.2)
            outcomes.append((done.returncode, done.stdout))
        except Cancelled:
            outcomes.append(current_token().reason)
            raise

    reasons = []
    for _ in range(40):
        with ThreadScope() as scope:
            scope.spawn(tool)
            threading.Timer(randoms.random() * 0.02, scope.cancel).start()
        reasons.append(scope.token.reason)
        until(lambda: scope.token.cancelled)
    assert all(outcome == (0, b"a\nb\n") or outcome in reasons for outcome in outcomes)
    assert has_no_children()
