"""What a rank's environment is made of."""

from __future__ import annotations

import pytest

from dplaunch.rank_env import blocks, helper_env, make_env

TRAINER = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "0",
    "ROLE_RANK": "3",
    "ROLE_NAME": "default",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "NODE_RANK": "0",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "OMP_NUM_THREADS": "1",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR": "139826302519056",
    "ACCELERATE_USE_FSDP": "true",
    "VLLM_DP_RANK": "1",
    "VLLM_DP_MASTER_PORT": "1234",
    "PMI_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "GOMP_CPU_AFFINITY": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
}
KEPT = {"PATH": "/bin", "HF_HOME": "/hf", "VLLM_LOGGING_LEVEL": "INFO", "SLURM_JOB_ID": "7", "RANKING": "x"}


@pytest.mark.parametrize("name", sorted(TRAINER))
def test_what_describes_the_launchers_own_place_does_not_reach_a_rank(name: str) -> None:
    env = make_env(TRAINER | KEPT, device_type="cuda", devices=["0"], cpus=[], extra={})
    assert name not in env
    assert name not in helper_env(TRAINER | KEPT)


def test_everything_else_reaches_a_rank() -> None:
    assert helper_env(TRAINER | KEPT) == KEPT


def test_a_rank_sees_its_own_devices_and_no_others() -> None:
    base = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    env = make_env(base, device_type="cuda", devices=["2", "3"], cpus=[], extra={})
    assert env["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "OMP_NUM_THREADS" not in env


def test_devices_that_are_chosen_later_are_not_the_launchers() -> None:
    env = make_env({"CUDA_VISIBLE_DEVICES": "0,1"}, device_type="cuda", devices=None, cpus=[], extra={})
    assert env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_the_users_own_device_order_stays() -> None:
    base = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert make_env(base, device_type="cuda", devices=["0"], cpus=[], extra={})["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_a_helper_keeps_the_launchers_devices() -> None:
    assert helper_env({"CUDA_VISIBLE_DEVICES": "1"}) == {"CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize(
    ("cpus", "workers", "threads", "binding"),
    [
        ((0,), 0, "1", "nobind"),
        ((0, 1, 2), 0, "3", "nobind"),
        ((0, 1), 1, "2", "0,1"),
        ((0, 1, 2, 3), 2, "2", "0,1|2,3"),
        ((4, 5, 6), 2, "1", "4,5|6"),
        ((0,), 2, "1", "nobind"),
    ],
)
def test_on_cpu_the_cores_of_the_plan_become_threads(
    cpus: tuple[int, ...], workers: int, threads: str, binding: str
) -> None:
    env = make_env({}, device_type="cpu", devices=[], cpus=cpus, extra={}, workers=workers)
    assert env == {"OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": binding}


def test_what_the_user_sets_for_the_ranks_comes_last() -> None:
    extra = {"OMP_NUM_THREADS": "7", "RANK": "mine"}
    env = make_env({"RANK": "3"}, device_type="cpu", devices=[], cpus=(0,), extra=extra)
    assert env["OMP_NUM_THREADS"] == "7"
    assert env["RANK"] == "mine"


@pytest.mark.parametrize(
    ("cores", "count", "split"),
    [
        ((0, 1), 2, [(0,), (1,)]),
        ((0, 1, 2), 2, [(0, 1), (2,)]),
        ((0, 2, 4, 6), 2, [(0, 2), (4, 6)]),
        ((5,), 1, [(5,)]),
    ],
)
def test_blocks_are_contiguous_and_even(cores: tuple[int, ...], count: int, split: list[tuple[int, ...]]) -> None:
    assert list(blocks(cores, count)) == split
