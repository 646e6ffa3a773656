"""Each rank on its own device, and nothing of a rank's on one when it has ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import dplaunch
from benchmarks.gpu import devices, looks
from benchmarks.gpu.setup import Setup
from dplaunch.testing import poll_until
from tests.gpu.launchers import SMALL, closes_and_frees, launcher, workers


def test_each_rank_is_on_a_device_of_its_own_by_uuid_from_inside(group: dplaunch.Group, setup: Setup) -> None:
    known = {str(index): devices.plain(uuid) for index, uuid in enumerate(devices.uuids())}
    planned = [[known[name] for name in rank.devices] for rank in group.plan.ranks]
    inside = [[worker["uuid"] for worker in workers] for workers in looks.facts(group)]
    assert inside == planned
    assert len({uuid for workers in inside for uuid in workers}) == setup.dp
    held = devices.held()
    assert [[devices.plain(uuid) for uuid in held[pid]] for pid in looks.worker_pids(group)] == inside


def test_ranks_are_forked_after_this_process_has_used_cuda_by_a_helper_that_has_not(group: dplaunch.Group) -> None:
    assert devices.has_cuda(os.getpid())
    zygotes = looks.zygotes()
    assert zygotes
    assert [pid for pid in zygotes if devices.has_cuda(pid)] == []
    assert all(map(devices.has_cuda, looks.worker_pids(group)))


def test_greedy_answers_equal_those_of_stock_vllm_on_the_same_device(
    group: dplaunch.Group, path: str, engine_args: dict[str, Any]
) -> None:
    ours = [looks.answers(group, rank) for rank in group.ranks_up]
    args = {name: value for name, value in engine_args.items() if name != "worker_extension_cls"}
    # Beside the group: each has a part of the device.
    with launcher(path, args | SMALL | {"enable_sleep_mode": False}, stock=True) as (_, said):
        assert [answers for answers in ours if answers != said["answers"]] == []
    assert len({tuple(answer) for answer in ours[0]}) > 1


def test_after_close_no_rank_holds_memory(path: str, engine_args: dict[str, Any]) -> None:
    with launcher(path, engine_args | SMALL) as (process, said):
        closes_and_frees(process, said)


def test_after_the_launcher_is_killed_no_rank_holds_memory(path: str, engine_args: dict[str, Any]) -> None:
    with launcher(path, engine_args | SMALL) as (process, said):
        assert set(workers(said)) <= set(devices.held())
        process.kill()
        assert devices.wait_until_free(workers(said))[1] == {}


def test_a_rank_that_is_restarted_on_request_leaves_its_device_and_comes_back_to_it(group: dplaunch.Group) -> None:
    rank = group.ranks_up[-1]
    (before,) = looks.facts(group, rank)
    group.restart([rank])
    assert devices.wait_until_free([worker["pid"] for worker in before])[1] == {}
    (after,) = looks.facts(group, rank)
    assert [worker["uuid"] for worker in after] == [worker["uuid"] for worker in before]


def test_a_killed_rank_holds_no_memory_and_comes_back_on_the_same_device(group: dplaunch.Group) -> None:
    rank = group.ranks_up[-1]
    (before,) = looks.facts(group, rank)
    (report,) = group.call("dplaunch_report", rank=rank)
    os.kill(report["pid"], signal.SIGKILL)
    poll_until(lambda: rank not in group.ranks_up, looks.BACK_S, "the rank to be gone")
    assert devices.wait_until_free([worker["pid"] for worker in before])[1] == {}
    poll_until(lambda: rank in group.ranks_up, looks.BACK_S, "the rank to be back")
    (after,) = looks.facts(group, rank)
    assert [worker["uuid"] for worker in after] == [worker["uuid"] for worker in before]
    assert {worker["pid"] for worker in after}.isdisjoint(worker["pid"] for worker in before)


def test_a_second_start_finds_every_kernel_that_the_first_has_compiled(
    path: str, engine_args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    for name, folder in (("VLLM_CACHE_ROOT", "vllm"), ("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_HOME", "home")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    found = []
    for _ in range(2):
        with launcher(path, engine_args | SMALL | {"enforce_eager": False}) as (process, said):
            closes_and_frees(process, said)
        found.append({kernel.name for kernel in tmp_path.rglob("*.cubin")})
    first, second = found
    assert first
    assert second - first == set(), "compiled again: the first start has not kept them"
