"""What is running for one rank of a plan. What was asked for is a `RankSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dplaunch.backend import Exit, RankHandle
from dplaunch.events import RankState
from dplaunch.identity import Identity
from dplaunch.link import RankLink
from dplaunch.plan import RankSpec

LEGAL = {
    None: {RankState.STARTING},
    RankState.STARTING: {RankState.READY, RankState.DOWN, RankState.STOPPING, RankState.FAILED},
    RankState.READY: {RankState.DOWN, RankState.STOPPING},
    RankState.DOWN: {RankState.STARTING, RankState.FAILED, RankState.STOPPING},
    RankState.STOPPING: {RankState.STOPPED},
    RankState.STOPPED: set[RankState](),
    RankState.FAILED: {RankState.STOPPING},
}
"""Which state may follow which; changed in `Rank.enter` alone."""


@dataclass(slots=True)
class Rank:
    """What is running for one rank of the plan."""

    spec: RankSpec
    identity: Identity
    state: RankState | None = None
    handle: RankHandle | None = None
    link: RankLink | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    ready_response: Mapping[str, Any] = field(default_factory=dict)
    restarts: list[float] = field(default_factory=list)
    last_exit: Exit | None = None

    def enter(self, state: RankState) -> None:
        """Changes the state."""
        if state not in LEGAL[self.state]:
            raise RuntimeError(f"rank {self.identity.rank} cannot go from {self.state} to {state}")
        self.state = state
