"""The standard library's locks, conditions and queues, in which a cancel ends the wait.

Same names, same signatures, same errors as in ``threading`` and ``queue``. What is different:

* Every call that may wait is a checkpoint of the current token (and of ``token=``, if given): it raises `Cancelled`,
  even if it would not have had to wait. What cannot wait never does: ``release``, ``set``, ``notify``, ``put`` into
  an unbounded queue, ``blocking=False``, ``put_nowait``, ``get_nowait``.
* Who is cancelled has taken nothing: no lock, no item, no permit; what was about to be his goes to the next.
* Whoever came first is served first, and nobody who comes later can overtake.
"""

from __future__ import annotations

from queue import Empty, Full
from threading import BrokenBarrierError

from tokenscope.sync._condition import Barrier, Condition, Event
from tokenscope.sync._locks import BoundedSemaphore, Lock, RLock, Semaphore
from tokenscope.sync._queues import LifoQueue, PriorityQueue, Queue, ShutDown, SimpleQueue

__all__ = [
    "Barrier",
    "BoundedSemaphore",
    "BrokenBarrierError",
    "Condition",
    "Empty",
    "Event",
    "Full",
    "LifoQueue",
    "Lock",
    "PriorityQueue",
    "Queue",
    "RLock",
    "Semaphore",
    "ShutDown",
    "SimpleQueue",
]

# Tracebacks and reprs should read `tokenscope.sync.Queue`, wherever the class happens to live.
for _public in map(globals().__getitem__, __all__):
    if _public.__module__.startswith(__name__):
        _public.__module__ = __name__
del _public
