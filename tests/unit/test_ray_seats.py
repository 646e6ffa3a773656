"""A rank's place in a Ray cluster: what it holds, what it leaves behind, and what becomes of a rank that loses it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray")

from dplaunch.backends import seat
from dplaunch.backends.cluster import NAMESPACE
from dplaunch.backends.needs import Need
from dplaunch.backends.ray import RayBackend
from dplaunch.backends.seats import Seats

from dplaunch.backend import Exit, RankHandle
from dplaunch.errors import BackendError
from dplaunch.spec import LaunchSpec
from dplaunch.testing import STANDIN_ENGINE, Fault, When, expected_tokens, poll_until, poll_until_async
from tests.contract.boots import make_boot
from tests.contract.raw import RawLauncher
from tests.ray_for_tests import RayForTests
from tests.unit.conftest import MakeGroup

SOON_S = 20.0
"""Seconds within which a rank that was told to end has ended, on a busy machine."""

GPU = {"GPU": 1.0}

LIGHT = "os:getpid"
"""What helpers import here: the stand-in engine needs no vLLM."""


async def test_a_seat_in_the_users_group_holds_the_devices_and_leaves_the_group_when_it_goes(
    own_group: MakeGroup, cluster: RayForTests
) -> None:
    import ray

    group = own_group({"CPU": 1}, GPU, GPU)
    before = cluster.occupied()
    taken = await seat.take("own", Need(gpus=2, group=group, bundles=(1, 2)), None)
    try:
        assert len(set(taken.devices)) == 2
        assert taken.group_id == group.id.hex()
        assert {actor["name"] for actor in cluster.actors()} == {"own", "own.1"}
    finally:
        taken.leave()
        taken.leave()
    poll_until(lambda: cluster.actors() == [])
    assert cluster.occupied() == before
    assert ray.util.placement_group_table(group)["state"] == "CREATED"


def free_in(group: Any, bundle: int) -> float:
    """The part of a bundle's device that nobody holds."""
    import ray

    free: float = ray.available_resources().get(f"GPU_group_{bundle}_{group.id.hex()}", 0.0)
    return free


async def test_a_share_of_a_device_leaves_the_rest_of_the_users_bundle_to_the_trainer(own_group: MakeGroup) -> None:
    group = own_group(GPU)
    taken = await seat.take("share", Need(gpus=1, share=0.4, group=group, bundles=(0,)), None)
    try:
        assert len(taken.devices) == 1
        poll_until(lambda: free_in(group, 0) == pytest.approx(0.6), what="0.6 of the bundle")
    finally:
        taken.leave()


# Groups of our own.


async def test_shares_of_one_device_are_given_to_several_ranks(cluster: RayForTests) -> None:
    seats = [await seat.take(f"part{rank}", Need(gpus=1, share=0.5), None) for rank in range(2)]
    try:
        assert seats[0].devices == seats[1].devices
        poll_until(lambda: cluster.occupied()[0]["GPU"] == pytest.approx(1.0))
    finally:
        for each in seats:
            each.leave()


async def test_a_name_that_is_taken_is_told_and_leaves_nothing(cluster: RayForTests) -> None:
    first = await seat.take("twice", Need(), None)
    try:
        held = cluster.occupied()
        with pytest.raises(BackendError, match="the name 'twice' is taken in this Ray cluster") as caught:
            await seat.take("twice", Need(), None)
        assert "--name" in caught.value.hint
        poll_until(lambda: cluster.occupied() == held)
        assert not first.lost.done()
    finally:
        first.leave()


async def test_what_finds_no_place_is_told_with_what_it_wants(
    cluster: RayForTests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seat, "PLACE_TIMEOUT_S", 0.5)
    with pytest.raises(BackendError, match=r"gave huge no place within .* it wants 1 CPU and 40 GPU"):
        await seat.take("huge", Need(cpus=1, gpus=40), None)


async def test_a_seat_without_a_cpu_is_given_where_all_are_taken(cluster: RayForTests) -> None:
    import ray

    free = ray.available_resources()["CPU"]
    seats = Seats()
    seats.needs = {0: Need(cpus=free), 1: Need(cpus=0.0)}
    try:
        await seats.take(0, "all", None)
        taken = await seats.take(1, "none", None)
        assert taken.sight.pid > 0
        await seats.release(0)
        # Who plans next sees it as free, with no further wait.
        assert ray.available_resources()["CPU"] == free
        assert seats.get(0) is None
        assert seats.get(1) is not None
    finally:
        await seats.close()


# A rank and its seat.


@pytest.fixture
async def backend(cluster: RayForTests, request: pytest.FixtureRequest) -> AsyncIterator[RayBackend]:
    """An open backend; its ranks are forked by the launcher's helper, or by an agent where the test says so."""
    backend = RayBackend(LIGHT, fork_here=getattr(request, "param", True))
    await backend.open(LaunchSpec(backend="ray", engine=STANDIN_ENGINE), dict(os.environ))
    yield backend
    await backend.close()


@pytest.fixture
async def launcher(backend: RayBackend) -> AsyncIterator[RawLauncher]:
    with RawLauncher(Path(), address=await backend.address()) as raw:
        yield raw


async def ended(handle: RankHandle) -> Exit:
    return await asyncio.wait_for(handle.wait(), SOON_S)


async def test_a_rank_ends_with_its_actor_and_the_next_incarnation_takes_a_new_seat(
    backend: RayBackend, launcher: RawLauncher, cluster: RayForTests
) -> None:
    import ray

    first = await backend.spawn(make_boot(launcher.address))
    launcher.handshake()
    pid = launcher.call("dplaunch_report")["pid"]
    ray.kill(ray.get_actor("contract_dp3", namespace=NAMESPACE))
    exit_ = await ended(first)
    assert exit_.signal == signal.SIGKILL
    assert exit_.reason.startswith("its Ray actor is dead: ")
    assert not psutil.pid_exists(pid)
    with RawLauncher(Path(), address=await backend.address()) as raw:
        second = await backend.spawn(make_boot(raw.address, incarnation=1))
        assert raw.handshake()["instance_id"] == "contract-r1_dp3"
        assert first.describe().partition("actor")[2] != second.describe().partition("actor")[2]
        assert [actor["name"] for actor in cluster.actors()] == ["contract-r1_dp3"]
        assert len(cluster.occupied()[1]) == 1


async def test_the_next_incarnation_keeps_the_seat_when_only_the_process_died(
    backend: RayBackend, launcher: RawLauncher, cluster: RayForTests
) -> None:
    first = await backend.spawn(make_boot(launcher.address, fault=Fault(when=When.BEFORE_HELLO, returncode=7)))
    assert await ended(first) == Exit(code=7)
    second = await backend.spawn(make_boot(launcher.address, incarnation=1))
    launcher.handshake()
    assert first.describe().partition("actor")[2] == second.describe().partition("actor")[2]
    assert [actor["name"] for actor in cluster.actors()] == ["contract_dp3"]


@pytest.mark.parametrize("backend", [False], indirect=True)
async def test_a_rank_of_a_nodes_agent_serves_logs_and_ends_as_any_other(
    backend: RayBackend, launcher: RawLauncher, tmp_path: Path
) -> None:
    log = tmp_path / "rank.log"
    log.write_text("what was there\n")
    handle = await backend.spawn(make_boot(launcher.address, env={"MADE": "so"}, log_file=log))
    launcher.handshake()
    report = launcher.call("dplaunch_report")
    assert report["env"] == dict(make_boot("", env={"MADE": "so"}).env)
    assert report["pid"] == handle.pid
    # Its parent is the agent's helper and not the launcher's.
    assert os.getpid() not in [parent.pid for parent in psutil.Process(report["pid"]).parents()[:2]]
    launcher.add("a", [4], max_tokens=5)
    (answer,) = launcher.finish("a")
    assert answer.tokens == expected_tokens([4], 5)
    await poll_until_async(lambda: "stand-in engine of rank 3 is ready" in log.read_text())
    assert log.read_text().startswith("what was there\n")
    handle.terminate()
    assert await ended(handle) == Exit(code=0)


@pytest.mark.parametrize("backend", [False], indirect=True)
async def test_how_a_rank_of_a_nodes_agent_ended_is_told_as_it_was(
    backend: RayBackend, launcher: RawLauncher, tmp_path: Path
) -> None:
    log = tmp_path / "rank.log"
    faults = {
        Fault(when=When.BEFORE_HELLO, returncode=42, stderr_bytes=500_000): Exit(code=42),
        Fault(when=When.BEFORE_HELLO, returncode=-signal.SIGSEGV): Exit(signal=signal.SIGSEGV),
    }
    for number, (fault, expected) in enumerate(faults.items()):
        handle = await backend.spawn(make_boot(launcher.address, rank=number, fault=fault, log_file=log))
        assert await ended(handle) == expected
        # Whoever hears of the end reads the last lines next.
        assert log.read_text().endswith(f"stand-in engine ends on purpose: {fault.returncode}\n")
    assert log.stat().st_size > 500_000
    deaf = await backend.spawn(make_boot(launcher.address, rank=5, fault=Fault(ignore_sigterm=True)))
    launcher.say_nothing_until_hello()
    deaf.terminate()
    assert deaf.poll() is None
    deaf.kill()
    assert await ended(deaf) == Exit(signal=signal.SIGKILL)
