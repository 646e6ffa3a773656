"""Each rank on its own device, and nothing of a rank's on one when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dplaunch
from benchmarks.gpu import devices, looks
from benchmarks.gpu.setup import Setup
from dplaunch.testing import poll_until

ROOT = Path(__file__).resolve().parents[2]


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


@contextlib.contextmanager
def launcher(path: str, args: dict[str, Any], *, stock: bool = False) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A process of its own, and what it said first."""
    asked = {"path": path, "dp": 1, "args": args, "stock": stock}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.child", json.dumps(asked)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = [line for line in process.stdout if line.startswith("SAID ")] if stock else _first(process.stdout)
            assert said, f"it ended with {process.wait()} and said nothing"
            yield process, json.loads(said[0].removeprefix("SAID "))
        finally:
            process.kill()


def _first(lines: Any) -> list[str]:
    return next(([line] for line in lines if line.startswith("SAID ")), [])


def test_greedy_answers_equal_those_of_stock_vllm_on_the_same_device(
    group: dplaunch.Group, path: str, engine_args: dict[str, Any]
) -> None:
    ours = [looks.answers(group, rank) for rank in group.ranks_up]
    args = {name: value for name, value in engine_args.items() if name != "worker_extension_cls"}
    # Beside the group: each has a part of the device.
    with launcher(path, args | {"gpu_memory_utilization": 0.3, "enable_sleep_mode": False}, stock=True) as (_, said):
        assert [answers for answers in ours if answers != said["answers"]] == []
    assert len({tuple(answer) for answer in ours[0]}) > 1


def test_after_close_no_rank_holds_memory(path: str, engine_args: dict[str, Any]) -> None:
    with launcher(path, engine_args | {"gpu_memory_utilization": 0.3}) as (process, said):
        assert set(said["workers"]) <= set(devices.held())
        process.stdin.close()
        assert process.wait(60) == 0
        assert devices.wait_until_free(said["workers"])[1] == {}


def test_after_the_launcher_is_killed_no_rank_holds_memory(path: str, engine_args: dict[str, Any]) -> None:
    with launcher(path, engine_args | {"gpu_memory_utilization": 0.3}) as (process, said):
        assert set(said["workers"]) <= set(devices.held())
        process.kill()
        assert devices.wait_until_free(said["workers"])[1] == {}


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
