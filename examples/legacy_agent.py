"""An agent loop in a plain thread, with a stop token and a time limit: a legacy program, ported.

Before, the program had a token of its own, twenty lines like these, and a thread joined with a timeout::

    class Stopped(Exception):
        pass

    class StopToken:
        def __init__(self):
            self._event = threading.Event()
            self._lock = threading.Lock()
            self.why = None

        def cancel(self, why):
            with self._lock:
                if self.why is None:
                    self.why = why
            self._event.set()

        def check(self):
            if self._event.is_set():
                raise Stopped(self.why)

    def ask_model(question):
        time.sleep(60)                                    # stands for a call that takes its time

    def main():
        token = StopToken()
        thread = threading.Thread(target=agent, args=(token, print))
        thread.start()
        thread.join(timeout=0.5)
        if thread.is_alive():
            token.cancel("out of time")
            thread.join(timeout=1)                        # blocked in ask_model(): still alive after it

The loop itself, with its ``token.check()``, stays as it was. What changed:

1. both classes are gone; ``Stopped`` was caught nowhere but in the thread's target
2. ``StopToken()``                    -> ``CancellationToken(timeout=0.5, name="agent")``: it cancels itself
3. ``Thread(target=agent, ...)``      -> ``Thread(target=bind(agent, token), ...)``: it is current in there
4. ``time.sleep(60)``                 -> ``sleep(60)``: it ends at the moment of the cancel
5. ``join(timeout=0.5)``, ``cancel``  -> ``join()``: the thread ends in time by itself

With ``tokenscope.integrations.requests.Session`` in place of `requests.Session` a real model call ends in the
same way.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

from tokenscope import CancellationToken, bind, sleep

if TYPE_CHECKING:
    from collections.abc import Callable


def agent(token: CancellationToken, say: Callable[[str], object]) -> None:
    for step in itertools.count(1):
        token.check()
        say(f"step {step}: ask the model")
        answer = ask_model(step)
        token.check()
        say(f"step {step}: do as it says: {answer}")


def ask_model(step: int) -> str:
    if step == 3:
        sleep(60)  # the model thinks for a long time: nobody could say `check()` here
    return f"look at page {step}"


def main() -> None:
    token = CancellationToken(timeout=0.5, name="agent")
    thread = threading.Thread(target=bind(agent, token), args=(token, print))
    thread.start()
    thread.join()
    print(f"stopped: {token.reason}")


if __name__ == "__main__":
    main()

# Expected output:
# step 1: ask the model
# step 1: do as it says: look at page 1
# step 2: ask the model
# step 2: do as it says: look at page 2
# step 3: ask the model
# stopped: deadline: the deadline of agent passed
