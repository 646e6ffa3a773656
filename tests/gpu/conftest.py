"""Real engines on this machine's devices; without one, all of it is skipped and nothing is imported or started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dplaunch
from benchmarks.gpu import devices, looks
from benchmarks.gpu.setup import ENVIRONMENT, Setup

REASON = "no NVIDIA device: the driver names none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if "/tests/gpu/" in str(item.path)]
    count = len(devices.uuids()) if ours else 0
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.real)
        item.add_marker(
            pytest.mark.leaves("a group of the whole session; a test starts it and others replace its ranks")
        )
        if not count:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session", autouse=True)
def _plain_vllm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """All devices of this machine, but no more than two: enough for each test."""
    there = min(2, len(devices.uuids()))
    return Setup(dp=there, devices=there, directory=str(tmp_path_factory.mktemp("gpu")))


@pytest.fixture(scope="session")
def engine_args(setup: Setup) -> dict[str, Any]:
    """A part of each device, so that a trainer has room; eager, so that a start takes seconds."""
    own: dict[str, Any] = {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 24 * 2**30}
    return setup.with_weights(enforce_eager=True, enable_sleep_mode=True, **own).engine_args


@pytest.fixture(scope="session")
def path(setup: Setup) -> str:
    """A model with random weights."""
    return str(setup.with_weights().model)


@pytest.fixture(scope="session")
def module(path: str) -> Any:
    """The same model as a trainer has it, on the first device: this process has used CUDA from here on."""
    return looks.trainer(path, "cuda:0")


@pytest.fixture(scope="session")
def group(path: str, module: Any, setup: Setup, engine_args: dict[str, Any]) -> Iterator[dplaunch.Group]:
    """A rank for each device, launched by a process that has used CUDA before."""
    with dplaunch.launch(model=path, dp=setup.dp, progress=False, **engine_args) as group:
        yield group


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu-work")
