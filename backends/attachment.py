"""One group's hold on its process's connection to Ray, for an event loop: connecting takes seconds, in a thread."""

from __future__ import annotations

import asyncio
import functools

from dplaunch.threads import in_thread

from . import cluster
from .cluster import Cluster, LocalSize

SETTLE_S = 20.0
"""Seconds to wait for a connection that is given up while it is made: Ray needs five on two busy cores."""


class Attachment:
    """Lives in one event loop; `give_up` is idempotent.

    Attributes:
        cluster: the connection; None before it is there and after it was given up.
    """

    def __init__(self) -> None:
        self.cluster: Cluster | None = None
        self._connecting: asyncio.Future[Cluster] | None = None

    async def attach(self, address: str | None, local: LocalSize) -> Cluster:
        """Connects at the first call; see `cluster.hold`."""
        if self._connecting is None:
            self._connecting = in_thread(functools.partial(cluster.hold, address, local), "ray-hold")
        self.cluster = await asyncio.shield(self._connecting)
        return self.cluster

    async def settle(self) -> Cluster | None:
        """The connection once it is made or has failed: one that is being made cannot be given up half-way."""
        if self._connecting is None:
            return None
        done, _ = await asyncio.wait((self._connecting,), timeout=SETTLE_S)
        if not done or self._connecting.exception() is not None:
            return None
        return self._connecting.result()

    async def give_up(self) -> None:
        """Gives up the hold; the last one of the process disconnects."""
        held = await self.settle()
        self._connecting = self.cluster = None
        if held is not None:
            await in_thread(functools.partial(cluster.release, held), "ray-release")
