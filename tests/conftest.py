"""For every test: whatever it starts, it ends."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator

import psutil
import pytest

from tests.leaks import Snapshot, leaks_since
from tests.ray_for_tests import RayForTests, ray_for_tests

_clusters: list[RayForTests] = []


def pytest_configure(config: pytest.Config) -> None:
    # TRL, which some modules import when they are collected, would have all ranks log errors only.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    config.addinivalue_line("markers", "leaves(reason): may leave processes or descriptors behind, and why")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayForTests]:
    """A Ray cluster of eight CPUs and four GPUs that no hardware stands behind; this process is connected to it."""
    pytest.importorskip("ray")
    # Not pytest's own directory: Ray puts sockets below, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="dplray") as directory, ray_for_tests(directory) as cluster:
        _clusters.append(cluster)
        yield cluster
        _clusters.remove(cluster)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before = Snapshot.take()
    yield
    if request.node.get_closest_marker("leaves") is None and (left := leaks_since(before, shared_pids)):
        pytest.fail("left behind by the test:\n  " + "\n  ".join(left), pytrace=False)


def shared_pids() -> Iterable[int]:
    """Helpers that the whole process shares and that stay until it ends."""
    for cluster in _clusters:
        yield from cluster.pids()
    for child in psutil.Process().children(recursive=True):
        try:
            words = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "dplaunch::zygote" in words or "resource_tracker" in words:
            yield child.pid
