"""After a death, requests move when the other ranks have shown that they outlived it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from dplaunch.settle import Settling
from dplaunch.testing import poll_until_async


class Ranks:
    """Ranks that answer when they are told to."""

    def __init__(self, count: int) -> None:
        self.links: list[Any] = [SimpleNamespace(rank=rank) for rank in range(count)]
        self.asked: list[tuple[int, asyncio.Future[None]]] = []
        self.settling = Settling(0.01, lambda: self.links, self._ping)

    async def _ping(self, link: Any) -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked.append((link.rank, answer))
        await answer


async def test_it_is_settled_when_every_other_rank_has_answered_or_gone_down() -> None:
    ranks = Ranks(2)
    settled = ranks.settling.begin()
    await poll_until_async(lambda: len(ranks.asked) == 2)
    assert not settled.done()
    ranks.asked[0][1].set_result(None)
    ranks.asked[1][1].set_exception(RuntimeError("it went down"))
    await settled


async def test_a_rank_that_does_not_answer_holds_nobody_up_for_long() -> None:
    ranks = Ranks(1)
    await asyncio.wait_for(ranks.settling.begin(), 30)
    assert ranks.asked[0][1].cancelled()


async def test_deaths_that_come_together_are_settled_together_and_a_later_one_anew() -> None:
    ranks = Ranks(1)
    first = ranks.settling.begin()
    assert ranks.settling.begin() is first
    await poll_until_async(lambda: ranks.asked)
    second = ranks.settling.begin()
    assert second is not first
    await poll_until_async(lambda: len(ranks.asked) == 2)
    for _, answer in ranks.asked:
        answer.set_result(None)
    await asyncio.gather(first, second)


async def test_the_last_rank_of_all_has_nobody_to_wait_for() -> None:
    ranks = Ranks(0)
    await asyncio.wait_for(ranks.settling.begin(), 30)
    assert ranks.asked == []


async def test_what_is_given_up_is_cancelled() -> None:
    ranks = Ranks(1)
    settled = ranks.settling.begin()
    ranks.settling.give_up()
    assert (await asyncio.gather(settled, return_exceptions=True))[0].__class__ is asyncio.CancelledError
