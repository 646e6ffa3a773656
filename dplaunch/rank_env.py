"""A rank's environment: made, not inherited. What described the launcher's own place would mislead a rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

DROPPED: Mapping[str, tuple[str, ...]] = {
    "the launcher's place under torchrun, which torch.distributed in a rank would take for its own": (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("NODE_RANK", "CROSS_RANK", "CROSS_SIZE", "ROLE_*", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_*"),
    ),
    "error handling that torchrun sets for trainers; vLLM chooses its own": (
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "NCCL_ASYNC_ERROR_HANDLING",
    ),
    "a trainer's own settings, read by the same libraries inside a rank": ("ACCELERATE_*",),
    "the launcher's place in a data-parallel group of vLLM": ("VLLM_DP_*",),
    "the launcher's place under MPI or Slurm, from which libraries guess a rank": (
        *("PMI_*", "PMIX_*", "OMPI_COMM_WORLD_*", "OMPI_UNIVERSE_SIZE", "MV2_COMM_WORLD_*"),
        *("MPI_LOCALRANKID", "MPI_LOCALNRANKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
        *("SLURM_GTIDS", "SLURM_TASK_PID", "FLUX_TASK_*"),
    ),
    "the launcher's place in a Ray cluster, where it runs in a task or an actor": (
        *("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_WORKER_*", "RAY_ACTOR_*", "RAY_TASK_*"),
    ),
    "an address in the launcher's memory, which torch's compiler keeps there": (
        "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
    ),
    # torchrun sets OMP_NUM_THREADS to 1, and a list of cores names the launcher's, not the rank's.
    "threads and their cores, which the plan gives out": (
        *("OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"),
        "VLLM_CPU_OMP_THREADS_BIND",
    ),
}
"""What is dropped from the launcher's environment, as patterns, by the reason why."""

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"

PLACEMENT_GROUP_VARIABLE = "DPLAUNCH_PLACEMENT_GROUP"
"""Tells a rank whose own executor is Ray which placement group holds its workers' devices: Ray's id of it."""


def make_env(
    base: Mapping[str, str],
    *,
    device_type: str,
    devices: Sequence[str] | None,
    cpus: Sequence[int],
    extra: Mapping[str, str],
    workers: int = 0,
) -> dict[str, str]:
    """The whole environment of a rank.

    Args:
        base: the launcher's environment.
        device_type: "cuda" or "cpu".
        devices: what the rank may see; used on "cuda". None when that is chosen later.
        cpus: the rank's cores; used on "cpu".
        extra: set over everything else.
        workers: its worker processes; 0 when the engine core drives the device itself.
    """
    env = helper_env(base)
    env.pop(DEVICES_VARIABLE, None)
    if device_type == "cuda":
        if devices is not None:
            env[DEVICES_VARIABLE] = ",".join(devices)
        # The inventory numbers devices by PCI bus, CUDA by default by speed: on mixed machines they differ.
        env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    elif cpus:
        env["OMP_NUM_THREADS"] = str(max(1, len(cpus) // max(1, workers)))
        env["VLLM_CPU_OMP_THREADS_BIND"] = _binding(cpus, workers)
    return {**env, **extra}


def helper_env(base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a helper process: the launcher's, without what would mislead a rank made from it.

    Which devices are visible stays as it is: that is decided for each rank.
    """
    return {name: value for name, value in base.items() if not _is_dropped(name)}


def _binding(cpus: Sequence[int], workers: int) -> str:
    # Without workers the rank's process is bound as a whole; so it is where workers must share a core.
    if workers < 1 or len(cpus) < workers:
        return "nobind"
    return "|".join(",".join(map(str, block)) for block in blocks(cpus, workers))


def blocks(cores: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """The cores in `count` contiguous blocks, as even as can be, the larger ones first."""
    size, larger = divmod(len(cores), count)
    start = 0
    for index in range(count):
        end = start + size + (index < larger)
        yield tuple(cores[start:end])
        start = end


def _is_dropped(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for patterns in DROPPED.values() for pattern in patterns)
