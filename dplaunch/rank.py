"""What is running for one rank of a plan. What was asked for is a `RankSpec`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dplaunch.backend import Exit, RankHandle
from dplaunch.events import RankState
from dplaunch.identity import Identity
from dplaunch.link import RankLink
from dplaunch.plan import RankSpec

LEGAL: dict[RankState | None, set[RankState]] = {
    None: {RankState.STARTING},
    RankState.STARTING: {RankState.READY, RankState.STALE, RankState.DOWN, RankState.STOPPING, RankState.FAILED},
    RankState.READY: {RankState.DOWN, RankState.STOPPING},
    RankState.STALE: {RankState.READY, RankState.DOWN, RankState.STOPPING},
    RankState.DOWN: {RankState.STARTING, RankState.FAILED, RankState.STOPPING},
    RankState.STOPPING: {RankState.STOPPED},
    RankState.STOPPED: {RankState.STARTING, RankState.DOWN},  # when it was a restart on request
    RankState.FAILED: {RankState.STOPPING},
}
"""Which state may follow which; changed in `Rank.enter` alone."""


@dataclass(slots=True, eq=False)
class Rank:
    """What is running for one rank of the plan.

    Args:
        spec: what was asked for.
        identity: its names, those of the incarnation that is running or was last.
        state: where it is in its life; None before its first start.
        since: Unix time at which it entered that state, seconds.
        answers: whether its engine takes part: it is READY, and neither hung nor about to end.
        handle: the incarnation's process.
        link: the incarnation's sockets.
        report: what its engine said of itself.
        ready_response: what its engine found out while it started.
        restarts: when it was restarted within the window of the policy, monotonic seconds.
        restart_count: how often it was restarted in all.
        last_exit: how an earlier incarnation ended.
        down_since: when it went down unasked and is not back yet, monotonic seconds.
        recovery_s: for each time that it came back, the seconds that it was away.
        weights: which of the group's weights it has, by their number; 0 for those that it started with.
        stale: why it has not the group's weights; "" when it has, or is not up.
        admitted: whether this incarnation has been brought to where the group is, or found to be stale.
    """

    spec: RankSpec
    identity: Identity
    state: RankState | None = None
    since: float = field(default_factory=time.time)
    answers: bool = False
    handle: RankHandle | None = None
    link: RankLink | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    ready_response: Mapping[str, Any] = field(default_factory=dict)
    restarts: list[float] = field(default_factory=list)
    restart_count: int = 0
    last_exit: Exit | None = None
    down_since: float | None = None
    recovery_s: list[float] = field(default_factory=list)
    weights: int = 0
    stale: str = ""
    admitted: bool = False

    def enter(self, state: RankState) -> None:
        """Changes the state."""
        if state not in LEGAL[self.state]:
            raise RuntimeError(f"rank {self.identity.rank} cannot go from {self.state} to {state}")
        self.state = state
        self.since = time.time()
