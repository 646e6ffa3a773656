"""What takes two devices: ranks in Ray, a rank with two workers, and ranks that step together."""

from __future__ import annotations

from typing import Any

import pytest

import dplaunch
from benchmarks.gpu import devices, looks
from benchmarks.gpu.inside import EXTENSION
from benchmarks.gpu.setup import Setup
from tests.gpu.launchers import SMALL, closes_and_frees, launcher, uuids

PLAIN = {"disable_custom_all_reduce": True}
"""vLLM's own all-reduce uses memory that several devices map, which not every machine bears."""

LAUNCHES: dict[str, dict[str, Any]] = {
    "two ranks in Ray": {"dp": 2, "backend": "ray"},
    "a rank with two workers": {"tensor_parallel_size": 2, **PLAIN},
    "a rank in Ray with two workers": {"backend": "ray", "tensor_parallel_size": 2, **PLAIN},
    # What once failed in vLLM (pull request 40398): workers of two ranks under one name. Only its newer Ray executor,
    # the default from 0.26 on, gives them names.
    "two ranks whose executors are Ray": {"dp": 2, "backend": "ray", "executor": "ray", **PLAIN},
    "a rank whose executor is Ray, with two workers": {
        "backend": "ray",
        "executor": "ray",
        "tensor_parallel_size": 2,
        **PLAIN,
    },
}


@pytest.mark.parametrize("args", LAUNCHES.values(), ids=LAUNCHES)
def test_each_worker_is_on_a_device_of_its_own_and_none_holds_memory_after_close(
    args: dict[str, Any], setup: Setup, path: str, engine_args: dict[str, Any]
) -> None:
    if setup.devices < 2:
        pytest.skip(f"it needs two devices, and {setup.devices} is here")
    if "ray" in args.values():
        pytest.importorskip("ray")
    with launcher(path, engine_args | SMALL | args) as (process, said):
        assert [len(rank) for rank in said["ranks"]] == [args.get("tensor_parallel_size", 1)] * args.get("dp", 1)
        assert len(set(uuids(said))) == 2
        assert all(uuids(said))
        assert [answers for answers in said["answers"] if answers != said["answers"][0]] == []
        closes_and_frees(process, said)


def test_ranks_in_lockstep_are_each_on_a_device_of_their_own_and_come_back_to_it_together(setup: Setup) -> None:
    if setup.devices < 2:
        pytest.skip(f"it needs two devices, and {setup.devices} is here")
    settings = setup.settings("moe", enforce_eager=True, enable_expert_parallel=True, worker_extension_cls=EXTENSION)
    with dplaunch.launch(str(settings.model), dp=2, progress=False, **settings.engine_args | SMALL) as group:
        before = looks.facts(group)
        assert len({worker["uuid"] for workers in before for worker in workers}) == 2
        answered = looks.answers(group, 1)
        looks.kill_rank(group, 0)
        assert looks.answers(group, 1) == answered
        after = looks.facts(group)
        assert [[worker["uuid"] for worker in rank] for rank in after] == [
            [worker["uuid"] for worker in rank] for rank in before
        ]
    assert devices.wait_until_free([worker["pid"] for rank in (*before, *after) for worker in rank])[1] == {}
