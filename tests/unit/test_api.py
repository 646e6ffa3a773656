"""The two calls, up to the point where something is started."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dplaunch
from dplaunch import seam
from dplaunch.api import Launching, launch, launch_async, make_spec
from dplaunch.errors import BackendError, DplaunchError, UsageError, VllmError
from dplaunch.events import Event
from dplaunch.spec import (
    DEFAULT_START_TIMEOUT_S,
    ClusterOptions,
    ExecutorKind,
    LaunchSpec,
    Mode,
    RestartPolicy,
    StartMethod,
)


def spec_of(launching: Launching) -> LaunchSpec:
    return launching._spec


def test_plain_values_become_a_spec() -> None:
    spec = make_spec(
        "m",
        dp=2,
        devices=[[0], ["GPU-1"]],
        executor="mp",
        mode="independent",
        start_method="spawn",
        log_dir="/tmp/logs",
        name="mine",
        env={"A": "1"},
        engine_args={"max_model_len": 7},
    )
    assert spec.devices == (("0",), ("GPU-1",))
    assert (spec.executor, spec.mode, spec.start_method) == (
        ExecutorKind.MP,
        Mode.INDEPENDENT,
        StartMethod.SPAWN,
    )
    assert (spec.log_dir, spec.base_id) == (Path("/tmp/logs"), "mine")
    assert (dict(spec.env), dict(spec.engine_args)) == ({"A": "1"}, {"max_model_len": 7})


def test_where_in_a_cluster_is_part_of_the_spec() -> None:
    group = object()
    options: dict[str, Any] = {
        "backend": "ray",
        "ray_address": "auto",
        "nodes": ["a", "b"],
        "num_gpus": 0.5,
        "placement_groups": [group],
        "bundle_indices": [[0, 1], [2, 3]],
    }
    spec = make_spec("m", dp=2, **options)
    assert spec.cluster == ClusterOptions(
        address="auto",
        nodes=("a", "b"),
        num_gpus=0.5,
        placement_groups=(group,),
        bundle_indices=((0, 1), (2, 3)),
    )
    assert spec_of(launch_async("m", dp=2, **options)) == spec


def test_what_is_left_out_is_the_specs_own_default() -> None:
    assert make_spec(None) == LaunchSpec()


@pytest.mark.parametrize(
    ("option", "value", "message", "hint"),
    [
        ("executor", "threads", "executor cannot be 'threads'", "auto, uni, mp, ray"),
        ("mode", "lonely", "mode cannot be 'lonely'", "auto, independent, lockstep"),
        ("start_method", "forkserver", "start_method cannot be 'forkserver'", "fork, spawn"),
        ("dp", "two", "dp must be a whole number of ranks, not 'two'", "dp=2"),
        ("devices", [[0], [1]], "devices names 2 ranks, but dp=1", "devices=[['0'], ['1']]"),
        ("nodes", "10.0.0.7", "nodes must be a list, not '10.0.0.7'", "nodes=[...]"),
        ("placement_groups", 7, "placement_groups must be a list, not 7", "placement_groups=[...]"),
        ("bundle_indices", [0], "bundle_indices of a rank must be a list, not 0", "[...]"),
        ("engine_args", {"data_parallel_size": 4}, "data_parallel_size is not for dplaunch", "dp=N"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_can(option: str, value: Any, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_spec("m", **{option: value})
    assert caught.value.message == message
    assert hint in caught.value.hint


def test_both_calls_build_the_same_spec() -> None:
    options: dict[str, Any] = {"dp": 3, "min_ranks": 2, "restart": RestartPolicy(limit=1), "max_model_len": 9}
    spec = spec_of(launch_async("m", **options))
    assert spec == make_spec("m", dp=3, min_ranks=2, restart=RestartPolicy(limit=1), engine_args={"max_model_len": 9})


def test_every_option_of_launch_is_one_of_launch_async_with_the_same_default() -> None:
    options = inspect.signature(launch).parameters
    of_spec = inspect.signature(make_spec).parameters
    for name, parameter in options.items():
        if name in ("progress", "listener", "engine_args"):
            continue
        assert of_spec[name].default == (inspect.Parameter.empty if name == "model" else parameter.default), name
    assert options["start_timeout_s"].default == DEFAULT_START_TIMEOUT_S


def test_progress_and_listener_are_not_taken_for_engine_arguments() -> None:
    events: list[Event] = []
    launching = launch_async("m", progress=False, listener=events.append, dtype="float32")
    assert dict(spec_of(launching).engine_args) == {"dtype": "float32"}
    assert launching._progress is False
    assert launching._listeners == [events.append]


def test_nothing_is_started_before_it_is_entered_or_awaited() -> None:
    code = (
        "import sys, dplaunch; dplaunch.launch_async('m', dp=2)\n"
        "print([name for name in ('torch', 'vllm', 'zmq', 'dplaunch.group') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_an_unknown_backend_is_told_with_those_that_there_are() -> None:
    with pytest.raises(BackendError, match="unknown backend 'slurm'") as caught:
        await launch_async("m", backend="slurm", progress=False)
    assert "mp" in caught.value.hint
    with pytest.raises(BackendError, match="unknown backend 'slurm'"):
        async with launch_async("m", backend="slurm", progress=False):
            pass


def test_a_sync_launch_that_fails_leaves_no_thread_behind() -> None:
    with pytest.raises(BackendError, match="unknown backend 'slurm'"):
        launch("m", backend="slurm", progress=False)


@pytest.mark.parametrize("ask", ["nobody", "a keyword", "a variable"])
async def test_another_vllm_is_refused_before_anything_else_unless_it_is_asked_for(
    ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam, "installed_version", lambda: "0.25.1")
    if ask == "a variable":
        monkeypatch.setenv(seam.OVERRIDE, "1")
    # Had it gone on, it would have come to the backend, which there is none of.
    error: type[DplaunchError] = VllmError if ask == "nobody" else BackendError
    with pytest.raises(error, match="0.25.1" if ask == "nobody" else "slurm"):
        await launch_async("m", backend="slurm", any_vllm=ask == "a keyword", progress=False)


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert all(getattr(dplaunch, name) is not None for name in dplaunch.__all__)
    with pytest.raises(AttributeError, match="'lunch'"):
        _ = dplaunch.lunch
