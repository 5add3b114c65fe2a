"""For tests of programs that use tokenscope."""

from __future__ import annotations

import threading

from tokenscope._core import clock
from tokenscope._core.timer import THREAD_NAME, timer
from tokenscope._core.workers import IDLE_NAME, workers

__all__ = ["drain"]


def drain(timeout: float = 5.0) -> bool:
    """End the library's idle threads, which otherwise stay for ten seconds; True if all have gone.

    Threads that run a task are not touched, nor is a timer that somebody's deadline still needs.

    Args:
        timeout: Seconds to wait for them.

    Raises:
        ValueError, TypeError: A bad ``timeout``.
    """
    seconds = clock.validate_timeout(timeout)
    end = clock.deadline_after(seconds)
    while idle := _ask_to_leave():
        if end is not None and clock.now() >= end:
            return False
        idle[0].join(0.02)  # then again: one that was just coming to rest has not heard it
    return True


def _ask_to_leave() -> list[threading.Thread]:
    workers.drain()
    timer.drain()
    return [thread for thread in threading.enumerate() if thread.name == IDLE_NAME or _is_spare_timer(thread)]


def _is_spare_timer(thread: threading.Thread) -> bool:
    return thread.name == THREAD_NAME and not timer.heap
