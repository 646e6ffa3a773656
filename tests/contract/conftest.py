"""The backends that keep the contract. A further one is a further line in `BACKENDS`."""

from __future__ import annotations

import asyncio
import os
import tempfile
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dplaunch.backend import Backend, RankHandle, load_backend
from dplaunch.seam import frontend
from dplaunch.spec import LaunchSpec
from dplaunch.testing import STANDIN_ENGINE, Fault, StandInPlan, poll_until
from tests.contract.boots import make_boot
from tests.contract.groups import Watched, group_spec
from tests.contract.raw import RawLauncher
from tests.ray_for_tests import RayForTests

BACKENDS = {
    # name: whether its ranks are processes of their own
    "mp": True,
    "ray": True,
    "fake": False,
}

LAUNCH_TIMEOUT_S = 180.0
"""Seconds for a group: the first one waits until the helper process has imported vLLM."""


@pytest.fixture(params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    if name != "ray":
        yield name
        return
    pytest.importorskip("ray")
    cluster: RayForTests = request.getfixturevalue("ray_cluster")
    before, actors = cluster.occupied(), cluster.actors()
    yield name
    # Its processes are looked for with those of all tests.
    poll_until(lambda: cluster.occupied() == before and cluster.actors() == actors, 10, "the cluster to be as it was")


@pytest.fixture
def has_processes(backend_name: str) -> bool:
    return BACKENDS[backend_name]


@pytest.fixture
async def backend(backend_name: str) -> AsyncIterator[Backend]:
    """An opened backend, closed afterwards."""
    backend = load_backend(backend_name)
    await backend.open(LaunchSpec(backend=backend_name, engine=STANDIN_ENGINE), dict(os.environ))
    yield backend
    await backend.close()


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A directory with a short name: the address of a unix socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="dpl") as directory:
        yield Path(directory)


@pytest.fixture
async def launcher(sockets: Path, backend: Backend) -> AsyncIterator[RawLauncher]:
    """The launcher's end for one rank."""
    with RawLauncher(sockets, address=await backend.address()) as raw:
        yield raw


class Spawner:
    """Starts ranks against one launcher's end."""

    def __init__(self, backend: Backend, launcher: RawLauncher, directory: Path) -> None:
        self.log_file = directory / "rank.log"
        self._backend = backend
        self._launcher = launcher

    async def __call__(self, fault: Fault | None = None, *, rank: int = 3, incarnation: int = 0) -> RankHandle:
        boot = make_boot(
            self._launcher.address, rank=rank, incarnation=incarnation, fault=fault, log_file=self.log_file
        )
        return await self._backend.spawn(boot)

    async def ready(self, fault: Fault | None = None, *, rank: int = 3, incarnation: int = 0) -> RankHandle:
        """Starts one and brings it to READY."""
        handle = await self(fault, rank=rank, incarnation=incarnation)
        self._launcher.handshake()
        return handle


@pytest.fixture
def spawn(backend: Backend, launcher: RawLauncher, tmp_path: Path) -> Spawner:
    return Spawner(backend, launcher, tmp_path)


@pytest.fixture(scope="session")
def vllm_imported() -> None:
    """vLLM in this process, imported once and before any thread could import it at the same time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frontend.import_vllm(quiet=True)


class Launch:
    """Starts groups of stand-in ranks, and closes them whether or not the start succeeded."""

    def __init__(self, backend_name: str, directory: Path) -> None:
        self.launched: list[Watched] = []
        self._backend_name = backend_name
        self._directory = directory

    async def __call__(self, plan: StandInPlan | None = None, dp: int = 2, **options: Any) -> Watched:
        spec = group_spec(self._directory, self._backend_name, plan or StandInPlan(), dp, **options)
        watched = Watched(spec)
        self.launched.append(watched)
        await asyncio.wait_for(watched.group.open(), LAUNCH_TIMEOUT_S)
        return watched


@pytest.fixture
async def launch(vllm_imported: None, backend_name: str, tmp_path: Path) -> AsyncIterator[Launch]:
    launch = Launch(backend_name, tmp_path)
    yield launch
    for watched in launch.launched:
        await watched.group.close()
