"""Ranks that come up side by side: a group's start, and the restart of a group in lockstep."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from dplaunch.events import Level, RankState
from dplaunch.keeper import RankKeeper


async def bring_up_all(keepers: Sequence[RankKeeper], deadline: float, *, join: bool = True) -> None:
    """Brings ranks up side by side; returns when every one is ready.

    The first failure is the root cause: it is raised, and the other starts are given up.

    Args:
        keepers: the ranks.
        deadline: monotonic time, seconds.
        join: as for `RankKeeper.bring_up`.

    Raises:
        RankFailedError: when a rank ends before all are ready.
        StartTimeoutError: when one is not ready in time.
    """
    starts = [asyncio.create_task(keeper.bring_up(deadline, join=join)) for keeper in keepers]
    all_up = asyncio.gather(*starts)
    guards = [asyncio.create_task(_guard(keeper, up)) for keeper, up in zip(keepers, starts, strict=True)]
    try:
        watched: list[asyncio.Future[Any]] = [all_up, *guards]
        done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        for ended in done:
            ended.result()
    finally:
        for task in (*starts, *guards):
            task.cancel()
        await asyncio.gather(all_up, *guards, return_exceptions=True)


async def _guard(keeper: RankKeeper, up: asyncio.Task[None]) -> None:
    """Ends with an error when a rank dies after it was ready, while others are still starting."""
    await asyncio.wait((up,))
    rank = keeper.rank
    if up.cancelled() or up.exception() is not None or rank.handle is None or rank.link is None:
        await asyncio.Event().wait()  # Told by its start; a guard has nothing to add.
        return
    error = await keeper.failure(rank.link, await rank.handle.wait())
    keeper.enter(RankState.DOWN, error.message, Level.ERROR)
    raise error
