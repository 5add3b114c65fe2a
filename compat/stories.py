"""Which story is told to which kind of peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compat import query, scenario, service, suite

if TYPE_CHECKING:
    from compat.scenario import Step

#: Kind of peer -> the steps of its story.
STEPS: dict[str, list[Step]] = {
    "server": scenario.STEPS,
    "client": scenario.STEPS,
    "database": query.STEPS,
    "service": service.STEPS,
    "suite": suite.STEPS,
}
