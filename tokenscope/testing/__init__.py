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
    workers.drain()
    timer.drain()
    idle = [thread for thread in threading.enumerate() if thread.name == IDLE_NAME or _is_spare_timer(thread)]
    for thread in idle:
        thread.join(None if end is None else max(0.0, end - clock.now()))
    return not any(thread.is_alive() for thread in idle)


def _is_spare_timer(thread: threading.Thread) -> bool:
    return thread.name == THREAD_NAME and not timer.heap
