"""A group that grows, shrinks and is restarted while it serves. The same on every backend."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from dplaunch.errors import GroupClosedError, RankFailedError, RequestError, ResourceError, UsageError
from dplaunch.events import Kind
from dplaunch.group import AsyncGroup
from dplaunch.spec import RestartPolicy
from dplaunch.testing import Fault, StandInPlan, When, expected_tokens, poll_until_async
from tests.contract.conftest import Launch
from tests.contract.groups import Watched
from tests.contract.test_group import params, tokens

SLOW = StandInPlan(token_delay_s=0.01)

LENGTH = 40
"""Tokens of each answer under load: long enough that some are under way whatever happens."""

SOON_S = 60.0


class Load:
    """Requests one after another on several lanes, each answer checked token by token."""

    def __init__(self, group: AsyncGroup) -> None:
        self.answered = 0
        self._group = group
        self._ending = False

    async def lane(self, number: int) -> None:
        while not self._ending:
            prompt = [number + 1, self.answered % 50 + 1]
            seen: list[int] = []
            async for output in self._group.engine.generate(
                {"prompt_token_ids": prompt}, params(LENGTH), f"load-{number}-{self.answered}-{len(prompt)}"
            ):
                seen = tokens(output)
                # What streams is never taken back.
                assert seen == expected_tokens(prompt, LENGTH)[: len(seen)]
            assert seen == expected_tokens(prompt, LENGTH)
            self.answered += 1

    async def more(self, count: int = 8) -> None:
        """Returns when so many more answers have come."""
        goal = self.answered + count
        await poll_until_async(lambda: self.answered >= goal, SOON_S, "more answers")

    def end(self) -> None:
        self._ending = True


@asynccontextmanager
async def under_load(group: AsyncGroup, lanes: int = 6) -> AsyncIterator[Load]:
    """Requests all the while; none of them may fail."""
    load = Load(group)
    async with asyncio.TaskGroup() as tasks:
        for number in range(lanes):
            tasks.create_task(load.lane(number))
        await load.more()
        yield load
        await load.more()
        load.end()


def said(watched: Watched, kind: Kind) -> list[str]:
    """The messages of a kind, without their seconds."""
    return [re.sub(r" in [\d.]+ s$", "", event.message) for event in watched.events if event.kind is kind]


async def names(group: AsyncGroup) -> list[str]:
    return [report["instance_id"] for report in await group.call("dplaunch_report")]


async def test_a_group_grows_and_shrinks_under_load_and_no_request_notices(launch: Launch) -> None:
    watched = await launch(SLOW, dp=2)
    group = watched.group
    async with under_load(group) as load:
        await group.scale(4)
        assert group.client.ranks == [0, 1, 2, 3]
        await poll_until_async(lambda: all(group.client.rank_counters[rank].tokens for rank in range(4)), SOON_S)
        assert await names(group) == [f"contract_dp{rank}" for rank in range(4)]
        await load.more()
        await group.scale(1, drain_s=0.2)
        assert group.client.ranks == [0]
    assert [rank.identity.rank for rank in group.supervisor.ranks] == [0]
    assert [rank.identity.rank for rank in group.plan.ranks] == [0]
    assert watched.states(0) == [("starting", 0), ("ready", 0)]
    for rank in (1, 2, 3):
        assert watched.states(rank) == [(s, 0) for s in ("starting", "ready", "stopping", "stopped")]
    told = [line for line in said(watched, Kind.SCALE) if "joins" not in line]
    assert told == [
        "scaling from 2 ranks to 4",
        "scaled from 2 to 4 ranks",
        "scaling from 4 ranks to 1",
        "scaled from 4 to 1 rank",
    ]
    assert group.client.counters.lost == group.client.counters.poisoned == 0
    assert (group.plan.log_dir / "rank3.log").exists()


async def test_a_rank_that_comes_again_has_a_name_that_nobody_had(launch: Launch) -> None:
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "engine_id": "kv"}
    group = (await launch(dp=1, engine_args={"kv_transfer_config": connector})).group
    seen = await names(group)
    for dp in (2, 1, 2):
        await group.scale(dp)
        seen += [name for name in await names(group) if name not in seen]
    assert seen == ["contract", "contract_dp1", "contract-r1_dp1"]
    await group.restart([0])
    reports = await group.call("dplaunch_report")
    assert [report["instance_id"] for report in reports] == ["contract-r1", "contract-r1_dp1"]
    assert [report["engine_id"] for report in reports] == ["kv-r1", "kv-r1_dp1"]
    assert [report["data_parallel_index"] for report in reports] == [0, 1]


async def test_a_rank_that_does_not_start_takes_the_others_that_came_with_it(launch: Launch) -> None:
    faults = {(3, 0): Fault(when=When.BEFORE_READY, returncode=7)}
    watched = await launch(StandInPlan(faults=faults, token_delay_s=0.01), dp=2)
    group = watched.group
    async with under_load(group):
        with pytest.raises(RankFailedError, match="rank 3 died while starting: exit code 7"):
            await group.scale(4)
        assert group.client.ranks == [0, 1]
        assert len(group.supervisor.ranks) == len(group.plan.ranks) == 2
    with pytest.raises(Exception, match="out of range"):
        await group.generate([[1]], params(2), data_parallel_rank=3)
    # What was tried is no obstacle: its names are not used again.
    await group.scale(4)
    assert await names(group) == ["contract_dp0", "contract_dp1", "contract-r1_dp2", "contract-r1_dp3"]
    outputs = await group.generate([[1]] * 4, params(6), data_parallel_rank=3)
    assert [tokens(output) for output in outputs] == [expected_tokens([1], 6)] * 4


async def test_ranks_that_do_not_fit_are_refused_before_anything_is_started(launch: Launch) -> None:
    share = int(psutil.virtual_memory().available * 0.2)
    watched = await launch(dp=1, engine_args={"kv_cache_memory_bytes": share})
    group = watched.group
    with pytest.raises(ResourceError, match=r"rank \d+ does not fit.*: it wants .* GiB of host memory"):
        await group.scale(40)
    assert watched.states(1) == []
    assert group.client.ranks == [0]
    assert any("scaling from 1 rank to 40 failed: rank" in line for line in said(watched, Kind.SCALE))


@pytest.mark.parametrize("rolling", [True, False])
async def test_all_ranks_are_restarted_under_load_and_no_request_fails(launch: Launch, rolling: bool) -> None:
    watched = await launch(SLOW, dp=3, restart=RestartPolicy(limit=0))
    group = watched.group
    least = 3

    def watch() -> None:
        nonlocal least
        least = min(least, group.supervisor.ready_count)

    group.listen(lambda event: watch())
    async with under_load(group):
        await group.restart(rolling=rolling, drain_s=0.1)
        assert group.client.ranks == [0, 1, 2]
        assert await names(group) == [f"contract-r1_dp{rank}" for rank in range(3)]
    assert least == (2 if rolling else 0)
    for rank in range(3):
        assert watched.states(rank) == [
            *[(s, 0) for s in ("starting", "ready", "stopping", "stopped")],
            *[(s, 1) for s in ("starting", "ready")],
        ]
    # Restarts are off in this group: those on request are not the policy's.
    assert group.client.counters.lost == 0
    words = "restarting 3 ranks, one after the other" if rolling else "restarting 3 ranks"
    assert said(watched, Kind.ROLL) == [words, "restarted 3 ranks"]


async def test_requests_of_the_only_rank_wait_for_its_restart(launch: Launch) -> None:
    group = (await launch(SLOW, dp=1)).group
    async with under_load(group):
        await group.restart(drain_s=0)
        await group.restart([0], drain_s=0)
        assert await names(group) == ["contract-r2"]


async def test_a_restart_that_fails_ends_the_roll_and_the_rank_is_brought_back_as_ever(launch: Launch) -> None:
    faults = {(1, 1): Fault(when=When.BEFORE_READY, returncode=7)}
    watched = await launch(StandInPlan(faults=faults, token_delay_s=0.01), dp=3)
    group = watched.group
    async with under_load(group):
        with pytest.raises(RankFailedError, match=r"rank 1 died while starting: exit code 7.*; not restarted: 2"):
            await group.restart(rolling=True, drain_s=0.1)
        await poll_until_async(lambda: group.client.ranks == [0, 1, 2], SOON_S, "the return of rank 1")
    assert await names(group) == ["contract-r1_dp0", "contract-r2_dp1", "contract_dp2"]


async def test_one_change_at_a_time(launch: Launch) -> None:
    plan = StandInPlan(faults={(1, 0): Fault(slow_start_s=1.0)})
    group = (await launch(plan, dp=1)).group
    growing = asyncio.create_task(group.scale(2))
    await poll_until_async(lambda: len(group.supervisor.ranks) == 2)
    with pytest.raises(UsageError, match="the group is busy scaling from 1 rank to 2"):
        await group.restart()
    with pytest.raises(UsageError, match="the group is busy scaling from 1 rank to 2"):
        await group.scale(1)
    await growing
    assert group.client.ranks == [0, 1]


async def test_a_change_that_is_given_up_leaves_the_group_as_it_was(launch: Launch) -> None:
    plan = StandInPlan(faults={(2, 0): Fault(slow_start_s=600.0)}, token_delay_s=0.01)
    watched = await launch(plan, dp=2)
    group = watched.group
    async with under_load(group) as load:
        growing = asyncio.create_task(group.scale(3))
        await poll_until_async(lambda: "loading" in watched.phases(2), SOON_S)
        growing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await growing
        assert len(group.supervisor.ranks) == 2
        shrinking = asyncio.create_task(group.scale(1, drain_s=600.0))
        await poll_until_async(lambda: group.client.ranks == [0])
        shrinking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shrinking
        assert group.client.ranks == [0, 1]
        await load.more()
    # It is watched again too.
    handle = group.supervisor.ranks[1].handle
    assert handle is not None
    handle.kill()
    await poll_until_async(lambda: ("ready", 1) in watched.states(1), SOON_S, "the return of rank 1")


async def test_a_group_that_is_closed_while_it_grows_leaves_nothing_behind(launch: Launch) -> None:
    plan = StandInPlan(faults={(1, 0): Fault(slow_start_s=600.0)})
    watched = await launch(plan, dp=1)
    growing = asyncio.create_task(watched.group.scale(3))
    await poll_until_async(lambda: ("ready", 0) in watched.states(2) and "loading" in watched.phases(1), SOON_S)
    await asyncio.wait_for(watched.group.close(), SOON_S)
    with pytest.raises(GroupClosedError, match="closed while scaling from 1 rank to 3"):
        await growing
    with pytest.raises(GroupClosedError):
        await watched.group.scale(2)


async def test_a_rank_that_dies_during_a_change_is_brought_back_as_ever(launch: Launch) -> None:
    plan = StandInPlan(faults={(2, 0): Fault(slow_start_s=1.0)}, token_delay_s=0.01)
    watched = await launch(plan, dp=2)
    group = watched.group
    growing = asyncio.create_task(group.scale(3))
    await poll_until_async(lambda: "loading" in watched.phases(2), SOON_S)
    handle = group.supervisor.ranks[0].handle
    assert handle is not None
    handle.kill()
    await growing
    await poll_until_async(lambda: group.client.ranks == [0, 1, 2], SOON_S, "all three")
    assert await names(group) == ["contract-r1_dp0", "contract_dp1", "contract_dp2"]


async def test_a_request_that_is_pinned_to_a_rank_that_leaves_fails_by_name(launch: Launch) -> None:
    group = (await launch(SLOW, dp=2)).group
    pinned = asyncio.create_task(group.generate([[1]], params(1000), data_parallel_rank=1))
    await poll_until_async(lambda: group.client.load[1] == 1)
    await group.scale(1, drain_s=0.1)
    with pytest.raises(RequestError, match="rank 1"):
        await pinned


async def test_sizes_and_ranks_that_cannot_be_are_refused(launch: Launch) -> None:
    group = (await launch(dp=2, min_ranks=2)).group
    sizes: dict[Any, str] = {0: "1 or more, not 0", 1: "at least 2 are needed", 2.5: "whole number"}
    for dp, words in sizes.items():
        with pytest.raises(UsageError, match=words):
            await group.scale(dp)
    with pytest.raises(UsageError, match="there is no rank 5"):
        await group.restart([5])
    assert group.client.ranks == [0, 1]


async def test_metrics_of_new_ranks_are_counted_and_those_of_old_ones_go_on(launch: Launch) -> None:
    from prometheus_client import REGISTRY

    def count(rank: int) -> float | None:
        labels = {"engine": str(rank), "model_name": group.engine.vllm_config.model_config.served_model_name}
        return REGISTRY.get_sample_value("vllm:generation_tokens_total", labels)

    group = (await launch(dp=1, log_stats=True)).group
    await group.generate([[1]] * 4, params(5), data_parallel_rank=0)
    assert (count(0), count(1)) == (20, None)
    await group.scale(2)
    assert (count(0), count(1)) == (20, 0)
    await group.generate([[1]] * 3, params(5), data_parallel_rank=1)
    assert (count(0), count(1)) == (20, 15)
    await group.scale(1)
    await group.generate([[1]], params(5))
    assert (count(0), count(1)) == (25, None)
    await group.scale(3)
    assert (count(0), count(1), count(2)) == (25, 0, 0)
