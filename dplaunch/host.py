"""A running group as a change of its size sees it: its plan, and its frontend, which is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dplaunch.plan import LaunchPlan
from dplaunch.seam import resize

if TYPE_CHECKING:
    from dplaunch.parts import GroupParts
    from dplaunch.rank import Rank


class GroupHost:
    """See the module.

    Args:
        group: has the plan.
        engine: the group's AsyncLLM.
    """

    def __init__(self, group: GroupParts, engine: Any) -> None:
        self._group = group
        self._engine = engine

    @property
    def plan(self) -> LaunchPlan:
        """What runs; replaced when the number of ranks changes."""
        return self._group.plan

    @plan.setter
    def plan(self, plan: LaunchPlan) -> None:
        self._group.plan = plan

    def resize(self, ranks: int) -> None:
        """Tells the frontend how many ranks there are, before a new one can answer."""
        resize.resize(self._engine, ranks)

    def welcome(self, rank: Rank) -> None:
        """Tells the frontend what a new rank found out while it started."""
        resize.joined(self._engine, rank.identity.rank, rank.ready_response)
