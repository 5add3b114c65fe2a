"""Several things at a time, and none of them left behind: ``with ThreadScope() as scope: scope.spawn(fn)``.

Two stories. In the first, all searches succeed. In the second, one fails: its siblings, asleep for a minute,
are stopped at once, and the failure comes out of the ``with``.
"""

from __future__ import annotations

import time

from tokenscope import ThreadScope, sleep


def search(source: str, seconds: float) -> str:
    sleep(seconds)  # stands for a blocked call; wakes at once when the scope is cancelled
    if source == "broken":
        raise ConnectionError(f"{source} does not answer")
    return f"three hits in {source}"


def all_is_well() -> None:
    with ThreadScope(timeout=5) as scope:
        tasks = [scope.spawn(search, source, 0.01) for source in ("mail", "wiki", "web")]
    # Here every thread has ended.
    for task in tasks:
        print(task.result())


def one_fails() -> None:
    began = time.monotonic()
    scope = ThreadScope(timeout=300)
    try:
        with scope:
            scope.spawn(search, "mail", 60)
            scope.spawn(search, "wiki", 60)
            scope.spawn(search, "broken", 0.01)
    except* ConnectionError as failures:
        print(*(f"failed: {error}" for error in failures.exceptions))
    tasks = scope.report.tasks
    stopped = tasks.cancelled + tasks.never_started
    print(f"{tasks.failed} failed, {stopped} stopped because of it: {scope.report.reason.kind}")
    print("that took", "no time" if time.monotonic() - began < 10 else "a minute")


def main() -> None:
    all_is_well()
    one_fails()


if __name__ == "__main__":
    main()

# Expected output:
# three hits in mail
# three hits in wiki
# three hits in web
# failed: broken does not answer
# 1 failed, 2 stopped because of it: sibling_failed
# that took no time
