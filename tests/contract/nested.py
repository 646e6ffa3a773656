"""An engine whose own executor is Ray, as far as a machine without a GPU allows; runs inside the rank.

It takes the steps of vLLM's Ray executor: it joins the cluster as the seam does, lets vLLM itself check the placement
group and choose the bundles, and makes one actor for each worker in them, under vLLM's own names. The rest is the
stand-in engine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dplaunch.backend import RankBoot
from dplaunch.channel import RankChannel
from dplaunch.identity import base_of
from dplaunch.seam.rank import join_cluster
from dplaunch.testing import standin

ENGINE = "tests.contract.nested:run"

NAMESPACE = "shared"
"""All workers of all ranks and groups go here: only their names keep them apart."""

REPORTS = "NESTED_REPORTS"
"""The environment variable that says in which directory ranks leave their reports."""

WORKERS = "NESTED_WORKERS"
"""The environment variable that says how many workers a rank has."""

ONE_ID = "NESTED_ONE_ID"
"""Set, it has all ranks name their workers after the group: what stock vLLM once did."""


class Worker:
    """In the place of vLLM's worker."""

    def devices(self) -> list[str]:
        """What Ray gave it."""
        import ray

        return [str(each) for each in ray.get_runtime_context().get_accelerator_ids()["GPU"]]


def run(boot: RankBoot, channel: RankChannel) -> None:
    """See the module."""
    workers = int(os.environ[WORKERS])
    parallel = SimpleNamespace(
        world_size=workers, tensor_parallel_size=workers, ray_runtime_env=None, placement_group=None
    )
    join_cluster(parallel, os.environ)
    instance_id = base_of(boot.instance_id) if ONE_ID in os.environ else boot.instance_id
    report = make_workers(parallel, instance_id)
    Path(os.environ[REPORTS], f"{boot.instance_id}.json").write_text(json.dumps(report))
    standin.run(boot, channel)


_alive: list[Any] = []
"""Actors end when nobody refers to them any more."""


def make_workers(parallel: Any, instance_id: str) -> dict[str, Any]:
    """The steps of the executor; what came of each."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.v1.executor import ray_utils

    # vLLM for CPU has no word for Ray's devices, and stops before it looks at any bundle.
    current_platform.ray_device_key = "GPU"
    handed_over = parallel.placement_group
    for on_driver in (True, False):  # the older executor's way and the newer one's
        ray_utils.initialize_ray_cluster(parallel, require_gpu_on_driver=on_driver)
    group = parallel.placement_group
    indices = [int(index) for index in envs.VLLM_RAY_BUNDLE_INDICES.split(",") if index]
    if indices:
        chosen = ray_utils.get_bundles_for_indices(group, indices, parallel.world_size)
    else:
        chosen = ray_utils.get_bundles_sorted_by_node(group)[: parallel.world_size]
    names = [
        ray_utils.build_actor_name(instance_id, worker, parallel.world_size, 1, 1)
        for worker in range(parallel.world_size)
    ]
    for name, (bundle, _, _) in zip(names, chosen, strict=True):
        options = {
            "name": name,
            "namespace": NAMESPACE,
            "num_cpus": 0,
            "num_gpus": envs.VLLM_RAY_PER_WORKER_GPUS,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle),
        }
        _alive.append(ray.remote(Worker).options(**options).remote())
    return {
        "names": names,
        "bundles": [bundle for bundle, _, _ in chosen],
        "specs": group.bundle_specs,
        "own_group": group == handed_over,
        "devices": [ray.get(worker.devices.remote(), timeout=60) for worker in _alive],
    }
