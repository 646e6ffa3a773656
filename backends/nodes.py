"""Questions about nodes that are in use: whether they live, and what they have free again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from dplaunch.errors import BackendError

from . import survey
from .probe import ask
from .survey import ClusterNode

FREE_AGAIN_S = 1.0
"""Seconds to wait at the end for Ray to have counted what was given back; it takes a tenth."""

FREE_POLL_S = 0.02


async def is_alive(node_id: str) -> bool:
    """Whether a node is alive, as the cluster knows."""
    import ray

    nodes = await asyncio.to_thread(ray.nodes)
    return any(each["NodeID"] == node_id and each["Alive"] for each in nodes)


async def answers(node: ClusterNode) -> bool:
    """Whether a node is there: Ray may take a while to count a lost one as dead."""
    if not await is_alive(node.id):
        return False
    if not node.here:
        with contextlib.suppress(BackendError):
            await ask(node.id, node.name, ())
            return True
    return node.here


@contextlib.asynccontextmanager
async def given_back(node_id: str, held: Mapping[str, float]) -> AsyncIterator[None]:
    """For what gives back a part of a node: waits at the end until Ray shows it as free, so that it can be planned."""
    before = await asyncio.to_thread(survey.free_of, node_id) if held else {}
    yield
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FREE_AGAIN_S):
            while not _has(await asyncio.to_thread(survey.free_of, node_id) if held else {}, before, held):
                await asyncio.sleep(FREE_POLL_S)


def _has(free: Mapping[str, float], before: Mapping[str, float], more: Mapping[str, float]) -> bool:
    # Ray counts in ten-thousandths, and we in floats.
    return all(free.get(kind, 0.0) >= before.get(kind, 0.0) + count - 1e-4 for kind, count in more.items())


async def free_again(nodes: Sequence[ClusterNode]) -> None:
    """Waits until Ray shows as free what it did before the seats: whoever launches next plans with that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FREE_AGAIN_S):
            while not await asyncio.to_thread(survey.are_free, nodes):
                await asyncio.sleep(FREE_POLL_S)
