"""The leak check itself: what it catches, what it lets pass, and whom it blames."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from leaks import can_see_descriptors

HERE = Path(__file__).parent

needs_descriptors = pytest.mark.skipif(not can_see_descriptors(), reason="the system does not show descriptors")


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """Return an empty test folder under this project's own conftest, with a short patience."""
    shutil.copy(HERE / "conftest.py", pytester.path)
    source = (HERE / "leaks.py").read_text(encoding="utf-8")
    (pytester.path / "leaks.py").write_text(source.replace("GRACE = 2.0", "GRACE = 0.2"), encoding="utf-8")
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    return pytester


def run(suite: pytest.Pytester, code: str) -> pytest.RunResult:
    """Run `code` as a test module in a fresh interpreter."""
    suite.makepyfile(test_it=code)
    return suite.runpytest_subprocess("-p", "no:cacheprovider", timeout=50)


THREAD = """
    import threading
    stop = threading.Event()
    def wait_for_a_stop(): stop.wait(30)
    def test_leaves():
        "It leaves a thread."
        threading.Thread(target=wait_for_a_stop, name="forgotten", daemon=True).start()
    def test_innocent():
        "It comes after."
    def test_last():
        "It lets the thread go."
        stop.set()
"""


def test_a_thread_left_behind_fails_the_test_that_left_it_and_no_other(suite):
    """A leaked thread is told by name and stack, and the tests after it are not blamed."""
    result = run(suite, THREAD)
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_leaves*", "*thread forgotten*", "*wait_for_a_stop*"])


def test_a_thread_unknown_to_threading_is_seen(suite):
    """A thread started through `_thread` cannot hide from the check."""
    result = run(
        suite,
        """
        import _thread, threading
        def test_leaves():
            "It leaves a bare thread."
            started = threading.Event()
            def stay():
                started.set()
                threading.Event().wait(30)
            _thread.start_new_thread(stay, ())
            assert started.wait(5)
        """,
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*thread (of _thread, *"])


@pytest.mark.parametrize("name", ["tokenscope-idle", "tokenscope-timer", "tokenscope-watch"])
def test_a_parked_thread_of_the_library_may_stay(suite, name):
    """The library's own parked threads are no leak."""
    run(suite, THREAD.replace("forgotten", name)).assert_outcomes(passed=3)


def test_a_thread_that_is_just_ending_is_waited_for(suite):
    """A thread in its last lines when the test returns is no leak."""
    result = run(
        suite,
        """
        import threading
        def test_returns_first():
            "It returns a moment before its thread."
            threading.Timer(0.05, int).start()
        """,
    )
    result.assert_outcomes(passed=1)


@needs_descriptors
@pytest.mark.parametrize(
    ("opened", "told"),
    [
        ("socket.socket()", "socket:"),
        ("os.pipe()", "pipe:"),
        ("os.open('file', os.O_CREAT | os.O_WRONLY)", "*file"),
        ("select.epoll()", "anon_inode:?eventpoll?"),
        ("os.eventfd(0)", "anon_inode:?eventfd?"),
    ],
)
def test_a_descriptor_left_open_fails_the_test(suite, opened, told):
    """A socket, a pipe, a file or a kernel object left open is told by its target."""
    result = run(
        suite,
        f"""
        import os, select, socket
        kept = []
        def test_leaves():
            "It leaves a descriptor."
            kept.append({opened})
        def test_innocent():
            "It comes after."
        """,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines([f"*descriptor * -> {told}*"])


@needs_descriptors
def test_a_descriptor_replaced_under_its_old_number_is_seen(suite):
    """A number that was open before does not hide what it refers to now."""
    result = run(
        suite,
        """
        import os
        number = os.open("before", os.O_CREAT | os.O_WRONLY)
        def test_swaps():
            "It puts another file under a number it found open."
            other = os.open("after", os.O_CREAT | os.O_WRONLY)
            os.dup2(other, number)
            os.close(other)
        """,
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*descriptor * -> */after"])


@needs_descriptors
def test_garbage_is_collected_before_judging(suite):
    """A descriptor held by nothing but a reference cycle is not reported as left behind."""
    result = run(
        suite,
        """
        import os
        class Holder:
            def __init__(self): self.me, self.number = self, os.open("held", os.O_CREAT)
            def __del__(self): os.close(self.number)
        def test_drops():
            "It drops a cycle that owns a descriptor."
            Holder()
        """,
    )
    result.assert_outcomes(passed=1)


WATCHER = """
    import os, select, threading
    kept, stop = [], threading.Event()
    def test_starts_the_watcher():
        "It starts what the process keeps."
        threading.Thread(target=stop.wait, args=(30,), name="tokenscope-watch", daemon=True).start()
        kept.extend([select.epoll(), os.eventfd(0)])
"""


@needs_descriptors
def test_the_watcher_keeps_one_epoll_and_one_eventfd(suite):
    """What the watcher thread owns for the life of the process is no leak."""
    run(suite, WATCHER).assert_outcomes(passed=1)


@needs_descriptors
def test_a_second_epoll_is_a_leak_even_beside_the_watcher(suite):
    """The exemption of the watcher is for one of each."""
    result = run(suite, WATCHER.replace("[select.epoll()", "[select.epoll(), select.epoll()"))
    result.assert_outcomes(passed=1, errors=1)


@needs_descriptors
def test_what_a_shared_fixture_holds_is_not_the_first_tests_leak(suite):
    """A module's server may stay open from the first test to the last."""
    result = run(
        suite,
        """
        import pytest, socket
        @pytest.fixture(scope="module")
        def server():
            with socket.socket() as sock:
                yield sock
        def test_first(server):
            "It is the first to use the server."
        def test_second(server):
            "It uses it as well."
        """,
    )
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("var", "told"),
    [("token_var", "the current token 'mine'"), ("owner_var", "the current task or scope 'mine'")],
)
def test_what_stays_current_is_a_leak_of_the_test_that_set_it(suite, var, told):
    """A token or scope that is still current after its test is told, and later tests are not blamed."""
    result = run(
        suite,
        f"""
        from tokenscope._core import ambient
        def test_leaves():
            "It sets what is current and does not put it back."
            ambient.{var}.set("mine")
        def test_innocent():
            "It comes after."
        """,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines([f"*{told}*"])


def test_a_test_without_a_docstring_is_refused(suite):
    """A test that does not say what it proves stops the run, by name."""
    result = run(suite, "def test_silent(): pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_it.py::test_silent*"])
