"""Everything tokenscope raises.

::

    BaseException
      Cancelled                     in a thread whose own token is cancelled; absorbed by the boundary that owns it
    Exception
      TokenScopeError
        ScopeClosed                 spawn into a scope that has ended or is cancelled
        TaskCancelled               result() of a task that ended cancelled (also a futures.CancelledError)
        StragglersLeft              a scope gave up waiting for its children
        BudgetExceeded
        CommitRefused
      TimeoutError
        DeadlineExceeded            raised by the boundary that owns the deadline, nowhere else

All of them pickle.
"""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenscope._core.reasons import CancelReason

__all__ = [
    "BudgetExceeded",
    "Cancelled",
    "CommitRefused",
    "DeadlineExceeded",
    "ScopeClosed",
    "StragglersLeft",
    "TaskCancelled",
    "TokenScopeError",
]


class Cancelled(BaseException):
    """The work of this thread is no longer wanted.

    A ``BaseException``, because retry loops and ``except Exception`` must not eat it. It is raised at checkpoints
    and out of blocked calls, again and again until the boundary that owns the cancel is reached.
    Let it pass; clean up in ``finally``.

    Attributes:
        reason: Why. The same object as ``token.reason``.
        origin: The name of the token on which ``cancel()`` was called.
    """

    def __init__(self, reason: CancelReason, origin: str | None = None) -> None:
        super().__init__(reason, origin)
        self.reason = reason
        self.origin = origin
        # Which cancel this is; boundaries compare it by identity. Does not travel to other processes.
        self._cut: Any = None

    def __str__(self) -> str:
        return str(self.reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.origin), {**self.__dict__, "_cut": None}


class TokenScopeError(Exception):
    """The base of what goes wrong in the use of tokenscope."""


class ScopeClosed(TokenScopeError):
    """A scope that has ended, or was cancelled, takes no more work.

    Attributes:
        reason: Why it was cancelled, or None if it simply ended.
    """

    def __init__(self, message: str, reason: CancelReason | None = None) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.reason})" if self.reason else str(self.args[0])


class TaskCancelled(TokenScopeError, concurrent.futures.CancelledError):
    """The result was asked of a task that ended cancelled, by a caller who is not cancelled itself.

    Attributes:
        reason: Why the task was cancelled.
    """

    def __init__(self, message: str, reason: CancelReason | None = None) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.reason})" if self.reason else str(self.args[0])


class StragglersLeft(TokenScopeError):
    """A scope gave up waiting for children that did not end after the cancel.

    Attributes:
        stacks: The stack of each straggler at that moment, by task name.
    """

    def __init__(self, message: str, stacks: Mapping[str, str] | None = None) -> None:
        self.stacks = dict(stacks or {})
        super().__init__(message, self.stacks)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tasks left running."""
        return tuple(self.stacks)

    def __str__(self) -> str:
        return "\n".join([str(self.args[0]), *(f"--- {name}\n{stack}" for name, stack in self.stacks.items())])


class BudgetExceeded(TokenScopeError):
    """A charge would go over its budget."""


class CommitRefused(TokenScopeError):
    """A commit lost against a cancel: nothing was written."""


class DeadlineExceeded(TimeoutError):
    """The deadline of a boundary passed and cut its work short.

    Attributes:
        reason: The ``deadline`` reason of the token that owned it.
    """

    def __init__(self, message: str, reason: CancelReason | None = None) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.reason), self.__dict__
