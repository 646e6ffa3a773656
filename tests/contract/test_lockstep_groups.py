"""Groups whose ranks step together: one death restarts all of them once. The same on every backend."""

from __future__ import annotations

import asyncio

import pytest

from dplaunch.errors import GroupDeadError
from dplaunch.events import Kind
from dplaunch.spec import Mode, RestartPolicy
from dplaunch.testing import Fault, StandInPlan, When, expected_tokens, poll_until_async
from tests.contract.conftest import Launch
from tests.contract.test_group import params, tokens

DEATH = Fault(when=When.REQUEST, returncode=-6, after_tokens=3)


async def test_one_death_restarts_the_whole_group_once_and_its_requests_go_on(launch: Launch) -> None:
    plan = StandInPlan(faults={(1, 0): DEATH}, token_delay_s=0.02)
    watched = await launch(plan, dp=3, mode=Mode.LOCKSTEP)
    group = watched.group
    prompts = [[index + 1] for index in range(9)]
    outputs = await asyncio.wait_for(group.generate(prompts, params(40)), 60)
    assert [tokens(output) for output in outputs] == [expected_tokens(prompt, 40) for prompt in prompts]
    once = ["starting", "ready", "down", "starting", "ready"]
    assert [[state for state, _ in watched.states(rank)] for rank in range(3)] == [once] * 3
    reports = await group.call("dplaunch_report")
    assert [report["instance_id"] for report in reports] == [f"contract-r1_dp{rank}" for rank in range(3)]
    assert [rank.restart_count for rank in group.supervisor.ranks] == [1, 1, 1]
    said = [event.message for event in watched.events]
    assert any("rank 1 died while serving: SIGABRT(-6)" in words for words in said)
    assert said.count("rank 1 is gone, and all ranks step together: the group is restarted") == 1
    assert "rank 0 is ended: rank 1 died, and the group steps together" in said


async def test_a_group_that_dies_again_and_again_is_dead_as_a_whole(launch: Launch) -> None:
    plan = StandInPlan(faults={(0, 0): DEATH, (0, 1): Fault(returncode=3)}, token_delay_s=0.02)
    watched = await launch(plan, mode=Mode.LOCKSTEP, restart=RestartPolicy(limit=1))
    group = watched.group
    batch = asyncio.create_task(group.generate([[1], [2], [3], [4]], params(400), on_error="return"))
    error = await asyncio.wait_for(asyncio.shield(group.dead), 60)
    assert isinstance(error, GroupDeadError)
    assert "the ranks step together" in error.message
    assert "1 restarts in 300 s" in str(error)
    assert not group.supervisor.is_healthy
    assert all(isinstance(result, Exception) for result in await batch)
    await poll_until_async(lambda: watched.states(0)[-1][0] == watched.states(1)[-1][0] == "failed")
    assert [event.kind for event in watched.events].count(Kind.GROUP) >= 2
    with pytest.raises(GroupDeadError):
        group.client.add(None)
