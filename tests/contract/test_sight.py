"""A running group can be seen and steered from outside, the same on every backend."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dplaunch import control_client
from dplaunch.control_client import GroupAddress
from dplaunch.control_wire import RemoteError
from dplaunch.errors import GroupClosedError, NoGroupError
from dplaunch.event_log import FILE_NAME
from dplaunch.testing import Fault, StandInPlan, When, poll_until_async
from tests.contract.conftest import Launch
from tests.contract.groups import Watched
from tests.contract.test_group import SLOW, params

DEATH = Fault(when=When.REQUEST, nth=2, returncode=-signal.SIGKILL)


def address_of(name: str) -> GroupAddress:
    """The group of this test; others may run on the machine."""
    (group,) = control_client.choose(name, one=True)
    return group


async def status(group: GroupAddress) -> dict[str, Any]:
    return await asyncio.to_thread(control_client.ask, group, "status")


def events(watched: Watched) -> list[dict[str, Any]]:
    """What the group's event log holds."""
    return [json.loads(line) for line in Path(watched.group.plan.log_dir, FILE_NAME).read_text().splitlines()]


async def test_its_status_tells_what_is_and_what_was(launch: Launch) -> None:
    plan = StandInPlan(token_delay_s=0.02, faults={(1, 0): DEATH})
    watched = await launch(plan, base_id="seen")
    group = await asyncio.to_thread(address_of, "seen")
    first = await status(group)
    assert (first["name"], first["state"], first["ready"], first["dp"]) == ("seen", "ready", 2, 2)
    assert first["backend"] == watched.group.spec.backend
    assert [rank["instance_id"] for rank in first["ranks"]] == ["seen_dp0", "seen_dp1"]
    batch = asyncio.create_task(watched.group.generate([[1], [2], [3], [4]], params(20), on_error="return"))
    busy = await poll_status(group, lambda seen: seen["requests"]["in_flight"])
    assert busy["requests"]["in_flight"] <= 4
    await batch
    after = await poll_status(group, lambda seen: seen["ranks"][1]["restarts"] == 1 and seen["ready"] == 2)
    back = after["ranks"][1]
    assert (back["state"], back["incarnation"], back["instance_id"]) == ("ready", 1, "seen-r1_dp1")
    assert back["last_exit"]["signal"] == signal.SIGKILL
    assert len(back["recovery_s"]) == 1
    assert back["process"] != first["ranks"][1]["process"]
    assert sum(rank["tokens"] for rank in after["ranks"]) > 0
    assert after["requests"]["in_flight"] == 0
    entered = [event for event in events(watched) if event["rank"] == 1 and event["state"] and not event["phase"]]
    assert [(event["state"], event["incarnation"]) for event in entered] == watched.states(1)
    assert {event["group"] for event in events(watched)} == {"seen"}


async def poll_status(group: GroupAddress, wanted: Any) -> dict[str, Any]:
    """The first status that is wanted."""
    async with asyncio.timeout(60):
        while not wanted(seen := await status(group)):
            await asyncio.sleep(0.01)
    return seen


async def test_it_is_stopped_with_time_for_what_is_in_flight(launch: Launch) -> None:
    watched = await launch(SLOW, base_id="stopped")
    group = await asyncio.to_thread(address_of, "stopped")
    batch = asyncio.create_task(watched.group.generate([[1]], params(25)))
    await poll_until_async(lambda: watched.group.client.unfinished == 1, 30)
    lines = await asyncio.to_thread(lambda: list(control_client.stream(group, "stop", {"drain": 60})))
    assert lines[-1] == {"v": 1, "type": "result", "result": {"ends_process": False, "pid": os.getpid()}}
    said = [line["event"]["message"] for line in lines[:-1]]
    assert "rank 0 is asked to stop: dplaunch stop" in said
    assert "rank 1 stopped" in said
    (output,) = await batch
    assert len(output.outputs[0].token_ids) == 25
    with pytest.raises(GroupClosedError):
        await watched.group.generate([[1]], params(1))
    await watched.group.close()
    with pytest.raises(NoGroupError):
        await asyncio.to_thread(address_of, "stopped")


async def test_what_cannot_be_asked_for_is_refused_in_words(launch: Launch) -> None:
    await launch(base_id="asked")
    group = await asyncio.to_thread(address_of, "asked")
    for verb, arguments, words in (
        ("dance", {}, "there is no verb 'dance'"),
        ("status", {"x": 1}, "status takes no 'x'"),
        ("stop", {"drain": -1}, "drain must be a number of seconds, not -1"),
        ("scale", {"dp": "3"}, "dp must be a whole number of ranks, not '3'"),
        ("restart", {"ranks": "all"}, "ranks must be a list of ranks"),
        ("restart", {"ranks": [5]}, "there is no rank 5"),
    ):
        with pytest.raises(RemoteError) as caught:
            await asyncio.to_thread(control_client.ask, group, verb, arguments)
        assert words in caught.value.message
    assert (await status(group))["state"] == "ready"


async def test_its_events_can_be_followed(launch: Launch) -> None:
    watched = await launch(base_id="followed")
    group = await asyncio.to_thread(address_of, "followed")
    following = asyncio.create_task(asyncio.to_thread(lambda: list(control_client.stream(group, "events"))))
    # It is told nothing of the past: the close must come after it is there.
    await poll_until_async(lambda: watched.group.sight.followers == 1, 30)
    await watched.group.close("the test is over")
    lines = await following
    assert lines[-1]["type"] == "result"
    assert "rank 0 is asked to stop: the test is over" in [line["event"]["message"] for line in lines[:-1]]


async def test_a_change_goes_on_when_whoever_asked_for_it_has_gone_and_is_the_only_one_meanwhile(
    launch: Launch,
) -> None:
    plan = StandInPlan(faults={(1, 0): Fault(slow_start_s=3.0)})
    watched = await launch(plan, dp=1, base_id="changed", engine_args={"max_num_seqs": 4})
    group = await asyncio.to_thread(address_of, "changed")
    reader, writer = await asyncio.open_unix_connection(str(group.path))
    writer.write(b'{"v": 1, "verb": "scale", "args": {"dp": 2}}\n')
    assert json.loads(await reader.readline())["event"]["message"] == "scaling from 1 rank to 2"
    writer.close()
    await writer.wait_closed()
    with pytest.raises(RemoteError, match="the group is busy scaling from 1 rank to 2"):
        await asyncio.to_thread(control_client.ask, group, "restart", {"ranks": [0]})
    await poll_until_async(lambda: watched.group.supervisor.ready_count == 2, 60, "the rank that joins")
    lines = await asyncio.to_thread(lambda: list(control_client.stream(group, "restart", {"rolling": True})))
    assert [rank["incarnation"] for rank in lines[-1]["result"]["ranks"]] == [1, 1]
    said = [line["event"]["message"] for line in lines[:-1]]
    assert said[0] == "restarting 2 ranks, one after the other"
    assert any(words.startswith("restarted 2 ranks in ") for words in said)
