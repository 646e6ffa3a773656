"""A trainer and its ranks on the same devices: weights from CUDA tensors, and memory that is really given back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import dplaunch
from benchmarks.gpu import devices, looks
from benchmarks.servers import environment
from dplaunch import bucket, device_memory
from tests.gpu.launchers import END_S, ROOT, SMALL

FREED = 2**30
"""Bytes at least: the ranks of the tests hold dozens of GiB of KV cache each."""


def test_weights_from_a_module_on_a_device_are_in_all_ranks_and_the_same_as_from_disk(
    group: dplaunch.Group, module: Any, work: Path
) -> None:
    before = looks.answers(group, 0, 2)
    looks.shift(module, 1)
    done = group.update_weights(module, "module")
    assert list(done.ranks) == group.ranks_up
    sums = group.weight_checksums()
    assert set(sums.values()) == {done.checksum}
    assert looks.answers(group, 0, 2) != before
    module.save_pretrained(work / "saved")
    group.update_weights(work / "saved", "disk")
    assert group.weight_checksums() == sums


@pytest.fixture
def handed() -> Iterator[list[str]]:
    """Gets the device of each piece of memory that is handed to ranks; no piece is held."""
    with looks.handed_over() as uuids:
        yield uuids


def test_memory_is_given_back_though_one_was_told_of_it_and_nobody_has_opened_it() -> None:
    import torch

    before = torch.cuda.memory_allocated(0)
    memory = device_memory.DeviceMemory(torch.device("cuda:0"), FREED)
    memory.share(2)
    memory.handle()
    assert torch.cuda.memory_allocated(0) >= before + FREED
    memory.free()
    assert torch.cuda.memory_allocated(0) == before


@pytest.mark.parametrize("end", ["freed", "left"])
def test_a_process_that_has_shared_memory_which_nobody_has_opened_ends_well(end: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.gpu.sharer", end],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=END_S,
    )
    assert ended.returncode == 0, ended.stderr
    # Of memory that is not given back before the end, torch warns.
    assert end == "left" or not ended.stderr


def test_the_rank_on_the_trainers_device_reads_weights_there_and_all_have_the_same(
    group: dplaunch.Group, module: Any, handed: list[str]
) -> None:
    import torch

    looks.shift(module, 3)
    before = torch.cuda.memory_allocated(0)
    done = group.update_weights(module, "there")
    assert torch.cuda.memory_allocated(0) == before
    assert list(done.ranks) == group.ranks_up
    # The first one is the mark by which it was found out that the rank sees that device.
    assert len(handed) > 1
    assert set(handed) == {devices.plain(devices.uuids()[0])}
    sums, answered = group.weight_checksums(), looks.answers(group, 0, 2)
    assert set(sums.values()) == {done.checksum}
    handed.clear()
    with patch.object(device_memory, "own_devices", dict):
        group.update_weights(module, "by the host")
    assert group.weight_checksums() == sums
    assert looks.answers(group, 0, 2) == answered
    assert not handed


def test_beside_one_rank_on_its_device_a_trainers_weights_never_leave_it(
    group: dplaunch.Group, module: Any, path: str, engine_args: dict[str, Any], handed: list[str]
) -> None:
    looks.shift(module, 4)
    wanted = group.update_weights(module, "both").checksum
    with dplaunch.launch(path, dp=1, devices=[[0]], progress=False, **engine_args | SMALL) as alone:
        handed.clear()
        with patch.object(bucket, "new_memory", wraps=bucket.new_memory) as on_host:
            assert alone.update_weights(module, "alone").checksum == wanted
    assert len(handed) > 1
    assert bucket.MEMORY_NAME not in [call.args[0] for call in on_host.mock_calls]


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_memory_on_each_device_and_the_same_weights_come_back(
    group: dplaunch.Group, module: Any, level: int
) -> None:
    group.update_weights(module, "current")
    sums, answers, awake = group.weight_checksums(), looks.answers(group, 0, 2), devices.used()
    own = {uuid for pid in looks.worker_pids(group) for uuid in devices.held()[pid]}
    group.sleep(level)
    asleep = devices.used()
    freed = {uuid: awake[uuid] - asleep[uuid] for uuid in own}
    assert all(size > FREED for size in freed.values()), freed
    group.wake_up()
    again = devices.used()
    assert all(again[uuid] - asleep[uuid] > 0.9 * size for uuid, size in freed.items())
    assert group.weight_checksums() == sums
    assert looks.answers(group, 0, 2) == answers


def test_a_rank_that_dies_comes_back_with_the_current_weights(group: dplaunch.Group, module: Any) -> None:
    looks.shift(module, 2)
    group.update_weights(module, "newest")
    sums, rank = group.weight_checksums(), group.ranks_up[-1]
    answers = looks.answers(group, rank, 2)
    looks.kill_rank(group, rank)
    assert group.weight_version == "newest"
    assert group.weight_checksums() == sums
    assert looks.answers(group, rank, 2) == answers


def test_a_trainer_takes_the_memory_of_sleeping_ranks_round_after_round_and_a_death_amid_it_loses_no_weights(
    group: dplaunch.Group, module: Any
) -> None:
    import torch

    ids = torch.arange(64, device="cuda:0").repeat(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    seen = [looks.answers(group, 0, 2)]
    for step in (1, 2):
        torch.cuda.empty_cache()
        awake, _ = torch.cuda.mem_get_info(0)
        group.sleep(2)
        asleep, _ = torch.cuda.mem_get_info(0)
        # More than was free while they were awake.
        room = torch.zeros((awake + asleep) // 2, dtype=torch.uint8, device="cuda:0")
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # One small step need not change a greedy answer; this does.
        looks.shift(module, 10 + step)
        del room
        torch.cuda.empty_cache()
        done = group.update_weights(module, f"step {step}")
        group.wake_up()
        if step == 1:
            looks.kill_rank(group, group.ranks_up[-1])
        assert group.weight_version == f"step {step}"
        assert set(group.weight_checksums().values()) == {done.checksum}
        by_rank = [looks.answers(group, rank, 2) for rank in group.ranks_up]
        assert all(answers == by_rank[0] for answers in by_rank)
        assert by_rank[0] not in seen
        seen.append(by_rank[0])
