"""Child processes that a cancel ends, with all that they started: ``subprocess`` with an owner.

`run` and `Popen` have the signatures and results of ``subprocess``. `offload` runs a function in another process.
"""

from subprocess import DEVNULL, PIPE, STDOUT, CalledProcessError, CompletedProcess, SubprocessError, TimeoutExpired

from tokenscope.process._offload import OffloadError, offload
from tokenscope.process._popen import GRACE, Popen, run

__all__ = [
    "DEVNULL",
    "GRACE",
    "PIPE",
    "STDOUT",
    "CalledProcessError",
    "CompletedProcess",
    "OffloadError",
    "Popen",
    "SubprocessError",
    "TimeoutExpired",
    "offload",
    "run",
]
