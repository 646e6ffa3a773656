"""What a soak run does to a group: each hand harms it in one way, at ranks that chance chooses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil

from dplaunch.errors import DplaunchError, RankFailedError
from dplaunch.testing import When
from tests.chaos.load import Ask, End, Load, Tally, ask, follow
from tests.chaos.rig import POISON, Rig

FEWEST, MOST = 4, 8
"""Ranks between which a run scales."""


@dataclass(frozen=True, slots=True)
class Hand:
    """One kind of harm.

    Args:
        does: does it.
        weight: how often, beside the others.
        real: whether vLLM's own engine can be harmed so.
    """

    does: Callable[[Hands], Awaitable[None]]
    weight: int
    real: bool = False


class Hands:
    """Harms a group, one way at a time.

    Args:
        rig: the group.
        source: the run's chance.
        tally: what becomes of the requests that it sends itself.
        real: whether the engines are vLLM's own.
    """

    def __init__(self, rig: Rig, source: random.Random, tally: Tally, *, real: bool) -> None:
        self.done: Counter[str] = Counter()
        self.poisoned = Tally()
        self._rig = rig
        self._source = source
        self._tally = tally
        self._kinds = {name: hand for name, hand in HANDS.items() if hand.real or not real}

    async def strike(self) -> str:
        """Does one thing; what it was."""
        (name,) = self._source.choices(list(self._kinds), [hand.weight for hand in self._kinds.values()])
        await self._kinds[name].does(self)
        self.done[name] += 1
        return name

    def _one(self) -> int:
        return self._source.choice(self._rig.group.client.ranks)

    def _signal(self, count: int, number: signal.Signals) -> None:
        up = self._rig.group.client.ranks
        # A rank that has just died may be in routing still, until its exit is seen.
        with contextlib.suppress(ProcessLookupError):
            self._rig.kill(*self._source.sample(up, min(count, len(up))), by=number)

    async def kill(self) -> None:
        self._signal(1, signal.SIGKILL)

    async def kill_two(self) -> None:
        self._signal(2, signal.SIGKILL)

    async def kill_all(self) -> None:
        self._signal(len(self._rig.group.client.ranks), signal.SIGKILL)

    async def segfault(self) -> None:
        self._signal(1, signal.SIGSEGV)

    async def terminate(self) -> None:
        self._signal(1, signal.SIGTERM)

    async def freeze(self) -> None:
        self._signal(1, signal.SIGSTOP)

    async def freeze_for_a_moment(self) -> None:
        """Shorter than the probe's deadline: the rank must not be taken for hung."""
        pid = self._rig.pid(self._one())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(self._source.uniform(0.05, 0.5))
            os.kill(pid, signal.SIGCONT)

    async def kill_worker(self) -> None:
        # Rank or worker may have died a moment ago of something else.
        with contextlib.suppress(psutil.NoSuchProcess):
            self._rig.kill_worker(self._one())

    async def kill_zygote(self) -> None:
        self._rig.kill_zygote(self._one())

    async def stick(self) -> None:
        await self._misbehave(when=When.AFTER_READY, hang=True)

    async def break_down(self) -> None:
        await self._misbehave(when=When.REQUEST, error="the forward pass failed")

    async def die_at_a_request(self) -> None:
        await self._misbehave(
            when=When.REQUEST, returncode=-signal.SIGABRT, nth=self._source.randrange(1, 4), after_tokens=0
        )

    async def die_in_an_answer(self) -> None:
        await self._misbehave(when=When.REQUEST, returncode=3, after_tokens=self._source.randrange(1, 20))

    async def _misbehave(self, **fault: object) -> None:
        # It may have died a moment ago of something else.
        with contextlib.suppress(DplaunchError):
            await self._rig.misbehave(self._one(), **fault)

    async def scale(self) -> None:
        """More ranks, or fewer. The unlucky ones stay, so that nothing keeps those that join from starting."""
        await self._rig.group.scale(self._source.randrange(FEWEST, MOST + 1), self._drain_s())

    async def roll(self) -> None:
        """Every rank is restarted on request, one after the other; it ends at the first that fails to start."""
        with contextlib.suppress(RankFailedError):
            await self._rig.group.restart(rolling=True, drain_s=self._drain_s())

    async def restart_one(self) -> None:
        with contextlib.suppress(RankFailedError):
            await self._rig.group.restart([self._one()], drain_s=self._drain_s())

    async def scale_under_fire(self) -> None:
        """A rank dies while their number changes: the change may fail, the group may not."""
        change = asyncio.ensure_future(self.scale())
        await asyncio.sleep(self._source.uniform(0.0, 0.5))
        await self.kill()
        with contextlib.suppress(DplaunchError):
            await change

    def _drain_s(self) -> float:
        # So short that most requests move, or so long that none has to.
        return self._source.choice((0.1, 20.0))

    async def poison(self) -> None:
        """A request that ends every rank that it is on."""
        tally = self.poisoned
        before = tally.ends[End.FAILED]
        await follow(self._rig.group, ask([5, POISON, 6], 20), f"poison-{tally.offered}", tally)
        if tally.ends[End.FAILED] != before + 1:
            self._tally.wrong.append(f"a poisonous request did not fail: {tally}")

    async def leave_in_crowds(self) -> None:
        """Thirty clients that go away after a token or two."""

        def leaving() -> Ask:
            return ask([self._source.randrange(20, 900)], 60, leave_after=self._source.randrange(1, 3))

        names = [f"crowd-{self.done['leave_in_crowds']}-{index}" for index in range(30)]
        await asyncio.gather(*(follow(self._rig.group, leaving(), name, self._tally) for name in names))

    async def give_up(self) -> None:
        """Clients that are cancelled at any moment, before their first token too."""
        load = Load(self._rig.group, lambda: ask([self._source.randrange(20, 900)], 200), streams=10, tally=Tally())
        await load.__aenter__()
        await asyncio.sleep(self._source.uniform(0.0, 0.2))
        await load.give_up()
        load.tally.ends[End.LEFT] += load.tally.accepted - load.tally.ends.total()
        self._tally.add(load.tally)


HANDS = {
    "kill": Hand(Hands.kill, 6, real=True),
    "kill_two": Hand(Hands.kill_two, 2, real=True),
    "kill_all": Hand(Hands.kill_all, 1),
    "segfault": Hand(Hands.segfault, 3, real=True),
    "terminate": Hand(Hands.terminate, 3, real=True),
    "freeze": Hand(Hands.freeze, 2, real=True),
    "freeze_for_a_moment": Hand(Hands.freeze_for_a_moment, 2, real=True),
    "kill_worker": Hand(Hands.kill_worker, 3, real=True),
    "kill_zygote": Hand(Hands.kill_zygote, 1, real=True),
    "stick": Hand(Hands.stick, 2),
    "break_down": Hand(Hands.break_down, 2),
    "die_at_a_request": Hand(Hands.die_at_a_request, 2),
    "die_in_an_answer": Hand(Hands.die_in_an_answer, 3),
    "scale": Hand(Hands.scale, 3),
    "scale_under_fire": Hand(Hands.scale_under_fire, 1),
    "restart_one": Hand(Hands.restart_one, 2, real=True),
    "roll": Hand(Hands.roll, 1),
    "poison": Hand(Hands.poison, 1),
    "leave_in_crowds": Hand(Hands.leave_in_crowds, 2),
    "give_up": Hand(Hands.give_up, 2),
}
"""All of them. Scaling and restarts on request count as harm too: nobody may notice them."""
