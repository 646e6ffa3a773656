"""A group in lockstep, over processes that are no processes: one part, with one fate."""

from __future__ import annotations

from dplaunch.events import Kind, RankState
from dplaunch.spec import Mode, RestartPolicy
from dplaunch.testing import poll_until_async
from tests.unit.supervision import KILLED, FakeHandle, FakeLink, Make


async def test_one_death_ends_the_others_too_and_all_come_back_under_their_next_names(make: Make) -> None:
    rig = make(dp=3, mode=Mode.LOCKSTEP, restart=RestartPolicy())
    await rig.supervisor.start()
    assert rig.supervisor.needed == 3
    await rig.dies(1)
    await poll_until_async(lambda: rig.client.said[3:].count(("up", 2)) == 1, 30)
    assert [handle.signals for handle in rig.handles[:3]] == [["SIGKILL"], [], ["SIGKILL"]]
    assert [rank.identity.instance_id for rank in rig.ranks] == [f"base-r1_dp{rank}" for rank in range(3)]
    assert [rank.restart_count for rank in rig.ranks] == [1, 1, 1]
    assert rig.supervisor.is_healthy
    # Only the one that died by itself may have been killed by its requests.
    assert rig.client.blamed == [1]
    assert sorted(rig.client.said[3:6]) == [("down", 0), ("down", 1), ("down", 2)]
    assert all(link.closed for link in rig.links[:3])


async def test_no_rank_takes_requests_before_all_are_back(make: Make) -> None:
    rig = make(dp=2, mode=Mode.LOCKSTEP, restart=RestartPolicy())
    await rig.supervisor.start()
    rig.on_spawn = lambda handle, link: link.ready.set_result({}) if link.rank == 0 else None
    await rig.dies(1)
    await poll_until_async(lambda: rig.ranks[0].state is RankState.READY and len(rig.links) == 4, 30)
    assert ("up", 0) not in rig.client.said[2:]
    assert rig.supervisor.ready_count == 0
    rig.links[3].ready.set_result({})
    await poll_until_async(lambda: rig.supervisor.ready_count == 2, 30)


async def test_a_death_while_the_group_comes_back_is_another_restart_of_all(make: Make) -> None:
    rig = make(dp=2, mode=Mode.LOCKSTEP, restart=RestartPolicy(backoff_s=0.01))
    await rig.supervisor.start()
    honest = rig.on_spawn

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        if link.rank == 0:
            rig.on_spawn = honest
            handle.end(KILLED)

    rig.on_spawn = on_spawn
    await rig.dies(1)
    await poll_until_async(lambda: rig.supervisor.ready_count == 2 and rig.ranks[0].identity.incarnation == 2, 30)
    assert rig.ranks[1].identity.incarnation == 2
    assert any("the group could not be started again: rank 0" in event.message for event in rig.events)


async def test_at_the_limit_the_whole_group_is_dead_and_says_of_what(make: Make) -> None:
    rig = make(dp=2, mode=Mode.LOCKSTEP, restart=RestartPolicy(limit=1))
    await rig.supervisor.start()
    await rig.dies(1)
    await rig.dies(0, incarnation=1)
    await poll_until_async(lambda: rig.gone, 30)
    (error,) = rig.gone
    assert "the ranks step together" in error.message
    assert "rank 0 died while serving: SIGKILL(-9)" in error.message
    assert "1 restarts in 300 s" in error.hint
    assert [rank.state for rank in rig.ranks] == [RankState.FAILED] * 2
    assert rig.client.dead == [error]
    assert [event.kind for event in rig.events].count(Kind.GROUP) == 3


async def test_a_stop_ends_the_watch_over_all(make: Make) -> None:
    rig = make(dp=2, mode=Mode.LOCKSTEP, restart=RestartPolicy())
    await rig.supervisor.start()
    await rig.supervisor.stop("enough")
    assert [rank.state for rank in rig.ranks] == [RankState.STOPPED] * 2
    assert ("down", 0) not in rig.client.said
