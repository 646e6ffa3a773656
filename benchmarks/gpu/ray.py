"""Ranks in a Ray cluster of this machine, and ranks whose own executor is Ray (`python -m benchmarks.gpu.ray`).

The last is what once failed in vLLM (pull request 40398): workers of several ranks under one name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import dplaunch
from benchmarks.gpu import devices, looks
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Script, Step

V2 = {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1"}
"""vLLM's newer Ray executor."""

# The model has 380 MB.
_ROOM = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 4 * 2**30}

# Its own all-reduce, and the fusions of a compiled model, use memory that several devices map.
_PLAIN = {"enforce_eager": True, "disable_custom_all_reduce": True}


def launch(name: str, dp: int | None = None, *, dies: bool = True, **args: Any) -> Callable[[Setup, Notes], None]:
    """A step: a group on Ray; where its workers are, what they answer, and a rank's death."""

    def run(setup: Setup, notes: Notes) -> None:
        settings = setup.with_weights(dp=dp, **({} if setup.cpu else _ROOM))
        called = time.monotonic()
        with dplaunch.launch(
            model=str(settings.model), dp=settings.dp, backend="ray", **settings.engine_args, **args
        ) as group:
            notes.value(f"{name}: ready after", time.monotonic() - called)
            pids = _look(setup, group, notes, name, args.get("tensor_parallel_size", 1))
            if dies:
                seconds = notes.attempt(f"{name}: a rank dies", lambda: looks.kill_rank(group, group.ranks_up[-1]))
                if seconds is not None:
                    notes.value(f"{name}: a killed rank is back after", seconds)
                    pids += _look(setup, group, notes, name, args.get("tensor_parallel_size", 1))
        seconds, left = devices.wait_until_free(pids)
        notes.check(f"{name}: after close no worker holds memory", not left, left or f"after {seconds:.1f} s")

    return run


def _look(setup: Setup, group: dplaunch.Group, notes: Notes, name: str, size: int) -> list[int]:
    workers = looks.facts(group)
    names = [worker["uuid"] for each in workers for worker in each]
    if not setup.cpu:
        notes.check(f"{name}: each worker has its own device", len(set(names)) == len(names) and all(names), names)
    notes.check(f"{name}: {size} workers a rank", all(len(each) == size for each in workers))
    answers = [looks.answers(group, rank, 2) for rank in group.ranks_up]
    notes.check(f"{name}: all ranks answer alike", all(each == answers[0] for each in answers), answers[0][0][:4])
    ids = [report["instance_id"] for report in group.call("dplaunch_report")]
    notes.check(f"{name}: each rank has its own name", len(set(ids)) == len(ids), ids)
    return [worker["pid"] for each in workers for worker in each]


SCRIPT = Script(
    "ray",
    __doc__,
    [
        Step(name="ranks", run=launch("ray"), limit_s=300, about_s=170),
        Step(
            name="nested",
            run=launch("nested", executor="ray", **_PLAIN),
            limit_s=240,
            about_s=150,
            devices=2,
            on_cpu=False,
            env=V2,
        ),
        Step(
            name="nested-tp2",
            run=launch("nested tp=2", 1, dies=False, executor="ray", tensor_parallel_size=2, **_PLAIN),
            limit_s=200,
            about_s=100,
            devices=2,
            on_cpu=False,
            env=V2,
        ),
        Step(
            name="nested-dp2-tp2",
            run=launch("nested dp=2 tp=2", 2, executor="ray", tensor_parallel_size=2, **_PLAIN),
            limit_s=300,
            about_s=160,
            devices=4,
            on_cpu=False,
            env=V2,
        ),
    ],
)

if __name__ == "__main__":
    SCRIPT.main()
