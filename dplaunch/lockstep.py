"""Ranks that step together share one fate: the death of one ends the others, and the group is restarted as a whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from dplaunch.backoff import backoff_s, counted
from dplaunch.errors import DplaunchError
from dplaunch.events import Event, Kind, Level
from dplaunch.keeper import RankKeeper
from dplaunch.together import bring_up_all
from dplaunch.tools import Tools


class LockstepGroup:
    """The life of a group in lockstep.

    Args:
        keepers: all of its ranks.
        tools: what they are kept with.
    """

    def __init__(self, keepers: Sequence[RankKeeper], tools: Tools) -> None:
        self._keepers = keepers
        self._tools = tools
        self._restarts: list[float] = []

    async def live(self) -> tuple[RankKeeper, str]:
        """Watches the group, and restarts it when a rank dies; returns, with that rank and the cause, when it ends."""
        while True:
            first, cause = await self._until_one_is_down()
            number = first.rank.identity.rank
            self._say(f"rank {number} is gone, and all ranks step together: the group is restarted")
            await self._end_all(f"rank {number} died, and the group steps together")
            if not await self._restart():
                return first, cause

    async def _until_one_is_down(self) -> tuple[RankKeeper, str]:
        watches = {asyncio.create_task(keeper.until_down()): keeper for keeper in self._keepers}
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            # In rank order, where several were seen at once.
            watch = next(watch for watch in watches if watch in done)
            return watches[watch], watch.result()
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    async def _end_all(self, reason: str) -> None:
        await asyncio.gather(*(keeper.end(reason) for keeper in self._keepers))

    async def _restart(self) -> bool:
        """Brings all back, as often as the policy allows for the group; False when it does not come back."""
        policy = self._tools.spec.restart
        while True:
            now = time.monotonic()
            self._restarts = counted(self._restarts, policy, now)
            if len(self._restarts) >= policy.limit:
                return False
            if wait_s := backoff_s(len(self._restarts), policy):
                await asyncio.sleep(wait_s)
            self._restarts.append(now)
            for keeper in self._keepers:
                keeper.rank.restarts = list(self._restarts)
                keeper.renew()
            try:
                await bring_up_all(self._keepers, time.monotonic() + self._tools.spec.start_timeout_s, join=False)
            except Exception as error:  # whatever it was: the policy says how often to try
                said = error.message if isinstance(error, DplaunchError) else f"{type(error).__name__}: {error}"
                self._say(f"the group could not be started again: {said}")
                await self._end_all("the group could not be started again")
            else:
                # Only now: a rank that had requests before its peers are there would wait for them.
                for keeper in self._keepers:
                    keeper.join()
                return True

    def _say(self, words: str) -> None:
        self._tools.emit(Event(message=words, kind=Kind.GROUP, level=Level.WARNING))
