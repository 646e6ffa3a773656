"""For every test: whatever it starts, it ends."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.leaks import Snapshot, leaks_since
from tests.ray_for_tests import RayForTests, ray_for_tests

LONG = (
    "chaos/test_table",
    "multinode/test_clusters",
    "multinode/test_many_nodes",
    "real/test_embedded",
    "real/test_examples",
    "real/test_features",
    "real/test_lm_eval",
    "real/test_lockstep_real",
    "real/test_notebook",
    "real/test_parity_real",
    "real/test_process_life",
    "real/test_same_as_stock",
    "real/test_scale_real",
    "real/test_signals_and_deaths",
    "real/test_trl",
    "real/test_weights_real",
)
"""Modules that `make test` leaves to `make test-long`: together they take as long as all the others."""

_HERE = Path(__file__).parent

_clusters: list[RayForTests] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    modules = {_HERE / f"{name}.py" for name in LONG}
    for item in items:
        if item.path in modules:
            item.add_marker(pytest.mark.long)


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
