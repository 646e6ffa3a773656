"""A Ray cluster and a supervisor for tests below any group; those that use none never start it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dplaunch.testing import poll_until
from tests.ray_for_tests import RayForTests
from tests.unit.supervision import Clock, Make, Rig

MakeGroup = Callable[..., Any]


@pytest.fixture
def cluster(ray_cluster: RayForTests) -> Iterator[RayForTests]:
    """The session's cluster, on which the test leaves nothing."""
    before, actors = ray_cluster.occupied(), ray_cluster.actors()
    yield ray_cluster
    poll_until(lambda: ray_cluster.occupied() == before and ray_cluster.actors() == actors, 10, "the empty cluster")


@pytest.fixture
def own_group(cluster: RayForTests) -> Iterator[MakeGroup]:
    """Makes placement groups of the user's, of the bundles that it is called with."""
    import ray

    made = []

    def make(*bundles: dict[str, float]) -> Any:
        made.append(ray.util.placement_group(list(bundles), strategy="STRICT_PACK"))
        return made[-1]

    yield make
    for group in made:
        ray.util.remove_placement_group(group)


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes supervisors over processes that are no processes; each is stopped at the end."""
    rigs: list[Rig] = []

    def build(**options: Any) -> Rig:
        rigs.append(Rig(tmp_path, **options))
        return rigs[-1]

    yield build
    for rig in rigs:
        await rig.supervisor.stop("the test is over")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A keeper whose waits take no time and are noted."""
    clock = Clock()
    monkeypatch.setattr("dplaunch.keeper.asyncio", clock)
    return clock


@pytest.fixture(autouse=True)
def _for_any_device() -> Iterator[None]:
    """What is planned here does not hang on what is installed."""
    # Not the test's own monkeypatch, which would then outlive the fixtures that the test asks for before it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dplaunch.builds.vllm_is_for_cpu", lambda: True)
        yield
