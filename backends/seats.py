"""The seats of a group's ranks: taken, kept from one incarnation to the next, given back."""

from __future__ import annotations

import asyncio
import contextlib

from . import nodes, seat
from .needs import Need
from .seat import Seat


class Seats:
    """By rank. Lives in one event loop.

    Attributes:
        needs: what each rank's seat holds.
    """

    def __init__(self) -> None:
        self.needs: dict[int, Need] = {}
        self._taken: dict[int, asyncio.Task[Seat]] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def need(self, rank: int) -> Need:
        """What the rank's seat holds; the least that there is for one that nobody planned."""
        return self.needs.get(rank, Need())

    def take(self, rank: int, name: str, node_id: str | None) -> asyncio.Task[Seat]:
        """Begins to take a seat for the rank, on a node unless it is the user's group that decides."""
        need = self.need(rank)
        self._taken[rank] = asyncio.create_task(seat.take(name, need, None if need.group is not None else node_id))
        return self._taken[rank]

    def get(self, rank: int) -> asyncio.Task[Seat] | None:
        """The seat that the rank has or is about to get; None where it has none, or lost it."""
        seating = self._taken.get(rank)
        if seating is None or not seating.done():
            return seating
        if seating.cancelled() or seating.exception() is not None:
            return None
        if not seating.result().lost.done():
            return seating
        seating.result().leave()
        return None

    async def release(self, rank: int) -> None:
        """Gives the rank's seat back, and waits a moment until the cluster shows it as free."""
        need, seating = self.need(rank), self._taken.pop(rank, None)
        self.needs.pop(rank, None)
        if seating is None:
            return
        if not seating.done() or seating.cancelled() or seating.exception() is not None:
            await _leave(seating)
            return
        taken = seating.result()
        async with nodes.given_back(taken.sight.node_id, {} if need.group is not None else need.held()):
            taken.leave()

    async def close(self) -> None:
        """Gives all back."""
        for seating in self._taken.values():
            await _leave(seating)
        self._taken.clear()


async def _leave(seating: asyncio.Task[Seat]) -> None:
    seating.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        (await seating).leave()
