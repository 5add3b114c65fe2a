"""What the tests have run in another process: a module, since a function is found there by its name."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from shells import SLEEPER, python, until

from tokenscope import CancellationToken, current_token, process

here = os.getpid


def echo(*args):
    return args


def announce(path):
    """Tell the test that we run, and as whom."""
    Path(path).write_text(f"{os.getpid()}\n")


def announced(path):
    """The number of the process that announced itself; for the test."""
    path = Path(path)
    until(lambda: path.exists() and path.read_text().endswith("\n"), "the announcement")
    return int(path.read_text())


def hang(path):
    announce(path)
    while True:
        signal.pause()


def hold_the_gil(path):
    """A regular expression that backtracks for ages, and lets no signal and no other thread in."""
    announce(path)
    return re.fullmatch("(a+)+b", "a" * 60)


def hang_with_children(path):
    """A child in our group; one in a session of its own, through the library; and we hear no TERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    announce(f"{path}.own")
    subprocess.Popen(python(f"import jobs; jobs.hang({f'{path}.child'!r})"), env=with_jobs())
    process.run(python(f"import jobs; jobs.hang({f'{path}.session'!r})"), env=with_jobs())


def with_jobs():
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent)}


def meet(folder, count):
    """Go on when so many processes have come."""
    (Path(folder) / str(os.getpid())).touch()
    until(lambda: len(list(Path(folder).iterdir())) >= count, "the others")
    return os.getpid()


def surroundings():
    return sys.path, sys.argv, os.getcwd()  # noqa: PTH109


def token_here():
    return current_token().deadline, current_token().name


# --- ends and errors ---------------------------------------------------------------------------------------------

ENDS = {
    "exit code 3": functools.partial(os._exit, 3),
    "SIGABRT": os.abort,
    "SIGSEGV": functools.partial(ctypes.string_at, 0),
    "SIGKILL": functools.partial(signal.raise_signal, signal.SIGKILL),
    "signal 40": functools.partial(signal.raise_signal, 40),
}


def die_beside_a_daemon(path):
    """A copy of us in a session of its own, which holds our socket open and is out of reach once we are gone."""
    if os.fork() == 0:
        os.setsid()
        hang(path)
    announced(path)
    os._exit(3)


def close_everything():
    os.closerange(3, 100)
    signal.pause()


def leave_through_the_door():
    sys.exit("bye")


def interrupt():
    signal.raise_signal(signal.SIGINT)


def cancel_oneself():
    token = CancellationToken(name="mine")
    token.cancel("no more", tag="t")
    token.check()


class Difficult(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def raise_difficult():
    raise Difficult("one", "two")


def raise_unpicklable():
    error = LookupError("not found")
    error.lock = threading.Lock()
    raise error


def raise_caused():
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise LookupError("outer") from error


class OnlyThere(Exception):
    """Can be unpickled in the process that made it alone."""

    def __reduce__(self):
        return _only_in, (os.getpid(),)


def _only_in(pid):
    if os.getpid() != pid:
        raise ImportError("only there")
    return OnlyThere("there")


def raise_only_there():
    raise OnlyThere("there")


def return_only_there():
    return OnlyThere("there")


def return_lock():
    return threading.Lock()


# --- leftovers ---------------------------------------------------------------------------------------------------


def leave_a_thread():
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


def leave_a_process():
    tool = subprocess.Popen(SLEEPER, shell=True, stdout=subprocess.PIPE, text=True)
    tool.stdout.readline()
    return os.getpid(), tool.pid
