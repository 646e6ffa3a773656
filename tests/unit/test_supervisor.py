"""Policy, over processes that are no processes: what the supervisor waits for and what it does about it."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from dplaunch.backend import Exit, RankBoot
from dplaunch.backoff import backoff_s
from dplaunch.errors import BackendError, DplaunchError, GroupDeadError, RankFailedError, StartTimeoutError
from dplaunch.events import Kind, Level, RankState
from dplaunch.spec import ProbePolicy, RestartPolicy
from dplaunch.testing import poll_until_async
from tests.unit.supervision import KILLED, Clock, FakeHandle, FakeLink, Make

# The start.


async def test_a_start_returns_when_every_rank_has_proved_itself(make: Make) -> None:
    rig = make(dp=3)
    await rig.supervisor.start()
    assert [rank.state for rank in rig.ranks] == [RankState.READY] * 3
    assert sorted(rig.client.said) == [("up", 0), ("up", 1), ("up", 2)]
    assert rig.states(1) == ["starting", "ready"]
    assert [rank.ready_response for rank in rig.ranks] == [{"n": 1}] * 3
    assert rig.ranks[2].report["instance_id"] == "base_dp2"
    assert all(handle.is_settled for handle in rig.handles)


async def test_a_rank_takes_no_requests_before_the_launcher_can_talk_to_it(make: Make) -> None:
    rig = make(data_path=asyncio.get_running_loop().create_future())
    starting = asyncio.create_task(rig.supervisor.start())
    await poll_until_async(lambda: len(rig.handles) == 2)
    await asyncio.sleep(0)
    assert rig.client.said == []
    rig.data_path.set_result(None)
    await starting
    assert len(rig.client.said) == 2


async def test_phases_are_passed_on_as_they_come(make: Make) -> None:
    rig = make(dp=1)

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        link.on_phase("loading")
        link.ready.set_result({})

    rig.on_spawn = on_spawn
    await rig.supervisor.start()
    (phase,) = [event for event in rig.events if event.phase]
    assert (phase.rank, phase.phase, phase.state) == (0, "loading", RankState.STARTING)


async def test_the_first_failure_is_the_root_cause_and_the_others_are_stopped(make: Make) -> None:
    rig = make(dp=3)

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        if link.rank == 1:
            link.say("ValueError", "no such model")
            handle.end(Exit(code=1))

    rig.on_spawn = on_spawn
    with pytest.raises(RankFailedError) as caught:
        await rig.supervisor.start()
    assert "rank 1 died while starting: ValueError: no such model" in caught.value.message
    await rig.supervisor.stop("the start failed")
    assert [handle.poll() for handle in rig.handles] == [KILLED, Exit(code=1), KILLED]
    assert [rank.state for rank in rig.ranks] == [RankState.STOPPED] * 3
    assert all(link.closed for link in rig.links)


async def test_a_rank_that_dies_ready_while_another_still_starts_ends_the_start_too(make: Make) -> None:
    rig = make(dp=2)
    rig.on_spawn = lambda handle, link: link.ready.set_result({}) if link.rank == 0 else None
    starting = asyncio.create_task(rig.supervisor.start())
    await poll_until_async(lambda: rig.ranks[0].state is RankState.READY)
    rig.handles[0].end(KILLED)
    with pytest.raises(RankFailedError, match=r"rank 0 .*SIGKILL\(-9\)"):
        await starting
    await rig.supervisor.stop("the start failed")
    assert [handle.poll() for handle in rig.handles] == [KILLED, KILLED]


async def test_last_words_that_come_after_the_exit_are_waited_for(make: Make) -> None:
    rig = make(dp=1)

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        handle.end(Exit(code=1))
        asyncio.get_running_loop().call_later(0.02, link.say, "OSError", "a late word")

    rig.on_spawn = on_spawn
    with pytest.raises(RankFailedError, match="a late word"):
        await rig.supervisor.start()


async def test_the_rank_that_ended_first_is_named_though_its_last_words_come_later(make: Make) -> None:
    # An exit by code may be explained by words that are still on the way; one by signal has none to wait for.
    rig = make(dp=2)

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        if link.rank == 1:
            handle.end(Exit(code=17))
            # The other follows while these words are waited for.
            later = asyncio.get_running_loop().call_later
            later(0.02, rig.handles[0].end, Exit(signal=6))
            later(0.1, link.say, "OSError", "the root cause")

    rig.on_spawn = on_spawn
    with pytest.raises(RankFailedError, match="rank 1 died while starting: OSError: the root cause"):
        await rig.supervisor.start()


async def test_an_exit_by_signal_names_it_with_its_number_and_the_log(make: Make, tmp_path: Path) -> None:
    (tmp_path / "0.log").write_text("the last line of the log\n")
    rig = make(dp=1)
    rig.on_spawn = lambda handle, link: handle.end(Exit(signal=4))
    with pytest.raises(RankFailedError) as caught:
        await rig.supervisor.start()
    assert "SIGILL(-4)" in caught.value.message
    assert "the last line of the log" in caught.value.detail
    assert str(tmp_path / "0.log") in caught.value.detail


async def test_a_rank_that_is_never_ready_ends_the_start_at_the_deadline(make: Make) -> None:
    rig = make(start_timeout_s=0.05)
    rig.on_spawn = lambda handle, link: link.ready.set_result({}) if link.rank == 0 else None
    with pytest.raises(StartTimeoutError, match="rank 1 was not ready after"):
        await rig.supervisor.start()
    assert rig.states(1) == ["starting", "failed"]


async def test_the_deadline_is_for_making_the_process_too(make: Make) -> None:
    async def never(boot: RankBoot) -> FakeHandle:
        await asyncio.Event().wait()
        raise AssertionError

    rig = make(dp=1, start_timeout_s=0.05)
    rig.spawn = never  # type: ignore[method-assign]
    with pytest.raises(StartTimeoutError, match="rank 0 was not ready after"):
        await rig.supervisor.start()


@pytest.mark.parametrize(
    "lie", [{"instance_id": "base_dp0_dp0"}, {"engine_id": "kv_dp0_dp0"}, {"data_parallel_index": 7}]
)
async def test_a_rank_that_is_not_who_it_should_be_is_refused(make: Make, lie: dict[str, Any]) -> None:
    rig = make(dp=1)
    rig.client.lie = lie
    (name, value), *_ = lie.items()
    with pytest.raises(DplaunchError, match=f"{name} is {value!r}"):
        await rig.supervisor.start()
    assert rig.client.said == []


async def test_a_backend_that_cannot_spawn_fails_the_start_with_its_own_error(make: Make) -> None:
    rig = make()

    def refuse(handle: FakeHandle, link: FakeLink) -> None:
        raise BackendError("no process could be made")

    rig.on_spawn = refuse
    with pytest.raises(BackendError, match="no process"):
        await rig.supervisor.start()


# A rank that dies while it serves.


async def test_a_rank_that_dies_leaves_routing_and_comes_back_under_a_new_name(make: Make) -> None:
    rig = make(restart=RestartPolicy())
    await rig.supervisor.start()
    await rig.dies(1)
    await poll_until_async(lambda: rig.client.said[2:] == [("down", 1), ("up", 1)])
    await rig.until(1, RankState.READY)
    assert rig.states(1) == ["starting", "ready", "down", "starting", "ready"]
    assert rig.ranks[1].identity.instance_id == "base-r1_dp1"
    assert rig.ranks[1].last_exit == KILLED
    assert rig.states(0) == ["starting", "ready"]
    old, new = [link for link in rig.links if link.rank == 1]
    assert old.closed
    assert not new.closed
    news = [event for event in rig.events if event.level is Level.WARNING]
    assert "SIGKILL(-9), likely because the host or its cgroup ran out of memory" in news[0].message
    assert re.search(r"rank 1 is back after \d+\.\d s, pid 1001", news[1].message)
    assert len(rig.ranks[1].recovery_s) == rig.ranks[1].restart_count == 1


async def test_restarts_back_off_and_end_at_the_limit(make: Make, clock: Clock) -> None:
    rig = make(restart=RestartPolicy(limit=4, backoff_s=1.5, jitter=0))
    await rig.supervisor.start()
    for incarnation in range(5):
        await rig.dies(1, incarnation)
    await rig.until(1, RankState.FAILED)
    assert clock.slept == [1.5, 3.0, 6.0]  # the first is at once
    given_up, degraded = rig.events[-2:]
    assert given_up.message == "rank 1 does not come back: 4 restarts in 300 s"
    assert (degraded.kind, degraded.level) == (Kind.GROUP, Level.ERROR)
    assert degraded.message == "the group goes on without rank 1: 1 of 2 ranks are left, 1 are needed"
    assert rig.client.said[-1] == ("gone", 1)
    assert rig.ranks[0].state is RankState.READY
    assert rig.gone == []


async def test_restarts_outside_the_window_no_longer_count(make: Make, clock: Clock) -> None:
    rig = make(restart=RestartPolicy(limit=1, window_s=0.0))
    await rig.supervisor.start()
    for incarnation in range(4):
        await rig.dies(1, incarnation)
    await poll_until_async(lambda: rig.ranks[1].identity.incarnation == 4)
    assert clock.slept == []


async def test_ranks_that_died_together_do_not_start_together(make: Make, clock: Clock) -> None:
    rig = make(dp=8, restart=RestartPolicy(backoff_s=10, jitter=0.5))
    await rig.supervisor.start()
    for handle in list(rig.handles):
        handle.end(KILLED)
    await poll_until_async(lambda: len(rig.handles) == 16 and rig.supervisor.ready_count == 8)
    # The first is started at once; for the others up to half of the back-off is left to chance.
    assert len(clock.slept) == len(set(clock.slept)) == 7
    assert all(0 < slept <= 5 for slept in clock.slept)


def test_a_wait_grows_and_a_share_of_it_is_left_to_chance() -> None:
    policy = RestartPolicy(backoff_s=2, jitter=0.25, window_s=10)
    waits = [[backoff_s(count, policy) for _ in range(50)] for count in range(5)]
    assert set(waits[0]) == {0.0}
    for some, (least, most) in zip(waits[1:], [(1.5, 2), (3, 4), (6, 8), (7.5, 10)], strict=True):
        assert least <= min(some) < max(some) <= most


async def test_a_restart_that_fails_counts_against_the_limit(make: Make, clock: Clock) -> None:
    rig = make(restart=RestartPolicy(limit=3, jitter=0))
    await rig.supervisor.start()
    rig.on_spawn = lambda handle, link: handle.end(Exit(signal=11))
    await rig.dies(1)
    await rig.until(1, RankState.FAILED)
    assert rig.ranks[1].identity.incarnation == 3
    assert rig.states(1) == ["starting", "ready", *["down", "starting"] * 3, "down", "failed"]
    assert clock.slept == [1.0, 2.0]


@pytest.mark.parametrize("error", [BackendError("the zygote is gone"), OSError(24, "Too many open files")])
async def test_a_restart_that_cannot_even_begin_is_tried_again(make: Make, clock: Clock, error: Exception) -> None:
    rig = make(restart=RestartPolicy())
    await rig.supervisor.start()
    honest, failures = rig.on_spawn, [error]

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        if failures:
            raise failures.pop()
        honest(handle, link)

    rig.on_spawn = on_spawn
    await rig.dies(1)
    await poll_until_async(lambda: rig.client.said[2:] == [("down", 1), ("up", 1)])
    assert rig.ranks[1].identity.incarnation == 2
    (news,) = [event.message for event in rig.events if "could not be started again" in event.message]
    assert str(error) in news


async def test_a_hung_restart_is_killed_at_the_deadline(make: Make, clock: Clock) -> None:
    rig = make(restart=RestartPolicy(limit=1), start_timeout_s=0.05)
    await rig.supervisor.start()
    rig.on_spawn = lambda handle, link: None
    await rig.dies(1)
    await rig.until(1, RankState.FAILED)
    assert rig.handles[-1].signals == ["SIGKILL"]


# A rank that hangs, or says itself that it is about to end.

PROBE = ProbePolicy(interval_s=0.02, timeout_s=0.2)


async def test_a_rank_that_does_not_answer_is_taken_out_killed_and_replaced(make: Make) -> None:
    rig = make(restart=RestartPolicy(), probe=PROBE)
    await rig.supervisor.start()
    hung = rig.handles[1]
    rig.client.silent.add(1)
    hung.on_dump_stack = lambda: rig.client.silent.clear()  # its next incarnation answers
    await poll_until_async(lambda: rig.client.said[2:] == [("down", 1), ("up", 1)])
    assert hung.signals == ["stack", "SIGKILL"]
    (news,) = [event for event in rig.events if event.kind is Kind.HANG]
    assert news.message == "rank 1 has not answered for 0.2 s: it is ended and replaced"
    assert rig.client.reasons == [news.message]
    assert rig.ranks[1].last_exit == Exit(
        signal=9, reason="it did not answer for 0.2 s and was ended; it was stopped, or stuck in the kernel"
    )
    (down,) = [event.message for event in rig.events if event.state is RankState.DOWN]
    assert "rank 1 died while serving: SIGKILL(-9): it did not answer for 0.2 s and was ended" in down
    assert "likely because" not in down


async def test_where_a_rank_was_stuck_is_in_its_log_before_it_is_killed(make: Make, tmp_path: Path) -> None:
    rig = make(dp=1, restart=RestartPolicy(), probe=PROBE)
    await rig.supervisor.start()
    rig.client.silent.add(0)

    def write() -> None:
        assert "SIGKILL" not in rig.handles[0].signals
        (tmp_path / "0.log").write_text("Current thread 0x1 (most recent call first)")
        rig.client.silent.clear()

    rig.handles[0].on_dump_stack = write
    await poll_until_async(lambda: len(rig.handles) == 2)
    assert "its log ends with where it was stuck" in str(rig.ranks[0].last_exit)


async def test_a_hung_rank_whose_end_is_not_seen_is_replaced_all_the_same(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a node that is frozen.
    monkeypatch.setattr("dplaunch.watch.KILL_WAIT_S", 0.05)
    rig = make(dp=1, restart=RestartPolicy(), probe=PROBE)
    await rig.supervisor.start()
    rig.client.silent.add(0)
    rig.handles[0].immortal = True
    rig.handles[0].on_dump_stack = rig.client.silent.clear
    await poll_until_async(lambda: rig.supervisor.ranks[0].identity.incarnation == 1)
    assert "its end was not seen" in str(rig.ranks[0].last_exit)
    rig.handles[0].immortal = False


async def test_a_hung_rank_is_not_counted_as_ready_while_it_is_ended(make: Make) -> None:
    rig = make(restart=RestartPolicy(), probe=PROBE)
    await rig.supervisor.start()
    assert rig.supervisor.ready_count == 2
    rig.client.silent.add(1)
    counts: list[int] = []

    def look() -> None:
        counts.append(rig.supervisor.ready_count)
        rig.client.silent.clear()

    rig.handles[1].on_dump_stack = look
    await poll_until_async(lambda: len(rig.handles) == 3)
    assert counts == [1]


async def test_a_rank_whose_engine_says_that_it_is_dead_leaves_at_once_and_may_end_by_itself(make: Make) -> None:
    rig = make(restart=RestartPolicy())
    await rig.supervisor.start()
    rig.supervisor.engine_failed(1)
    await poll_until_async(lambda: rig.client.said[2:] == [("down", 1)])
    assert rig.handles[1].signals == []
    assert rig.supervisor.ready_count == 1
    rig.links[1].say("RuntimeError", "CUDA error: device-side assert triggered")
    rig.handles[1].end(Exit(code=1))
    await poll_until_async(lambda: rig.supervisor.ready_count == 2)
    (down,) = [event.message for event in rig.events if event.state is RankState.DOWN]
    words = "rank 1 died while serving: exit code 1: RuntimeError: CUDA error: device-side assert triggered; log: "
    assert words in down


async def test_a_rank_whose_engine_is_dead_and_that_does_not_end_is_killed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dplaunch.watch.ENGINE_END_S", 0.05)
    rig = make(restart=RestartPolicy())
    await rig.supervisor.start()
    rig.supervisor.engine_failed(0)
    await poll_until_async(lambda: len(rig.handles) == 3)
    assert rig.handles[0].signals == ["SIGKILL"]


# The end of a group.


async def test_the_group_is_dead_below_min_ranks_and_says_why(make: Make, tmp_path: Path) -> None:
    (tmp_path / "1.log").write_text("what it died of\n")
    rig = make(min_ranks=2)
    await rig.supervisor.start()
    await rig.dies(1)
    await rig.until(1, RankState.FAILED)
    (error,) = rig.gone
    assert isinstance(error, GroupDeadError)
    assert error.message.startswith("1 of 2 ranks are left, 2 are needed: rank 1 died while serving: SIGKILL(-9), ")
    assert "Restarts are off" in error.hint
    assert "what it died of" in error.detail
    assert rig.client.dead == [error]


async def test_the_group_goes_on_degraded_as_long_as_min_ranks_are_left(make: Make) -> None:
    rig = make(dp=3, min_ranks=1)
    await rig.supervisor.start()
    for rank in (0, 1):
        await rig.dies(rank)
        await rig.until(rank, RankState.FAILED)
    assert rig.gone == []
    await rig.dies(2, exit_=Exit(signal=4))
    await rig.until(2, RankState.FAILED)
    (error,) = rig.gone
    assert "rank 2 died while serving: SIGILL(-4)" in error.message
    # What went before is told too.
    assert "rank 0 died while serving: SIGKILL(-9)" in error.detail
    assert "rank 1 died while serving: SIGKILL(-9)" in error.detail


# Stopping.


async def test_a_stop_asks_all_before_it_waits_for_any(make: Make) -> None:
    rig = make()
    await rig.supervisor.start()
    for handle in rig.handles:
        handle.stubborn = True
    stopping = asyncio.create_task(rig.supervisor.stop("enough"))
    await poll_until_async(lambda: all(handle.signals == ["SIGTERM"] for handle in rig.handles))
    assert not stopping.done()
    for handle in rig.handles:
        handle.end(Exit(code=0))
    await stopping
    assert [rank.state for rank in rig.ranks] == [RankState.STOPPED] * 2
    assert "enough" in next(event.message for event in rig.events if event.state is RankState.STOPPING)


async def test_a_rank_that_does_not_serve_yet_is_killed_at_once_because_it_would_not_listen(make: Make) -> None:
    rig = make(shutdown_timeout_s=60)
    rig.on_spawn = lambda handle, link: link.ready.set_result({}) if link.rank == 0 else None
    starting = asyncio.create_task(rig.supervisor.start())
    await rig.until(0, RankState.READY)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    for handle in rig.handles:
        handle.stubborn = handle.boot.rank == 1
    await asyncio.wait_for(rig.supervisor.stop("Ctrl-C"), 5)
    assert {handle.boot.rank: handle.signals for handle in rig.handles} == {0: ["SIGTERM"], 1: ["SIGKILL"]}


async def test_what_does_not_end_by_the_deadline_is_killed(make: Make) -> None:
    rig = make(shutdown_timeout_s=0.05)
    await rig.supervisor.start()
    rig.handles[1].stubborn = True
    await rig.supervisor.stop("enough")
    assert rig.handles[0].signals == ["SIGTERM"]
    assert rig.handles[1].signals == ["SIGTERM", "SIGKILL"]


async def test_a_stop_that_is_cancelled_kills_at_once(make: Make) -> None:
    rig = make(shutdown_timeout_s=60)
    await rig.supervisor.start()
    for handle in rig.handles:
        handle.stubborn = True
    stopping = asyncio.create_task(rig.supervisor.stop("enough"))
    await poll_until_async(lambda: rig.handles[1].signals)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    assert [handle.signals for handle in rig.handles] == [["SIGTERM", "SIGKILL"]] * 2
    assert [rank.state for rank in rig.ranks] == [RankState.STOPPED] * 2


async def test_a_second_stop_does_nothing(make: Make) -> None:
    rig = make()
    await rig.supervisor.start()
    await rig.supervisor.stop("first")
    seen = len(rig.events)
    await rig.supervisor.stop("second")
    assert len(rig.events) == seen


async def test_a_stop_before_anything_was_started_is_fine(make: Make) -> None:
    rig = make()
    await rig.supervisor.stop("changed my mind")
    assert rig.events == []


async def test_a_stop_ends_a_restart_that_is_waiting_for_its_turn(make: Make) -> None:
    rig = make(restart=RestartPolicy(backoff_s=3600))
    await rig.supervisor.start()
    await rig.dies(1)
    await rig.dies(1, incarnation=1)
    await rig.until(1, RankState.DOWN)
    await asyncio.wait_for(rig.supervisor.stop("enough"), 5)
    assert rig.ranks[1].state is RankState.STOPPED


async def test_an_exit_that_was_asked_for_is_no_death(make: Make) -> None:
    rig = make(restart=RestartPolicy())
    await rig.supervisor.start()
    await rig.supervisor.stop("enough")
    assert [event for event in rig.events if event.level is not Level.INFO] == []
    assert ("down", 0) not in rig.client.said
