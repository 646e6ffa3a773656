"""A group that is paused or asleep: acknowledged by every rank, and the same for one that comes up meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dplaunch.errors import UsageError, WeightsError
from dplaunch.events import Kind
from dplaunch.health import readiness
from dplaunch.spec import ProbePolicy
from dplaunch.status import snapshot
from dplaunch.testing import Fault, StandInPlan, When, expected_tokens, poll_until_async
from dplaunch.testing.weights import checksum_of
from tests.contract.conftest import Launch
from tests.contract.groups import Watched
from tests.contract.test_group import SLOW, params, tokens
from tests.contract.test_weights import PROMPTS, answers_with, kill, tensors, until


async def sleeping(watched: Watched) -> list[Any]:
    return await watched.group.call("is_sleeping")


async def test_a_paused_group_lets_requests_wait_and_answers_them_when_it_goes_on(launch: Launch) -> None:
    group = (await launch(SLOW)).group
    early = asyncio.create_task(group.generate(PROMPTS, params(10)))
    await poll_until_async(lambda: group.client.unfinished == len(PROMPTS))
    await group.pause()
    assert early.done() or group.client.unfinished == 0
    assert await group.call("is_scheduler_paused") == [True, True]
    late = asyncio.create_task(group.generate(PROMPTS, params(10)))
    await poll_until_async(lambda: group.client.queued == len(PROMPTS))
    assert snapshot(group)["stance"] == "paused"
    assert readiness(group)["ready"] is False
    await group.resume()
    for batch in (await early, await late):
        assert [tokens(output) for output in batch] == [expected_tokens(prompt, 10) for prompt in PROMPTS]
    assert readiness(group)["ready"] is True


async def test_requests_in_flight_are_kept_or_aborted_as_asked(launch: Launch) -> None:
    group = (await launch(SLOW)).group
    kept = asyncio.create_task(group.generate(PROMPTS, params(40)))
    await poll_until_async(lambda: group.client.rank_counters[0].tokens > 0)
    await group.pause("keep")
    assert group.client.unfinished == len(PROMPTS)
    await group.resume()
    assert [tokens(output) for output in await kept] == [expected_tokens(prompt, 40) for prompt in PROMPTS]
    ended = asyncio.create_task(group.generate(PROMPTS, params(400)))
    await poll_until_async(lambda: group.client.rank_counters[1].tokens > 300)
    await group.pause("abort")
    outputs = await ended
    assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
    await group.resume()
    await answers_with(group, "")


async def test_a_rank_that_comes_back_to_a_paused_group_is_paused_too(launch: Launch) -> None:
    watched = await launch()
    await watched.group.pause()
    kill(watched, 1)
    await until(watched, 1, "ready")
    assert await watched.group.call("is_scheduler_paused") == [True, True]
    await watched.group.resume()
    assert await watched.group.call("is_scheduler_paused") == [False, False]
    await answers_with(watched.group, "")


async def test_a_sleeping_group_is_well_and_a_rank_that_dies_in_its_sleep_comes_back_asleep(launch: Launch) -> None:
    watched = await launch(probe=ProbePolicy(interval_s=0.1, timeout_s=1.0))
    group = watched.group
    await group.sleep()
    assert await sleeping(watched) == [True, True]
    since = group.supervisor.ranks[0].link
    assert since is not None
    before = since.heard
    # Two probes at least have been answered by a rank that sleeps.
    await poll_until_async(lambda: since.heard > before + 0.2)
    assert group.supervisor.is_healthy
    assert snapshot(group)["stance"] == "asleep"
    kill(watched, 1)
    await until(watched, 1, "ready")
    assert await sleeping(watched) == [True, True]
    with pytest.raises(UsageError, match="asleep, not paused"):
        await group.resume()
    await group.wake_up()
    assert await sleeping(watched) == [False, False]
    await answers_with(group, "")
    assert not [event for event in watched.events if event.kind is Kind.HANG]


async def test_a_deep_sleep_ends_with_the_current_weights(launch: Launch) -> None:
    watched = await launch()
    group = watched.group
    weights = tensors(1)
    await group.update_weights(weights)
    await group.sleep(2)
    kill(watched, 0)
    await until(watched, 0, "ready")
    await group.wake_up()
    await answers_with(group, checksum_of(weights.items()))


async def test_weights_that_a_deep_sleep_has_lost_for_good_must_be_given_before_the_group_wakes(launch: Launch) -> None:
    watched = await launch()
    group = watched.group
    await group.update_weights(iter(tensors(1).items()))
    await group.sleep(2)
    with pytest.raises(WeightsError, match="cannot be had again"):
        await group.wake_up()
    assert await sleeping(watched) == [True, True]
    weights = tensors(2)
    await group.update_weights(weights)
    await group.wake_up()
    await answers_with(group, checksum_of(weights.items()))


async def test_a_group_is_awake_inside_a_block_and_asleep_after_it(launch: Launch) -> None:
    watched = await launch()
    group = watched.group
    weights = tensors(1)
    await group.update_weights(weights)
    await group.release_memory()
    assert (await sleeping(watched), group.weights and group.weights.level) == ([True, True], 2)
    for _ in range(2):
        async with group.awake():
            await answers_with(group, checksum_of(weights.items()))
        assert await sleeping(watched) == [True, True]
    await group.update_weights(iter(tensors(2).items()))
    async with group.awake(level=1):
        await answers_with(group, checksum_of(tensors(2).items()))
    # What cannot be had again is not given up.
    async with group.awake():
        await answers_with(group, checksum_of(tensors(2).items()))


async def test_a_rank_that_dies_while_the_group_falls_asleep_is_brought_back_asleep(launch: Launch) -> None:
    plan = StandInPlan(faults={(1, 0): Fault(when=When.REQUEST, returncode=7, nth=3)}, token_delay_s=0.02)
    watched = await launch(plan)
    group = watched.group
    batch = asyncio.create_task(group.generate(PROMPTS, params(10)))
    await poll_until_async(lambda: group.client.unfinished > 0)
    await group.sleep()
    await until(watched, 1, "ready")
    assert await sleeping(watched) == [True, True]
    # What the dead rank had shown nothing of waits as what comes now does.
    assert group.client.unfinished == group.client.queued
    await group.wake_up()
    assert [tokens(output) for output in await batch] == [expected_tokens(prompt, 10) for prompt in PROMPTS]
    await answers_with(group, "")


async def test_engines_that_cannot_sleep_are_left_awake_and_the_group_serves_on(launch: Launch) -> None:
    watched = await launch(StandInPlan(can_sleep=False))
    with pytest.raises(WeightsError, match=r"sleep fails in all ranks: rank 0: .*sleep mode is not enabled"):
        await watched.group.sleep()
    assert snapshot(watched.group)["stance"] == "serving"
    await answers_with(watched.group, "")
    assert watched.states(0) == watched.states(1) == [("starting", 0), ("ready", 0)]
