"""Ranks that come up in a group that has changed since its start: brought to where it is, those that wait together.

A group loses several ranks at once when a node goes, or when all are restarted for weights that could not be loaded.
One after the other they would each read the source anew, and the last would wait for all before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from dplaunch.errors import WeightsError
from dplaunch.hosts import Failures
from dplaunch.rank import Rank
from dplaunch.seam import weights as seam
from dplaunch.weights import Stance, Weights

Waiting = dict[Rank, "asyncio.Future[None]"]


class Arrivals:
    """Lives in the group's event loop.

    Args:
        weights: what the ranks should have.
        peers: the ranks without which none can be brought along: in lockstep all, since they pause together.
    """

    def __init__(self, weights: Weights, peers: Callable[[], Sequence[Rank]] = tuple) -> None:
        self._weights = weights
        self._peers = peers
        self._waiting: Waiting = {}
        self._bringing: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many ranks are not where the group is yet."""
        return len(self._waiting)

    async def admit(self, rank: Rank) -> None:
        """Brings a rank, which has just proved itself, to where the group is; its `stale` says why it cannot be.

        Raises:
            Exception: when the rank fails at it; it is no better than one that did not come up.
        """
        rank.weights, rank.stale, rank.admitted = 0, "", False
        if not self._weights.has_changed() and not self._weights.lock.locked():
            # No await since the look: a change that begins now finds the rank among those that it is for.
            rank.admitted = True
            return
        done = self._waiting[rank] = asyncio.get_running_loop().create_future()
        if self._are_complete() and (self._bringing is None or self._bringing.done()):
            # In a task of its own: a rank that dies meanwhile gives up its own wait, and the others' goes on.
            self._bringing = asyncio.create_task(self._bring_all())
        try:
            await done
        finally:
            if self._waiting.get(rank) is done:
                del self._waiting[rank]

    async def close(self) -> None:
        """Nobody is brought along any more. Idempotent."""
        if self._bringing is not None:
            self._bringing.cancel()
            await asyncio.wait((self._bringing,))

    def _are_complete(self) -> bool:
        return all(rank.admitted or rank in self._waiting for rank in self._peers())

    async def _bring_all(self) -> None:
        while self._waiting and self._are_complete():
            async with self._weights.lock:
                together = dict(self._waiting)
                try:
                    stale, failed = await self._bring_along(list(together))
                except Exception as error:
                    stale, failed = {}, dict.fromkeys(together, error)
                for rank, done in together.items():
                    self._tell(rank, done, stale.get(rank, ""), failed.get(rank))

    def _tell(self, rank: Rank, done: asyncio.Future[None], stale: str, error: Exception | None) -> None:
        if self._waiting.get(rank) is not done:
            return  # It has died since, and may have come up as another incarnation, which waits anew.
        del self._waiting[rank]
        if error is not None:
            done.set_exception(error)
            return
        rank.weights, rank.stale = 0 if stale else self._weights.number, stale
        # While the lock is held: the next change finds the rank among those that it is for.
        rank.admitted = True
        done.set_result(None)

    async def _bring_along(self, ranks: list[Rank]) -> tuple[dict[Rank, str], Failures]:
        """Which of them stay stale, and why; and which failed."""
        weights = self._weights
        stale, failed = await self._replay(ranks) if weights.number else ({}, {})
        for lora in weights.loras.values():
            _, without = await weights.ask_all(_left(ranks, failed), "add_lora", lora)
            # One that cannot be read any more fails the requests that name it, and is no reason to be without the rank.
            failed |= {rank: error for rank, error in without.items() if not isinstance(error, RuntimeError)}
        if weights.stance is Stance.PAUSED:
            failed |= (await weights.ask_all(_left(ranks, failed), "pause_scheduler", "abort", True))[1]
        elif weights.stance is Stance.ASLEEP:
            # Not at level 2: it would have to be given its weights once more when it wakes.
            failed |= (await weights.ask_all(_left(ranks, failed), "sleep", 1, "abort"))[1]
        return stale, failed

    async def _replay(self, ranks: list[Rank]) -> tuple[dict[Rank, str], Failures]:
        """Gives ranks the current weights once more: one reading of the source for all of them."""
        weights = self._weights
        if why := weights.source.lost():
            return dict.fromkeys(ranks, why), {}
        stale: dict[Rank, str] = {}
        try:
            failed = await weights.load(ranks, weights.source, verify=bool(weights.checksum))
        except WeightsError as error:
            return dict.fromkeys(ranks, error.message), {}
        if weights.checksum:
            checksums, silent = await weights.ask_all(_left(ranks, failed), seam.CHECKSUM)
            failed |= silent
            other = "they were changed since: the checksum of what it loaded is another"
            wanted = {rank: weights.checksum_of(rank.identity.rank) for rank in checksums}
            stale = {rank: other for rank, told in checksums.items() if wanted[rank] not in ("", told)}
        good = [rank for rank in _left(ranks, failed) if rank not in stale]
        return stale, failed | (await weights.ask_all(good, "set_weight_version", weights.version))[1]


def _left(ranks: list[Rank], failed: Failures) -> list[Rank]:
    return [rank for rank in ranks if rank not in failed]
