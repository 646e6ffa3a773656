"""Changes of a running group, over processes that are no processes: what is asked of whom, in which order."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from dplaunch.backend import Backend, Exit
from dplaunch.changes import Changes
from dplaunch.client import GroupClient
from dplaunch.errors import DplaunchError, GroupClosedError, RankFailedError, UsageError
from dplaunch.events import Kind, RankState
from dplaunch.inventory import Inventory
from dplaunch.plan import RankSpec
from dplaunch.rank import Rank
from dplaunch.spec import Mode, RestartPolicy
from dplaunch.supervisor import Supervisor
from dplaunch.testing import poll_until_async
from tests.unit.supervision import FakeClient, FakeHandle, FakeLink, Rig
from tests.unit.test_planner import cpu


class Client(FakeClient):
    """Also knows of ranks that leave, and has requests in flight on those in `loaded`."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[int, asyncio.Event] = {}

    def retire(self, rank: int) -> None:
        self.said.append(("retire", rank))

    def forget(self, rank: int) -> None:
        self.said.append(("forget", rank))

    async def idle(self, rank: int) -> None:
        if rank in self.loaded:
            await self.loaded[rank].wait()


class Grown(Rig):
    """A group that can be changed, and all that its host and its backend are told."""

    client: Client

    def __init__(self, directory: Path, **options: Any) -> None:
        self.sizes: list[int] = []
        self.welcomed: list[int] = []
        self.rooms: list[tuple[str, int]] = []
        super().__init__(directory, **options)
        self.changes = self.supervisor.changes = Changes(
            self.supervisor,
            cast(Backend, self),
            cast(GroupClient, self.client),
            self,
            {"PATH": "/bin"},
            self.events.append,
        )

    def _supervisor(self, directory: Path) -> Supervisor:
        self.client = Client()
        return super()._supervisor(directory)

    async def inventory(self, spec: Any, more: int = 0) -> Inventory:
        return Inventory(nodes=(cpu(cores=4, name="here"),))

    async def reserve(self, ranks: Sequence[RankSpec]) -> None:
        self.rooms += [("reserve", rank.identity.rank) for rank in ranks]

    async def release(self, rank: int) -> None:
        self.rooms.append(("release", rank))

    def resize(self, ranks: int) -> None:
        self.sizes.append(ranks)

    def welcome(self, rank: Rank) -> None:
        self.welcomed.append(rank.identity.rank)

    def told(self, kind: Kind) -> list[str]:
        """What was said of the group, without how long it took."""
        return [re.sub(r" in [\d.]+ s$", "", e.message) for e in self.events if e.kind is kind and e.rank is None]

    @property
    def names(self) -> list[str]:
        return [rank.identity.instance_id for rank in self.ranks]

    def handle(self, rank: int) -> FakeHandle:
        return cast(FakeHandle, self.ranks[rank].handle)


Start = Callable[..., Any]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts groups; each is stopped at the end."""
    groups: list[Grown] = []

    async def begin(dp: int = 2, **options: Any) -> Grown:
        sized = {"engine_args": {"load_format": "dummy", "kv_cache_memory_bytes": 2**20}}
        groups.append(Grown(tmp_path, dp=dp, **(sized | options)))
        await groups[-1].supervisor.start()
        groups[-1].client.said.clear()
        return groups[-1]

    yield begin
    for group in groups:
        await group.supervisor.stop("the test is over")


def fails(rank: int, incarnation: int = 0) -> Callable[[FakeHandle, FakeLink], None]:
    """All ranks start, but this one."""

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        if (link.rank, link.identity.incarnation) == (rank, incarnation):
            handle.end(Exit(signal=9))
        else:
            link.ready.set_result({})

    return on_spawn


def waits(rank: int) -> Callable[[FakeHandle, FakeLink], None]:
    """All ranks start, but this one takes for ever."""
    return lambda handle, link: None if link.rank == rank else link.ready.set_result({})


# Growing.


async def test_the_frontend_knows_of_new_ranks_before_they_can_answer_and_they_join_together(start: Start) -> None:
    group = await start(2)
    group.on_spawn = waits(3)
    growing = asyncio.create_task(group.supervisor.scale(4))
    await poll_until_async(lambda: len(group.ranks) == 4 and group.ranks[2].state is RankState.READY)
    assert group.sizes == [4]
    assert group.rooms == [("reserve", 2), ("reserve", 3)]
    assert (group.client.said, group.welcomed, len(group.plan.ranks)) == ([], [], 2)
    group.links[-1].ready.set_result({})
    await growing
    assert group.client.said == [("up", 2), ("up", 3)]
    assert group.welcomed == [2, 3]
    assert [rank.identity.rank for rank in group.plan.ranks] == [0, 1, 2, 3]
    assert group.told(Kind.SCALE) == ["scaling from 2 ranks to 4", "scaled from 2 to 4 ranks"]
    assert [e.data["log_file"] for e in group.events if e.kind is Kind.SCALE and e.rank == 3] == [
        str(group.plan.log_dir / "rank3.log")
    ]


async def test_a_new_rank_is_kept_like_any_other(start: Start) -> None:
    group = await start(1, restart=RestartPolicy(backoff_s=0.0))
    await group.supervisor.scale(2)
    await group.dies(1)
    await poll_until_async(lambda: group.names == ["base_dp0", "base-r1_dp1"])
    await group.until(1, RankState.READY)


async def test_when_one_does_not_start_those_that_came_with_it_go_and_their_names_with_them(start: Start) -> None:
    group = await start(1)
    group.on_spawn = fails(2)
    with pytest.raises(RankFailedError, match="rank 2 died while starting"):
        await group.supervisor.scale(4)
    assert (group.names, len(group.plan.ranks), group.sizes) == (["base_dp0"], 1, [4, 1])
    assert all(handle.poll() is not None for handle in group.handles[1:])
    assert sorted(group.rooms[3:]) == [("release", 1), ("release", 2), ("release", 3)]
    assert [word for word in group.client.said if word[0] != "forget"] == []
    assert group.told(Kind.SCALE)[-1].startswith("scaling from 1 rank to 4 failed: rank 2 died while starting")
    await group.supervisor.scale(3)
    assert group.names == ["base_dp0", "base-r1_dp1", "base-r1_dp2"]


# Shrinking.


async def test_ranks_leave_from_the_highest_and_only_when_they_are_idle(start: Start) -> None:
    group = await start(3)
    group.client.loaded = {1: asyncio.Event(), 2: asyncio.Event()}
    shrinking = asyncio.create_task(group.supervisor.scale(1, 60.0))
    await poll_until_async(lambda: len(group.client.said) == 2)
    group.client.loaded[2].set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert group.client.said == [("retire", 2), ("retire", 1)]
    assert group.handle(1).signals == group.handle(2).signals == []
    group.client.loaded[1].set()
    handles = group.handles[1:]
    await shrinking
    assert [handle.signals for handle in handles] == [["SIGTERM"], ["SIGTERM"]]
    assert group.client.said[2:] == [("down", 2), ("down", 1), ("forget", 2), ("forget", 1)]
    assert group.client.blamed == []
    assert group.rooms == [("release", 2), ("release", 1)]
    assert (group.sizes, group.names, len(group.plan.ranks)) == ([1], ["base_dp0"], 1)


async def test_what_is_not_done_at_the_deadline_moves(start: Start) -> None:
    group = await start(2)
    group.client.loaded = {1: asyncio.Event()}
    await group.supervisor.scale(1, 0.05)
    assert group.client.said == [("retire", 1), ("down", 1), ("forget", 1)]


async def test_a_rank_that_dies_while_it_leaves_is_not_waited_for_nor_brought_back(start: Start) -> None:
    group = await start(2, restart=RestartPolicy(limit=5))
    group.client.loaded = {1: asyncio.Event()}
    shrinking = asyncio.create_task(group.supervisor.scale(1, 600.0))
    await poll_until_async(lambda: ("retire", 1) in group.client.said)
    group.handle(1).end(Exit(signal=11))
    await shrinking
    assert group.client.blamed == [1]
    assert len(group.handles) == 2


async def test_a_rank_that_is_down_leaves_too(start: Start) -> None:
    group = await start(2, restart=RestartPolicy(limit=5))
    group.on_spawn = waits(1)
    await group.dies(1)
    await poll_until_async(lambda: len(group.handles) == 3)
    await group.supervisor.scale(1)
    assert group.names == ["base_dp0"]
    assert group.handles[2].poll() is not None


async def test_a_group_does_not_shrink_to_ranks_that_have_failed(start: Start) -> None:
    group = await start(3)
    await group.dies(0)
    await group.until(0, RankState.FAILED)
    with pytest.raises(UsageError, match="cannot scale to 1 rank: of those, rank 0 has failed") as caught:
        await group.supervisor.scale(1)
    assert "dplaunch restart --rank 0" in caught.value.hint
    await group.supervisor.restart([0])
    await group.supervisor.scale(1)
    assert group.names == ["base-r1_dp0"]


# Restarting.


async def test_a_roll_takes_each_rank_when_the_one_before_is_ready(start: Start) -> None:
    group = await start(2)
    await group.supervisor.restart(rolling=True)
    assert group.client.said == [
        *[("retire", 0), ("down", 0), ("up", 0)],
        *[("retire", 1), ("down", 1), ("up", 1)],
    ]
    assert group.names == ["base-r1_dp0", "base-r1_dp1"]
    assert [rank.restart_count for rank in group.ranks] == [1, 1]
    assert [rank.restarts for rank in group.ranks] == [[], []]
    assert group.client.blamed == []


async def test_without_a_roll_all_are_restarted_at_once(start: Start) -> None:
    group = await start(2)
    await group.supervisor.restart()
    assert group.client.said[:4] == [("retire", 0), ("retire", 1), ("down", 0), ("down", 1)]
    assert sorted(group.client.said[4:]) == [("up", 0), ("up", 1)]


async def test_a_restart_that_fails_is_the_policys_matter_and_ends_the_roll(start: Start) -> None:
    group = await start(3, restart=RestartPolicy(backoff_s=0.0))
    group.on_spawn = fails(1, 1)
    with pytest.raises(RankFailedError, match=r"rank 1 died while starting.*; not restarted: 2"):
        await group.supervisor.restart(rolling=True)
    await poll_until_async(lambda: group.names == ["base-r1_dp0", "base-r2_dp1", "base_dp2"])
    await group.until(1, RankState.READY)
    assert len(group.ranks[1].restarts) == 1


async def test_a_restart_that_fails_where_restarts_are_off_gives_the_rank_up(start: Start) -> None:
    group = await start(2)
    group.on_spawn = fails(1, 1)
    with pytest.raises(RankFailedError):
        await group.supervisor.restart([1])
    await group.until(1, RankState.FAILED)
    assert group.client.said[-1] == ("gone", 1)


async def test_a_stubborn_rank_is_killed_at_the_shutdown_deadline(start: Start) -> None:
    group = await start(1, shutdown_timeout_s=0.05)
    group.handle(0).stubborn = True
    await group.supervisor.restart([0])
    assert group.handles[0].signals == ["SIGTERM", "SIGKILL"]


# One at a time, and no longer than the group lives.


async def test_a_second_change_is_refused_by_the_name_of_the_first(start: Start) -> None:
    group = await start(2)
    group.client.loaded = {1: asyncio.Event()}
    first = asyncio.create_task(group.supervisor.restart(rolling=True))
    await poll_until_async(lambda: ("retire", 1) in group.client.said)
    with pytest.raises(UsageError, match="the group is busy restarting 2 ranks, one after the other"):
        await group.supervisor.scale(3)
    group.client.loaded[1].set()
    await first
    await group.supervisor.scale(3)


async def test_a_shrink_that_is_given_up_leaves_the_ranks_in_service_and_watched(start: Start) -> None:
    group = await start(2, restart=RestartPolicy(backoff_s=0.0))
    group.client.loaded = {1: asyncio.Event()}
    shrinking = asyncio.create_task(group.supervisor.scale(1, 600.0))
    await poll_until_async(lambda: ("retire", 1) in group.client.said)
    await asyncio.sleep(0)
    shrinking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await shrinking
    assert group.client.said[-1] == ("up", 1)
    await group.dies(1)
    await poll_until_async(lambda: group.names == ["base_dp0", "base-r1_dp1"])
    assert group.told(Kind.SCALE)[-1] == "scaling from 2 ranks to 1 was given up"


async def test_a_rank_that_was_coming_back_goes_on_with_it_when_its_leave_is_given_up(start: Start) -> None:
    group = await start(3, restart=RestartPolicy(backoff_s=0.0))
    group.client.loaded = {1: asyncio.Event()}
    group.on_spawn = waits(2)
    await group.dies(2)
    await poll_until_async(lambda: len(group.handles) == 4)
    shrinking = asyncio.create_task(group.supervisor.scale(1, 600.0))
    await poll_until_async(lambda: ("retire", 1) in group.client.said)
    group.on_spawn = lambda handle, link: link.ready.set_result({})
    shrinking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await shrinking
    await poll_until_async(lambda: group.names == ["base_dp0", "base_dp1", "base-r2_dp2"])
    await group.until(2, RankState.READY)


async def test_a_group_whose_last_rank_fails_while_others_were_to_join_is_dead_when_they_do_not(start: Start) -> None:
    group = await start(1)
    group.on_spawn = lambda handle, link: None
    growing = asyncio.create_task(group.supervisor.scale(2))
    await poll_until_async(lambda: len(group.handles) == 2)
    await group.dies(0)
    await group.until(0, RankState.FAILED)
    assert group.gone == []
    group.handles[1].end(Exit(code=3))
    with pytest.raises(RankFailedError):
        await growing
    assert "0 of 1 ranks are left, 1 are needed: rank 0 died while serving" in group.gone[0].message


async def test_a_restart_that_is_given_up_half_way_is_finished_by_the_policy(start: Start) -> None:
    group = await start(1, restart=RestartPolicy(backoff_s=0.0))
    group.on_spawn = waits(0)
    restarting = asyncio.create_task(group.supervisor.restart([0]))
    await poll_until_async(lambda: len(group.handles) == 2)
    group.on_spawn = lambda handle, link: link.ready.set_result({})
    restarting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await restarting
    await group.until(0, RankState.READY)
    assert group.handles[1].poll() is not None
    assert group.names == ["base-r2_dp0"]


@pytest.mark.parametrize("what", ["scale", "restart"])
async def test_a_group_that_stops_ends_its_change_and_takes_no_other(start: Start, what: str) -> None:
    group = await start(1)
    group.on_spawn = lambda handle, link: None
    supervisor = group.supervisor
    change = asyncio.create_task(supervisor.scale(3) if what == "scale" else supervisor.restart())
    await poll_until_async(lambda: len(group.handles) > 1)
    await asyncio.wait_for(supervisor.stop("the test says so"), 30)
    with pytest.raises(GroupClosedError, match="the group was closed while"):
        await change
    assert all(handle.poll() is not None for handle in group.handles)
    assert {rank.state for rank in group.ranks} == {RankState.STOPPED}
    with pytest.raises(GroupClosedError):
        await supervisor.scale(2)


async def test_a_group_that_is_not_there_yet_is_not_changed(start: Start) -> None:
    group = await start(1)
    group.supervisor.changes = None
    with pytest.raises(GroupClosedError, match="not running yet"):
        await group.supervisor.scale(2)


async def test_ranks_in_lockstep_are_neither_scaled_nor_restarted_one_by_one(start: Start) -> None:
    group = await start(2, mode=Mode.LOCKSTEP)
    for change in (group.supervisor.scale(3), group.supervisor.restart([0])):
        with pytest.raises(UsageError, match="lockstep"):
            await change


@pytest.mark.parametrize(("ranks", "words"), [([7], "there is no rank 7"), ([], "no rank to restart")])
async def test_ranks_that_are_none_are_refused(start: Start, ranks: list[int], words: str) -> None:
    group = await start(2)
    with pytest.raises(DplaunchError, match=words):
        await group.supervisor.restart(ranks)
    with pytest.raises(UsageError, match="drain_s must not be negative"):
        await group.supervisor.scale(1, -1.0)


async def test_the_size_that_it_has_is_no_change(start: Start) -> None:
    group = await start(2)
    await group.supervisor.scale(2)
    assert group.told(Kind.SCALE) == ["the group has 2 ranks already"]
    assert group.sizes == []
