"""Rows that need a group of their own: given up ranks, a full log disk, a launcher that is killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dplaunch.spec import RestartPolicy
from dplaunch.testing import Fault, StandInPlan, When, poll_until
from tests.chaos.load import End, Load
from tests.chaos.rig import DEADLY, Rig, chaos_spec
from tests.chaos.test_table import asks
from tests.ray_for_tests import RayForTests
from tests.real.families import ORPHANS_S, family, is_gone, ranks_of
from tests.real.standins import run_python

START_S = 240.0
"""Seconds for a new process to import vLLM and launch, on a machine that is busy with other tests."""


@pytest.fixture(params=["mp", "ray"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    if name == "ray":
        pytest.importorskip("ray")
        cluster: RayForTests = request.getfixturevalue("ray_cluster")
        before = cluster.occupied(), cluster.actors()
        yield name
        poll_until(lambda: (cluster.occupied(), cluster.actors()) == before, 30, "the cluster to be as it was")
    else:
        yield name


async def test_a_rank_that_dies_at_every_request_is_given_up_and_the_others_answer_all(
    backend: str, vllm_imported: None, tmp_path: Path
) -> None:
    plan = StandInPlan(
        faults={(1, again): Fault(when=When.REQUEST, nth=0, after_tokens=2, returncode=9) for again in range(9)},
        token_delay_s=0.02,
    )
    rig = Rig(chaos_spec(tmp_path, backend, 3, plan=plan, restart=RestartPolicy(limit=2, backoff_s=0.02)))
    source = asks(1)
    async with rig.group, Load(rig.group, lambda: next(source), streams=6) as load:
        await rig.failed(1)
        await load.flows(20)
        assert rig.group.client.ranks == [0, 2]
    said = "\n".join(event.message for event in rig.events)
    assert load.tally.wrong == []
    assert set(load.tally.ends) == {End.EXACT}, f"{load.tally}\n{said}"
    for word in ("rank 1 died while serving: exit code 9", "rank 1 does not come back: 2 restarts in 300 s"):
        assert word in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few kilobytes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(directory)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no small disk can be made here: {made.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


async def test_a_full_log_disk_costs_log_lines_and_nothing_else(
    backend: str, vllm_imported: None, small_disk: Path, tmp_path: Path
) -> None:
    rig = Rig(
        chaos_spec(tmp_path, backend, 2, plan=StandInPlan(default=DEADLY, token_delay_s=0.02), log_dir=small_disk)
    )
    source = asks(2)
    async with rig.group, Load(rig.group, lambda: next(source), streams=6) as load:
        await load.flows()
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"x" * 4096):
                pass
        rig.kill(1)
        await rig.down(1, 0)
        await rig.whole()
        await load.flows()
        await rig.misbehave(0, when=When.REQUEST, error="words for a log that is full")
        await rig.down(0, 0)
        await rig.whole()
        await load.flows()
    said = "\n".join(event.message for event in rig.events)
    assert load.tally.wrong == []
    assert set(load.tally.ends) == {End.EXACT}, f"{load.tally}\n{said}"
    assert "words for a log that is full" in said


LAUNCHER = """
import asyncio, sys
from pathlib import Path
from tests.chaos.load import Load
from tests.chaos.rig import Rig, chaos_spec
from tests.chaos.test_table import asks

async def main():
    rig, source = Rig(chaos_spec(Path(sys.argv[1]), sys.argv[2])), asks(3)
    async with rig.group, Load(rig.group, lambda: next(source)) as load:
        await load.flows()
        print("flows", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def test_nothing_is_left_soon_after_a_launcher_in_a_ray_cluster_was_killed(
    ray_cluster: RayForTests, tmp_path: Path
) -> None:
    before, actors = ray_cluster.occupied(), ray_cluster.actors()
    os.environ["RAY_ADDRESS"], had = ray_cluster.address, os.environ.get("RAY_ADDRESS")
    try:
        with run_python(LAUNCHER, str(tmp_path), "ray") as command:
            command.wait_for("flows", START_S)
            everyone = psutil.Process().children(recursive=True)
            ranks = ranks_of(everyone, "chaos")
            below = [worker for rank in ranks for worker in rank.children(recursive=True)]
            assert len(ranks) == len(below) == 4
            processes = {*family(command.process.pid), *ranks, *below}
            ranks[0].suspend()
            began = time.monotonic()
            command.process.kill()
            poll_until(lambda: all(map(is_gone, processes)), 60, "the end of all processes")
            seconds = time.monotonic() - began
            poll_until(
                lambda: ray_cluster.occupied() == before and ray_cluster.actors() == actors,
                60,
                "the cluster to be as it was",
            )
            sys.stdout.write(
                f"processes gone after {seconds:.1f} s (aimed at: {ORPHANS_S:g}), "
                f"actors and placement groups after {time.monotonic() - began:.1f} s\n"
            )
    finally:
        if had is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = had
