"""The ranks of a running group, as something that is told what to do and acknowledges it, all of them together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from dplaunch.client import GroupClient
from dplaunch.errors import GroupDeadError, WeightsError
from dplaunch.events import Event, Kind, Listener
from dplaunch.hosts import Failures
from dplaunch.rank import Rank
from dplaunch.weights import Weights

if TYPE_CHECKING:
    from dplaunch.keeper import RankKeeper


ACKNOWLEDGE_S = 30.0
"""Seconds that ranks get at least to acknowledge a step; an engine's step, which comes first, may take seconds."""


class Crew:
    """What all changes of a running group need. Lives in the group's event loop.

    Args:
        weights: what the ranks should have.
        client: has the requests.
        keepers: the group's ranks at this moment.
        replace: ends ranks without blame, and has them come up again.
        emit: told what happens.
        forget_media: has the frontend send images whole again, before the engines forget them.
    """

    def __init__(
        self,
        weights: Weights,
        client: GroupClient,
        *,
        keepers: Callable[[], Sequence[RankKeeper]],
        replace: Callable[[Sequence[RankKeeper], str], Coroutine[Any, Any, None]],
        emit: Listener,
        forget_media: Callable[[], Awaitable[None]],
    ) -> None:
        self.weights = weights
        self.client = client
        self.replace = replace
        self.emit = emit
        self.forget_media = forget_media
        self.one = asyncio.Lock()
        """Held by the change that is under way; the next one waits for it."""
        self._keepers = keepers

    @property
    def targets(self) -> list[RankKeeper]:
        """The ranks that are there to be changed: each that is up, the stale ones included."""
        return [
            keeper
            for keeper in self._keepers()
            if keeper.rank.admitted and keeper.rank.link is not None and not keeper.rank.link.closed
        ]

    @property
    def absent(self) -> list[int]:
        """The numbers of the ranks that are not there to be changed."""
        there = self.targets
        return [keeper.rank.identity.rank for keeper in self._keepers() if keeper not in there]

    async def tell_all(self, method: str, *args: Any, deadline: float) -> None:
        """Calls every rank; one that lives and does not do as it is told is replaced.

        Each gets `ACKNOWLEDGE_S` at least, also when what came before has used up the time.

        Raises:
            WeightsError: when it fails in all of them: that is no rank's fault, and none is replaced.
        """
        keepers = self.targets
        deadline = max(deadline, time.monotonic() + ACKNOWLEDGE_S)
        _, failed = await self.weights.ask_all([keeper.rank for keeper in keepers], method, *args, deadline=deadline)
        if failed and len(failed) == len(keepers) and all(isinstance(each, RuntimeError) for each in failed.values()):
            rank, error = next(iter(failed.items()))
            raise WeightsError(f"{method} fails in all ranks: {named(rank, error)}") from error
        await self.put_aside(keepers, failed)

    async def put_aside(self, keepers: Sequence[RankKeeper], failed: Failures) -> None:
        """Replaces ranks that failed and live; those that died come back by themselves."""
        for keeper in keepers:
            error = failed.get(keeper.rank)
            # One that is not admitted any more has died since, and its next incarnation waits to be.
            if error is not None and keeper.rank.admitted and not isinstance(error, GroupDeadError):
                keeper.rank.admitted = False
                await self.replace([keeper], words_of(error))

    def say(self, words: str) -> None:
        """Tells of a change."""
        data = {"stance": self.weights.stance.value}
        self.emit(Event(message=words, kind=Kind.WEIGHTS, data=data))


def words_of(error: BaseException) -> str:
    """What an error says, in one line where it is one of ours."""
    return getattr(error, "message", None) or str(error) or type(error).__name__


def named(rank: Rank, error: BaseException) -> str:
    """The same, with the rank in front."""
    words = words_of(error)
    start = f"rank {rank.identity.rank}"
    return words if words.startswith(start) else f"{start}: {words}"
