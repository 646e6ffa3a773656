"""Ranks whose own executor is Ray: every worker has a name and a place of its own.

The bug that this guards against: all engine cores of a data-parallel group had one `instance_id`, so their workers
had the same actor names, and all engine cores but the first died with ActorAlreadyExistsError.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from dplaunch.backends import survey

from dplaunch import life
from dplaunch.errors import RankFailedError
from dplaunch.inventory import Device, Node
from dplaunch.seam.preload import exec_environment
from dplaunch.spec import ClusterOptions, ExecutorKind
from dplaunch.testing import StandInPlan, poll_until, poll_until_async
from tests.contract import nested
from tests.contract.groups import Watched, group_spec
from tests.ray_for_tests import RayForTests

GIB = 2**30


@pytest.fixture(autouse=True)
def cluster(ray_cluster: RayForTests, vllm_imported: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayForTests]:
    """The session's cluster, on a machine that says it has the GPUs that Ray was told of."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    devices = tuple(
        Device(id=str(index), uuid=f"GPU-{index}", name="none", memory_total=80 * GIB, memory_free=79 * GIB)
        for index in range(4)
    )
    node = Node(name="here", cores=cores, memory_total=64 * GIB, memory_free=60 * GIB, devices=devices)
    monkeypatch.setattr(survey, "local_node", lambda environ=None: node)
    # The helper process of the other tests serves these as well.
    monkeypatch.setattr(life, "exec_environment", lambda env, device_type: exec_environment(env, "cpu"))
    before = ray_cluster.occupied()
    yield ray_cluster
    poll_until(lambda: ray_cluster.occupied() == before, 10, "the cluster to be as it was")
    poll_until(lambda: not ray_cluster.actors(), 10, "the end of all named actors")


class Launch:
    """Starts groups of nested ranks, and closes them."""

    def __init__(self, directory: Path) -> None:
        self.groups: list[Watched] = []
        self._directory = directory

    async def __call__(self, base_id: str, dp: int, workers: int = 1, **options: Any) -> Watched:
        env = {nested.REPORTS: str(self._directory), nested.WORKERS: str(workers), **options.pop("env", {})}
        spec = group_spec(
            self._directory,
            "ray",
            StandInPlan(),
            dp,
            base_id=base_id,
            executor=ExecutorKind.RAY,
            engine=nested.ENGINE,
            engine_args={"tensor_parallel_size": workers, **options.pop("engine_args", {})},
            env=env,
            **options,
        )
        watched = Watched(spec)
        self.groups.append(watched)
        await watched.group.open()
        return watched

    def report(self, instance_id: str) -> dict[str, Any]:
        """What a rank did."""
        found: dict[str, Any] = json.loads((self._directory / f"{instance_id}.json").read_text())
        return found


@pytest.fixture
async def launch(tmp_path: Path) -> AsyncIterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    for watched in launch.groups:
        await watched.group.close()


def workers_of(cluster: RayForTests) -> set[str]:
    """The names of all ranks' workers, in the one namespace that they share."""
    return {actor["name"] for actor in cluster.actors() if actor["namespace"] == nested.NAMESPACE}


def pid_of(watched: Watched, rank: int) -> int:
    pid = watched.group.supervisor.ranks[rank].report["pid"]
    assert isinstance(pid, int)
    return pid


async def test_ranks_groups_and_incarnations_name_their_workers_apart(launch: Launch, cluster: RayForTests) -> None:
    first = await launch("a", 3)
    await launch("b", 1)
    names = {"vllm_Worker_a_dp0", "vllm_Worker_a_dp1", "vllm_Worker_a_dp2", "vllm_Worker_b"}
    assert workers_of(cluster) == names
    os.kill(pid_of(first, 1), signal.SIGKILL)
    await poll_until_async(lambda: ("ready", 1) in first.states(1), 60, "the return of rank 1")
    # The dead rank's worker ended with it, and its GPU is the next one's.
    assert workers_of(cluster) == names - {"vllm_Worker_a_dp1"} | {"vllm_Worker_a-r1_dp1"}
    assert launch.report("a-r1_dp1")["devices"] == launch.report("a_dp1")["devices"]
    devices = [launch.report(name)["devices"] for name in ("a_dp0", "a-r1_dp1", "a_dp2", "b")]
    assert sorted(devices) == [[["0"]], [["1"]], [["2"]], [["3"]]]
    assert all(("down", 0) not in first.states(rank) for rank in (0, 2))


async def test_a_ranks_workers_are_in_the_bundles_that_its_seat_holds(launch: Launch, cluster: RayForTests) -> None:
    await launch("a", 2, workers=2)
    reports = [launch.report(f"a_dp{rank}") for rank in range(2)]
    for rank, report in enumerate(reports):
        assert report["own_group"]
        # The first is the rank's own; vLLM's workers are in those with a GPU, one each.
        assert report["specs"] == [{"CPU": report["specs"][0]["CPU"]}, {"GPU": 1.0}, {"GPU": 1.0}]
        assert report["bundles"] == [1, 2]
        assert report["names"] == [f"vllm_Worker_a_dp{rank}_TP{worker}" for worker in range(2)]
    assert sorted(device for report in reports for device in report["devices"]) == [["0"], ["1"], ["2"], ["3"]]


async def test_with_one_id_for_all_ranks_the_second_one_dies(launch: Launch) -> None:
    with pytest.raises(RankFailedError) as caught:
        await launch("a", 2, env={nested.ONE_ID: "1"})
    assert "ActorAlreadyExistsError" in str(caught.value)
    assert "vllm_Worker_a" in str(caught.value)


async def test_workers_ask_for_as_much_of_a_device_as_their_bundles_hold(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Meant for another engine of the user's, whose placement group has other bundles.
    monkeypatch.setenv("VLLM_RAY_BUNDLE_INDICES", "5")
    await launch("a", 2, cluster=ClusterOptions(num_gpus=0.4), engine_args={"gpu_memory_utilization": 0.3})
    for rank in range(2):
        report = launch.report(f"a_dp{rank}")
        assert report["specs"][1:] == [{"GPU": 0.4}]
        assert report["bundles"] == [1]
        assert len(report["devices"][0]) == 1


async def test_workers_are_in_the_users_own_bundles(launch: Launch) -> None:
    import ray

    group = ray.util.placement_group([{"GPU": 1}, {"CPU": 1}, {"GPU": 1}], strategy="STRICT_PACK")
    try:
        options = ClusterOptions(placement_groups=(group,), bundle_indices=((2,), (0,)))
        await launch("a", 2, cluster=options)
        assert [launch.report(f"a_dp{rank}")["bundles"] for rank in range(2)] == [[2], [0]]
        assert len(launch.report("a_dp0")["specs"]) == 3
    finally:
        for watched in launch.groups:
            await watched.group.close()
        ray.util.remove_placement_group(group)
