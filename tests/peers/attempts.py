"""A call on a thread of its own, and how to know where it is blocked."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from tokenscope import use_token

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from tokenscope._core.token import CancellationToken


class Attempt:
    """Runs ``call()`` on a thread, under ``token`` if one is given, and keeps how it ended.

    Attributes:
        thread: The thread.
        ended_at: When the call had ended, by ``time.perf_counter()``.
    """

    def __init__(self, call: Callable[[], Any], token: CancellationToken | None = None) -> None:
        self._call = call
        self._token = token
        self._value: Any = None
        self._error: BaseException | None = None
        self.ended_at = 0.0
        self.thread = threading.Thread(target=self._run, name="attempt", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with use_token(self._token) if self._token else nullcontext():
                self._value = self._call()
        except BaseException as error:  # kept for the test
            self._error = error
        self.ended_at = time.perf_counter()

    def _join(self, timeout: float) -> None:
        self.thread.join(timeout)
        assert not self.thread.is_alive(), f"still blocked after {timeout} s:\n{''.join(stack_of(self.thread))}"

    def failure(self, timeout: float = 5.0) -> BaseException:
        """Wait for the end and return what the call raised."""
        self._join(timeout)
        assert self._error is not None, f"it did not fail, it returned {self._value!r}"
        error, self._error = self._error, None  # its frames would keep sockets open
        return error

    def value(self, timeout: float = 5.0) -> Any:
        """Wait for the end and return what the call returned."""
        self._join(timeout)
        if self._error is not None:
            raise self._error
        return self._value


def wait_until(predicate: Callable[[], object], timeout: float = 5.0) -> None:
    """Wait for something that no event tells about."""
    end = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.001)


def blocked_in(thread: threading.Thread, function: str) -> bool:
    """Tell whether a thread is inside a function of this name, at any depth."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


def stack_of(thread: threading.Thread) -> list[str]:
    """Return the stack of a thread, as lines."""
    import traceback

    frame = sys._current_frames().get(thread.ident or 0)
    return traceback.format_stack(frame) if frame else []
