"""Ranks that live and do not answer, or answer too late: found, ended, replaced. The same on every backend."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from dplaunch.errors import DplaunchError
from dplaunch.events import Event, Kind
from dplaunch.rank import Rank
from dplaunch.spec import ProbePolicy
from dplaunch.testing import Fault, StandInPlan, When, expected_tokens, poll_until_async
from tests.contract.conftest import Launch
from tests.contract.groups import Watched
from tests.contract.test_group import SLOW, params, tokens

PROBE = ProbePolicy(interval_s=0.2, timeout_s=3.0)
"""Soon for a test, and long for an engine that only waits for the processor."""

BACK_S = 60.0


async def back(watched: Watched, rank: int) -> Rank:
    """Waits until a rank's next incarnation is ready."""
    await poll_until_async(lambda: ("ready", 1) in watched.states(rank), BACK_S, f"rank {rank} to be back")
    return watched.group.supervisor.ranks[rank]


def hangs(watched: Watched) -> list[Event]:
    """The hangs that were found."""
    return [event for event in watched.events if event.kind is Kind.HANG]


async def test_a_rank_that_is_stuck_is_replaced_and_its_log_ends_with_where_it_was(launch: Launch) -> None:
    plan = StandInPlan(faults={(1, 0): Fault(when=When.REQUEST, hang=True)})
    watched = await launch(plan, probe=PROBE)
    prompts = [[index + 1] for index in range(8)]
    outputs = await asyncio.wait_for(watched.group.generate(prompts, params(10)), BACK_S)
    assert [tokens(output) for output in outputs] == [expected_tokens(prompt, 10) for prompt in prompts]
    rank = await back(watched, 1)
    (found,) = hangs(watched)
    assert (found.rank, found.message) == (1, "rank 1 has not answered for 3 s: it is ended and replaced")
    assert "its log ends with where it was stuck" in str(rank.last_exit)
    # The next incarnation writes to the same file.
    assert "strike_now" in rank.spec.log_file.read_text()


async def test_a_rank_whose_engine_fails_says_what_of_while_its_requests_move(launch: Launch) -> None:
    plan = StandInPlan(faults={(1, 0): Fault(when=When.REQUEST, error="device-side assert triggered")})
    watched = await launch(plan)
    prompts = [[index + 1] for index in range(8)]
    outputs = await asyncio.wait_for(watched.group.generate(prompts, params(10)), BACK_S)
    assert [tokens(output) for output in outputs] == [expected_tokens(prompt, 10) for prompt in prompts]
    await back(watched, 1)
    words = "rank 1 died while serving: exit code 1: RuntimeError: device-side assert triggered; log: "
    assert any(words in event.message for event in watched.events)


async def test_a_rank_that_works_on_a_long_call_or_sleeps_is_not_taken_for_hung(
    launch: Launch,
) -> None:
    watched = await launch(probe=ProbePolicy(interval_s=0.1, timeout_s=2.0))
    group = watched.group
    await group.call("sleep", 1, "abort")
    assert await group.call("work", 5.0, rank=1) == [None]
    await group.call("wake_up", None)
    assert hangs(watched) == []
    assert watched.states(0) == watched.states(1) == [("starting", 0), ("ready", 0)]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that is stopped inside the block; it may be gone at its end."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def test_a_stopped_rank_is_killed_and_replaced(launch: Launch, has_processes: bool) -> None:
    if not has_processes:
        pytest.skip("a thread cannot be stopped")
    watched = await launch(SLOW, probe=PROBE)
    group = watched.group
    old = group.supervisor.ranks[1]
    assert old.handle is not None
    assert old.handle.pid is not None
    prompts = [[index + 1] for index in range(8)]
    answers = asyncio.create_task(group.generate(prompts, params(50)))
    await poll_until_async(lambda: group.client.load.get(1), BACK_S, "requests on rank 1")
    pid = old.handle.pid
    with stopped(pid):
        rank = await back(watched, 1)
        assert not os.path.exists(f"/proc/{pid}")
    outputs = await asyncio.wait_for(answers, BACK_S)
    assert [tokens(output) for output in outputs] == [expected_tokens(prompt, 50) for prompt in prompts]
    assert "SIGKILL(-9): it did not answer for 3 s and was ended; it was stopped" in str(rank.last_exit)
    assert [event.rank for event in hangs(watched)] == [1]


async def test_a_rank_that_answers_after_it_was_replaced_is_heard_by_nobody(
    launch: Launch, has_processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_processes:
        pytest.skip("a thread cannot be stopped")
    # As on a node that is frozen: it cannot be killed, and thaws when its ranks have long been replaced.
    monkeypatch.setattr("dplaunch.watch.KILL_WAIT_S", 0.1)
    watched = await launch(SLOW, probe=PROBE)
    group = watched.group
    handle = group.supervisor.ranks[1].handle
    assert handle is not None
    assert handle.pid is not None
    prompts = [[index + 1] for index in range(8)]
    answers = asyncio.create_task(group.generate(prompts, params(300)))
    await poll_until_async(lambda: group.client.load.get(1), BACK_S, "requests on rank 1")
    kill = handle.kill
    monkeypatch.setattr(handle, "kill", lambda: None)
    try:
        with stopped(handle.pid):
            rank = await back(watched, 1)
        # It goes on with the requests that it had, while the same ones are answered by others.
        assert handle.poll() is None
        outputs = await asyncio.wait_for(answers, BACK_S)
    finally:
        kill()
    assert [tokens(output) for output in outputs] == [expected_tokens(prompt, 300) for prompt in prompts]
    assert "its end was not seen" in str(rank.last_exit)
    await asyncio.wait_for(handle.wait(), BACK_S)


async def test_a_call_excuses_silence_only_for_so_long_and_says_which_rank_it_was_lost_with(launch: Launch) -> None:
    watched = await launch(probe=ProbePolicy(interval_s=0.2, timeout_s=1.0, busy_timeout_s=3.0))
    with pytest.raises(DplaunchError, match="rank 1"):
        await asyncio.wait_for(watched.group.call("work", 2 * BACK_S, rank=1), BACK_S)
    await back(watched, 1)
    assert [event.message for event in hangs(watched)] == ["rank 1 has not answered for 3 s: it is ended and replaced"]
    assert watched.states(0) == [("starting", 0), ("ready", 0)]
