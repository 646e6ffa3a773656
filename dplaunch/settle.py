"""The moment between a rank's death and the move of its requests: of ranks that die together, all should be seen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from dplaunch.link import RankLink

OUTLIVE_S = 1.0
"""Seconds that the other ranks have to show that they outlived a death: a step of a busy engine, and some more."""


class Settling:
    """Finds out which ranks have outlived a death, so that no request moves to one that is dead already.

    A request that did would count a death that it has nothing to do with, and might fail of two.

    Args:
        seconds: until the others are asked; deaths meanwhile are settled together.
        links: the ranks that take requests.
        ping: asks an engine whether it is there; ends by an error when it goes down.
    """

    def __init__(
        self, seconds: float, links: Callable[[], Iterable[RankLink]], ping: Callable[[RankLink], Awaitable[Any]]
    ) -> None:
        self._seconds = seconds
        self._links = links
        self._ping = ping
        self._waiting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> asyncio.Task[None]:
        """A rank has died. Done when the others have answered, gone down too, or had `OUTLIVE_S`."""
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_task(self._settle())
            self._tasks.add(self._waiting)
            self._waiting.add_done_callback(self._tasks.discard)
        return self._waiting

    def give_up(self) -> None:
        """Nothing is left to move."""
        for task in self._tasks:
            task.cancel()

    async def _settle(self) -> None:
        await asyncio.sleep(self._seconds)
        self._waiting = None  # A death from now on has to be outlived anew.
        pings = [asyncio.ensure_future(self._ping(link)) for link in self._links()]
        if not pings:
            return
        try:
            await asyncio.wait(pings, timeout=OUTLIVE_S)
        finally:
            for ping in pings:
                ping.cancel()
            await asyncio.gather(*pings, return_exceptions=True)
