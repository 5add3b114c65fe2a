"""What is current, put back also where scopes are left in another order than they were entered."""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING

import pytest

from tokenscope import ThreadScope, check, current_scope, current_token

if TYPE_CHECKING:
    from collections.abc import Iterator


def holding(name: str) -> Iterator[None]:
    """A generator with a scope around its ``yield``, open after the first step."""
    with ThreadScope(name=name):
        yield


def opened(name: str) -> Iterator[None]:
    """Such a generator, resumed once."""
    generator = holding(name)
    next(generator)
    return generator


def close_oldest_first() -> None:
    """Three scopes in one context, left oldest first, middle first, and newest last."""
    outside = current_token()
    first, second, third = opened("first"), opened("second"), opened("third")
    first.close()
    second.close()
    assert current_scope().name == "third"
    third.close()
    assert current_token() is outside
    check()
    with pytest.raises(LookupError):
        current_scope()


def test_generators_closed_oldest_first_leave_nothing_current():
    """An ended scope is never put back, whatever the order in which scopes around a yield are left."""
    copy_context().run(close_oldest_first)


def leave_the_middle_one() -> None:
    """The outer scope stays open while an inner one is left before the innermost."""
    with ThreadScope(name="outer") as outer:
        older, younger = opened("older"), opened("younger")
        older.close()
        younger.close()
        assert current_scope() is outer
        assert current_token() is outer.token


def test_a_scope_left_in_the_middle_is_passed_over():
    """What is put back is the newest scope that is still open, not the one below that was left meanwhile."""
    copy_context().run(leave_the_middle_one)
