"""What is done to a group under load, one function for each row of the table. Each returns when it has happened."""

from __future__ import annotations

import signal

import pytest

from dplaunch.errors import DplaunchError
from dplaunch.testing import When
from tests.chaos.load import End, Tally, ask, follow
from tests.chaos.rig import POISON, Rig


async def kill(rig: Rig) -> None:
    """SIGKILL."""
    await _signal(rig, signal.SIGKILL)


async def segfault(rig: Rig) -> None:
    """SIGSEGV."""
    await _signal(rig, signal.SIGSEGV)


async def terminate(rig: Rig) -> None:
    """SIGTERM: the engine ends in order, and says of its requests that they are aborted."""
    await _signal(rig, signal.SIGTERM)


async def freeze(rig: Rig) -> None:
    """SIGSTOP."""
    await _signal(rig, signal.SIGSTOP)


async def _signal(rig: Rig, number: signal.Signals) -> None:
    now = rig.incarnations()[1]
    rig.kill(1, by=number)
    await rig.down(1, now)


async def freeze_and_call(rig: Rig) -> None:
    """SIGSTOP, and a call that the rank cannot answer any more."""
    now = rig.incarnations()[1]
    rig.kill(1, by=signal.SIGSTOP)
    with pytest.raises(DplaunchError, match="rank 1"):
        await rig.group.call("dplaunch_report", rank=1)
    await rig.down(1, now)


async def get_stuck(rig: Rig) -> None:
    """Its process lives, its sockets take what comes, and its loop stands still."""
    now = rig.incarnations()[1]
    await rig.misbehave(1, when=When.AFTER_READY, hang=True)
    await rig.down(1, now)


async def kill_worker(rig: Rig) -> None:
    """SIGKILL to the process below the rank."""
    now = rig.incarnations()[1]
    rig.kill_worker(1)
    await rig.down(1, now)


async def kill_zygote(rig: Rig) -> None:
    """SIGKILL to the zygote, and to a rank once it is gone."""
    rig.kill_zygote(0)
    await kill(rig)


async def raise_error(rig: Rig) -> None:
    """The engine's loop raises at its next request."""
    now = rig.incarnations()[1]
    await rig.misbehave(1, when=When.REQUEST, error="the forward pass failed")
    await rig.down(1, now)


async def die_at_next_request(rig: Rig) -> None:
    """It ends when it gets its next request, before a token of it."""
    now = rig.incarnations()[1]
    await rig.misbehave(1, when=When.REQUEST, returncode=3)
    await rig.down(1, now)


async def die_in_an_answer(rig: Rig) -> None:
    """It ends in the middle of an answer."""
    now = rig.incarnations()[1]
    await rig.misbehave(1, when=When.REQUEST, returncode=-signal.SIGABRT, after_tokens=5)
    await rig.down(1, now)


async def kill_the_slow_one(rig: Rig) -> None:
    """Rank 2 takes its time at every other start."""
    for _ in range(2):
        now = rig.incarnations()[2]
        rig.kill(2)
        await rig.down(2, now)
        await rig.whole()


async def kill_the_unlucky_one(rig: Rig) -> None:
    """Rank 3 dies once before READY and once just behind it."""
    now = rig.incarnations()[3]
    rig.kill(3)
    await rig.down(3, now)


async def kill_two(rig: Rig) -> None:
    """SIGKILL to two ranks at once."""
    now = rig.incarnations()
    rig.kill(0, 1)
    for number in (0, 1):
        await rig.down(number, now[number])


async def kill_all(rig: Rig) -> None:
    """SIGKILL to every rank at once."""
    now = rig.incarnations()
    rig.kill(*now)
    for number, incarnation in now.items():
        await rig.down(number, incarnation)


async def send_poison(rig: Rig) -> None:
    """A request that kills the rank that it is on: two die of it, and no third."""
    before = rig.incarnations()
    tally = Tally()
    await follow(rig.group, ask([5, POISON, 6], 20), "poison", tally)
    assert tally.ends == {End.FAILED: 1}, tally
    (words,) = tally.errors
    for word in ("2 ranks", "SIGSEGV(-11)"):
        assert word in words, words
    await rig.whole()
    changed = [number for number, now in rig.incarnations().items() if now != before[number]]
    assert len(changed) == 2, changed


async def scale_up_and_down(rig: Rig) -> None:
    """Two ranks more and two fewer, with so little time to drain that requests move."""
    ranks = len(rig.group.supervisor.ranks)
    await rig.group.scale(ranks + 2)
    await rig.whole()
    await rig.group.scale(ranks, drain_s=0.1)


async def roll(rig: Rig) -> None:
    """Three ranks, not the unlucky one, with so little time to drain that requests move."""
    before = rig.incarnations()
    await rig.group.restart([0, 1, 2], rolling=True, drain_s=0.1)
    now = rig.incarnations()
    assert [number for number in before if now[number] == before[number]] == [3]
