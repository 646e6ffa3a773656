"""Ranks that end on request: their requests get time to end, and what is left then goes on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from dplaunch.errors import DplaunchError
from dplaunch.events import RankState

if TYPE_CHECKING:
    from dplaunch.client import GroupClient
    from dplaunch.keeper import RankKeeper
    from dplaunch.rank import Rank
    from dplaunch.supervisor import Supervisor

DRAIN_S = 30.0
"""Seconds for requests to end on a rank that leaves, unless told otherwise: what Kubernetes gives a pod by default."""


async def leave(
    supervisor: Supervisor, client: GroupClient, keepers: Sequence[RankKeeper], drain_s: float, reason: str
) -> None:
    """Ends ranks: they take no new request, and their processes end when the ones that they have are done.

    What is not done after `drain_s` seconds moves to other ranks, or waits for one. Given up while it still waits,
    it leaves the ranks as they were.

    Args:
        supervisor: watches the ranks until now.
        client: has the requests.
        keepers: the ranks'.
        drain_s: seconds for all of them together.
        reason: why, for messages.
    """
    try:
        for keeper in keepers:
            client.retire(keeper.rank.identity.rank)
        for keeper in keepers:
            await supervisor.let_be(keeper)
        await _until_idle(client, keepers, drain_s)
    except BaseException:
        for keeper in keepers:
            await _stay(supervisor, keeper)
        raise
    await to_the_end(end(supervisor, client, keepers, reason))


async def end(supervisor: Supervisor, client: GroupClient, keepers: Sequence[RankKeeper], reason: str) -> None:
    """Ends ranks that nobody watches, now: those that serve by SIGTERM, and by SIGKILL at the deadline."""
    for keeper in keepers:
        rank = keeper.rank
        serves, link = _serves(rank), rank.link
        died = rank.handle is not None and rank.handle.poll() is not None
        keeper.ask_to_stop(reason)
        if serves and link is not None:
            # No await since the engine was asked to end: nothing of its end has reached a request.
            client.down(link, reason, blame=died)
    await supervisor.until_stopped(keepers)


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Runs what must not be left half-done; a cancellation waits for its end."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


async def _until_idle(client: GroupClient, keepers: Sequence[RankKeeper], seconds: float) -> None:
    waits = [asyncio.ensure_future(_idle_or_dead(client, keeper.rank)) for keeper in keepers if _serves(keeper.rank)]
    if not waits:
        return
    try:
        await asyncio.wait(waits, timeout=seconds)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _idle_or_dead(client: GroupClient, rank: Rank) -> None:
    if rank.handle is None:
        return
    either = [
        asyncio.ensure_future(client.idle(rank.identity.rank)),
        asyncio.ensure_future(rank.handle.wait()),
    ]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in either:
            each.cancel()


async def _stay(supervisor: Supervisor, keeper: RankKeeper) -> None:
    """The rank serves on as if nothing had been asked of it."""
    if supervisor.is_stopping or keeper.rank.state is RankState.FAILED:
        return
    if _serves(keeper.rank):
        keeper.join()
    elif keeper.rank.state is RankState.STARTING:
        await keeper.put_down(DplaunchError("it was interrupted"))
    supervisor.tend(keeper)


def _serves(rank: Rank) -> bool:
    return rank.state is RankState.READY and rank.answers
