"""A child process under a token: who may end it, and what a blocked call of its owner makes of that.

A process belongs to the token that was current when it was started (and to the ``token=`` that was added). A cancel of
it ends the process, whether its owner is blocked on it or not; the owner's blocked call raises `Cancelled` once
everything is gone. A cancel of somebody else who waits for it raises there, and leaves the process alone.

Standing back: while an uninterruptible section is blocked on the process, a cancel from outside of that section is put
off until the call returns.

A scope ends what was started in it and still runs when it is left, as the last of its cleanups.

Lock order: ``_lock`` is a leaf, as that of ``_tree.py``; neither is taken under the other.
"""

from __future__ import annotations

import contextlib
import select
from typing import TYPE_CHECKING, Any

from tokenscope._core import _primitives, ambient, events, workers
from tokenscope._core import token as tokens
from tokenscope._core.current import current_token, standing_back
from tokenscope._core.errors import TaskCancelled
from tokenscope.process._tree import ProcessTree
from tokenscope.process._waiting import wait_ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tokenscope._core.token import CancellationToken

__all__ = ["Child", "Nursery", "nursery_here"]


class Child:
    """One process and its token.

    Args:
        pid: Our child, which leads a session.
        name: For errors and events.
        token: Whose cancel ends it.
        explicit: The user named a token himself, so that whoever waits is meant by its cancel.
        grace: Seconds between TERM and KILL.
        nursery: Of the scope that ends it at the latest, if there is one.
    """

    def __init__(
        self,
        pid: int,
        name: str,
        token: CancellationToken,
        *,
        explicit: bool,
        grace: float,
        nursery: Nursery | None,
    ) -> None:
        self.token = token
        self.grace = grace
        self.name = name
        self._explicit = explicit
        self._nursery = nursery
        self._lock = _primitives.RLock()
        self._shields: set[object] = set()  # calls that must not be cut; under the lock
        self._registration: tokens.Registration | None = None
        self.tree = ProcessTree(pid, name, self._gone)
        if nursery is not None:
            nursery.children.add(self)
        # A worker ends it: the owner may be busy elsewhere, and whoever cancels must not wait for the grace.
        self._registration = token.on_cancel(self._cancelled, blocking=True)
        if self.tree.gone:
            self._registration.close(wait=False)

    @property
    def owned(self) -> bool:
        """Whether a scope will end it."""
        return self._nursery is not None

    def _gone(self) -> None:
        if self._registration is not None:
            self._registration.close(wait=False)
        if self._nursery is not None:
            self._nursery.children.discard(self)

    # --- cancelling ---------------------------------------------------------------------------------------------

    def _cancelled(self) -> None:
        """The token was cancelled; on a worker."""
        if self._end_if_unshielded():
            self.tree.drive()

    def _end_if_unshielded(self) -> bool:
        with self._lock: shielded = bool(self._shields)  # fmt: skip
        if not shielded:
            self.tree.end(self.grace, cut=True)
        return not shielded

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Around a blocking call: keeps off the cancels that the section it is in must not feel."""
        if not self._stands_back():
            yield
            return
        call = object()
        self._shields.add(call)
        try:
            yield
        finally:
            with self._lock: self._shields.discard(call)  # fmt: skip
            if self.token.cancelled:
                self._submit(self._cancelled)

    def _stands_back(self) -> bool:
        return standing_back() and not tokens.is_within(current_token(), self.token)

    def _submit(self, job: Any) -> None:
        try:
            workers.submit(job)
        except RuntimeError as error:
            events.emit(events.ThreadFailed(self.name, error))
            self._end_if_unshielded()  # whoever waits for it, or the end of the scope, does the rest

    # --- blocking -----------------------------------------------------------------------------------------------

    def step(self, wanted: Mapping[int, int], until: float | None) -> set[int]:
        """Block once: until a descriptor is ready, the end came nearer, the time, or a cancel. A checkpoint.

        Raises:
            Cancelled: The caller is cancelled, but not the process's token: the process goes on.
        """
        here = current_token()
        tokens.expire_if_due(here)
        tokens.expire_if_due(self.token)
        if self.cancelled:
            self._end_if_unshielded()
        else:
            here.check()
        return self.step_heedless(wanted, until, here, self.token)

    def step_heedless(self, wanted: Mapping[int, int], until: float | None, *heeded: CancellationToken) -> set[int]:
        """As `step`, and no checkpoint: only ``heeded`` tokens wake it."""
        self.tree.advance()
        watches = self.tree.watches()
        if not watches:
            return wait_ready(wanted, 0.0)
        everything = {watch.fd: select.POLLIN for watch in watches} | dict(wanted)
        moments = [until, self.tree.due, *(token.deadline for token in heeded)]
        ready = wait_ready(everything, min((m for m in moments if m is not None), default=None), *heeded)
        self.tree.advance()
        return ready & wanted.keys()

    @property
    def cancelled(self) -> bool:
        """Whether a cancel means this process, and may be felt where the caller is."""
        return self.token.cancelled and not self._stands_back()

    def end(self, grace: float | None = None, hear: Callable[[float | None], object] | None = None) -> None:
        """End it and wait until everything is gone. No checkpoint.

        An interrupt meanwhile kills at once, and is raised when that is done.

        Args:
            grace: Seconds between TERM and KILL; None: its own.
            hear: Blocks once, instead of ``step_heedless``, to read its last words.
        """
        interrupt: BaseException | None = None
        while not self.tree.gone:
            try:
                self.tree.end(self.grace if grace is None else grace)
                while not self.tree.gone:
                    (hear or self._step_deaf)(None)
            except BaseException as error:
                interrupt, grace = interrupt or error, 0
        if interrupt is not None:
            raise interrupt

    def _step_deaf(self, until: float | None) -> None:
        self.step_heedless({}, until)

    def raise_cut(self, cause: BaseException | None = None) -> None:
        """Raise what a cancel of the process means here.

        Raises:
            Cancelled: The caller is cancelled too, or named the token.
            TaskCancelled: The process belongs to somebody else, who was cancelled.
        """
        tokens.raise_if_cancelled(current_token(), cause)
        if self._explicit or standing_back():
            tokens.raise_if_cancelled(self.token, cause)
        raise TaskCancelled(f"process {self.name} belongs to work that was cancelled", self.token.reason) from cause


class Nursery:
    """The processes of one scope."""

    def __init__(self) -> None:
        self.children: set[Child] = set()
        self.unarmed: list[None] = [None]  # emptied once, atomically, by who defers `close`

    def close(self) -> None:
        """End what still runs; a cleanup of the scope."""
        children = tuple(self.children)
        for child in children:
            child.tree.end(child.grace)
        for child in children:
            child.end()


def nursery_here() -> Nursery | None:
    """Where a process started now belongs; None outside of all scopes.

    Raises:
        ScopeClosed: The scope has ended.
    """
    owner = ambient.owner_var.get()
    scope = None if owner is None else owner.scope
    if owner is None or scope is None:
        return None
    if hasattr(scope, "extension"):
        nursery: Nursery = scope.extension(Nursery, Nursery)
        owner = scope
    else:  # a background scope never ends; its task does
        nursery = Nursery()
    with contextlib.suppress(IndexError):
        nursery.unarmed.pop()
        owner.defer(nursery.close)
    return nursery
