"""A group's size at run time: ranks that join it, all of them or none, and ranks that leave it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dplaunch.events import Event, Kind, Level, Listener
from dplaunch.extend import plan_more, shrink
from dplaunch.identity import Identity
from dplaunch.leaving import end, leave, to_the_end
from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.together import bring_up_all

if TYPE_CHECKING:
    from dplaunch.backend import Backend
    from dplaunch.changes import Host
    from dplaunch.client import GroupClient
    from dplaunch.keeper import RankKeeper
    from dplaunch.supervisor import Supervisor


class Scaler:
    """Adds ranks to a group and takes the last ones away. Its arguments are those of `dplaunch.changes.Changes`."""

    def __init__(
        self,
        supervisor: Supervisor,
        backend: Backend,
        client: GroupClient,
        host: Host,
        environ: Mapping[str, str],
        emit: Listener,
    ) -> None:
        self._supervisor = supervisor
        self._backend = backend
        self._client = client
        self._host = host
        self._environ = environ
        self._emit = emit
        self._last: dict[int, Identity] = {}

    async def up(self, dp: int) -> None:
        """Starts ranks side by side until there are `dp`; they take requests when all are ready.

        Raises:
            ResourceError: when they do not fit; nothing has been started then.
            RankFailedError: when one of them does not come up; all of them have been ended then.
        """
        before = self._host.plan
        plan = self._renamed(await plan_more(before, dp, self._backend, self._environ), len(before.ranks))
        for warning in plan.warnings[len(before.warnings) :]:
            self._emit(Event(message=warning, level=Level.WARNING))
        new = plan.ranks[len(before.ranks) :]
        self._say_where(new)
        keepers = [self._supervisor.make_keeper(spec) for spec in new]
        self._supervisor.keepers.extend(keepers)
        try:
            self._host.resize(dp)
            await self._backend.reserve(new)
            await bring_up_all(keepers, time.monotonic() + self._supervisor.start_timeout_s, join=False)
        except BaseException:
            if not self._supervisor.is_stopping:
                await to_the_end(self._take_away(keepers, "the group is not scaled up after all"))
            raise
        self._host.plan = plan
        for keeper in keepers:
            self._host.welcome(keeper.rank)
            keeper.join()
            self._supervisor.tend(keeper)

    async def down(self, dp: int, drain_s: float) -> None:
        """Ends the ranks from `dp` on, the highest first, without losing a request of theirs."""
        keepers = self._supervisor.keepers[dp:][::-1]
        reason = f"the group is scaled down to {dp}"
        await leave(self._supervisor, self._client, keepers, drain_s, reason)
        self._host.plan = shrink(self._host.plan, dp)
        await to_the_end(self._take_away(keepers, reason))

    async def _take_away(self, keepers: Sequence[RankKeeper], reason: str) -> None:
        """Ends what still runs of ranks that leave the group, and all that was theirs."""
        await end(self._supervisor, self._client, keepers, reason)
        for keeper in keepers:
            rank = keeper.rank.identity.rank
            self._last[rank] = keeper.rank.identity
            self._supervisor.keepers.remove(keeper)
            self._client.forget(rank)
        self._host.resize(len(self._supervisor.keepers))
        self._supervisor.check_left()
        for keeper in keepers:
            await self._backend.release(keeper.rank.identity.rank)

    def _renamed(self, plan: LaunchPlan, running: int) -> LaunchPlan:
        """A rank that was here before is its next incarnation: what a peer cached by name must not be the old one."""

        def renamed(spec: RankSpec) -> RankSpec:
            last = self._last.get(spec.identity.rank)
            return spec if last is None else replace(spec, identity=last.restarted())

        return replace(plan, ranks=(*plan.ranks[:running], *map(renamed, plan.ranks[running:])))

    def _say_where(self, ranks: Sequence[RankSpec]) -> None:
        for rank in ranks:
            number = rank.identity.rank
            where = f"node {rank.node}, {rank.device_type} {','.join(rank.devices) or 'any'}"
            self._emit(
                Event(
                    message=f"rank {number} joins on {where}; log: {rank.log_file}",
                    kind=Kind.SCALE,
                    rank=number,
                    incarnation=rank.identity.incarnation,
                    data={"log_file": str(rank.log_file)},
                )
            )
