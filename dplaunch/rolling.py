"""Ranks that are restarted on request: drained, ended, and brought back the way in which all ranks come up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dplaunch.errors import DplaunchError, RankFailedError
from dplaunch.events import RankState
from dplaunch.leaving import leave

if TYPE_CHECKING:
    from dplaunch.client import GroupClient
    from dplaunch.keeper import RankKeeper
    from dplaunch.supervisor import Supervisor

REASON = "restarted on request"


async def restart_ranks(
    supervisor: Supervisor, client: GroupClient, turns: Sequence[Sequence[RankKeeper]], drain_s: float
) -> None:
    """Restarts ranks, each turn when all of the one before are ready again.

    A rank that does not come back is brought back as one that died is, and no further turn is taken.

    Raises:
        RankFailedError: names the rank that did not come back, and those whose turn did not come.
    """
    for turn, keepers in enumerate(turns):
        try:
            await leave(supervisor, client, keepers, drain_s, REASON)
            for keeper in keepers:
                keeper.renew()
            await _bring_back(supervisor, keepers)
        except DplaunchError as error:
            left = [keeper.rank.identity.rank for later in turns[turn + 1 :] for keeper in later]
            if not left:
                raise
            raise RankFailedError(
                f"{error.message}; not restarted: {', '.join(map(str, left))}", hint=error.hint, detail=error.detail
            ) from error


async def _bring_back(supervisor: Supervisor, keepers: Sequence[RankKeeper]) -> None:
    deadline = time.monotonic() + supervisor.start_timeout_s
    starts = [asyncio.create_task(keeper.bring_up(deadline)) for keeper in keepers]
    try:
        await asyncio.gather(*starts, return_exceptions=True)
    finally:
        if not supervisor.is_stopping:
            for keeper, start in zip(keepers, starts, strict=True):
                if keeper.rank.state not in (RankState.READY, RankState.STALE):
                    await keeper.put_down(_error_of(start))
                supervisor.tend(keeper)
    for start in starts:
        start.result()


def _error_of(start: asyncio.Task[None]) -> BaseException:
    if start.done() and not start.cancelled() and (error := start.exception()) is not None:
        return error
    return RankFailedError("its restart was given up")
