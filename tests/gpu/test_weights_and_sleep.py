"""A trainer and its ranks on the same devices: weights from CUDA tensors, and memory that is really given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dplaunch
from benchmarks.gpu import devices, looks

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
