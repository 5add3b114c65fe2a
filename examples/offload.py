"""C code that nothing in its own process can stop, stopped: ``process.offload(fn, *args, timeout=seconds)``.

Somebody sends a pattern that backtracks for years. While it does, no other thread of its process runs. In a process of
its own it is killed at its deadline; the search beside it, and the thread that counts, never notice.
"""

from __future__ import annotations

import itertools
import re

from tokenscope import DeadlineExceeded, ThreadScope, process, sleep

TEXT = "a" * 60
PATTERNS = ("(a+)+b", "a{3}")


def search(pattern: str) -> str:
    try:
        found = process.offload(re.findall, pattern, TEXT, timeout=3, name=pattern)
    except DeadlineExceeded as late:
        return f"stopped: {late}"
    return f"{pattern} found {len(found)}"


def count(ticks: list[int]) -> None:
    for tick in itertools.count():
        sleep(0.01)
        ticks.append(tick)


def main() -> None:
    ticks: list[int] = []
    with ThreadScope() as scope:
        scope.spawn(count, ticks)
        for line in scope.map(search, PATTERNS):
            print(line)
        scope.cancel("done")
    print("others went on" if len(ticks) > 10 else "others were held up")


if __name__ == "__main__":
    main()

# Expected output:
# stopped: the deadline of (a+)+b passed
# a{3} found 20
# others went on
