"""One group for all rows of a backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.chaos.rig import Rig, chaos_spec
from tests.conftest import shared_pids
from tests.contract.conftest import vllm_imported
from tests.leaks import Snapshot, left_of_a_shared_group

__all__ = ["vllm_imported"]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["mp", "ray"])
async def rig(
    request: pytest.FixtureRequest, vllm_imported: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Rig]:
    """Four ranks, which every row leaves as it found them: all there. Nothing is left of them."""
    backend: str = request.param
    if backend == "ray":
        pytest.importorskip("ray")
        request.getfixturevalue("ray_cluster")
    before = Snapshot.take()
    directory: Path = tmp_path_factory.mktemp(f"chaos-{backend}")
    rig = Rig(chaos_spec(directory, backend))
    try:
        await rig.group.open()
        yield rig
    finally:
        await rig.group.close()
    if left := left_of_a_shared_group(before, shared_pids):
        pytest.fail("left behind by the group:\n  " + "\n  ".join(left), pytrace=False)
