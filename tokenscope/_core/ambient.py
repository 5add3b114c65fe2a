"""What is current in this thread: two context variables, and the rule by which they are put back.

They know nothing of what they hold, so that every floor above may use them.

The rule: a value is put back only where it is still the one that was set, and never by ``ContextVar.reset``.
A scope around a ``yield`` is entered in one context and left in another (WSGI servers call ``close()`` from where
they like); ``reset`` raises there, and a blind ``set`` would overwrite what belongs to somebody else.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Any

__all__ = ["owner_var", "put_back", "token_var"]

#: The current token; None means "outside": nothing here can be cancelled.
token_var: ContextVar[Any] = ContextVar("tokenscope_token", default=None)
#: The current task (in a child) or scope (in its body): what ``current_scope`` and ``defer`` mean.
owner_var: ContextVar[Any] = ContextVar("tokenscope_owner", default=None)


#: What was left while something newer was current, and what was current before it. Two generators with a scope
#: each, open in one context and closed oldest first, do that: the newer one must then put back what the older
#: one would have, not the older one's ended scope.
_left_below: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def put_back(var: ContextVar[Any], mine: object, previous: object, *, once: bool = True) -> None:
    """Set ``var`` back to ``previous`` if it still holds ``mine``.

    Args:
        var: The variable.
        mine: What was set on entering.
        previous: What was there before.
        once: ``mine`` is entered once and never again, so having left it is final.
    """
    if var.get() is mine:
        while previous is not None and previous in _left_below:
            previous = _left_below[previous]
        var.set(previous)
    elif once:
        _left_below[mine] = previous
