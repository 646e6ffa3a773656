"""Clusters of several machines on this one, shared by the tests of this directory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dplaunch import demo
from dplaunch.testing import poll_until
from tests.conftest import shared_pids
from tests.leaks import Snapshot, leaks_since
from tests.multinode.cluster import Cluster
from tests.multinode.netns import Network, why_not
from tests.multinode.one_host import OneHostCluster
from tests.multinode.ray_cluster import RayCluster

ONE_HOST = "DPLAUNCH_TEST_ONE_HOST"
"""Set to 1, it has these tests run as they do where no namespaces can be made."""

LEAVE_S = 15.0
"""Seconds for what a launch had on other nodes to be gone after its end."""

_running: list[Cluster] = []


def make_cluster(size: int) -> Cluster:
    """A cluster of machines with their own addresses; of one machine's where that is not allowed."""
    if os.environ.get(ONE_HOST) == "1" or why_not():
        return OneHostCluster(size)
    return RayCluster(Network(size).__enter__())


def _cluster(size: int) -> Iterator[Cluster]:
    cluster = make_cluster(size)
    _running.append(cluster)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        _running.remove(cluster)


@pytest.fixture(scope="package")
def two_nodes() -> Iterator[Cluster]:
    """See `cluster2`."""
    yield from _cluster(2)


@pytest.fixture(scope="package")
def three_nodes() -> Iterator[Cluster]:
    """See `cluster3`."""
    yield from _cluster(3)


@pytest.fixture
def cluster2(two_nodes: Cluster) -> Iterator[Cluster]:
    """Two nodes, both alive, on which the test leaves nothing."""
    yield from _whole(two_nodes)


@pytest.fixture
def cluster3(three_nodes: Cluster) -> Iterator[Cluster]:
    """Three nodes, all alive, on which the test leaves nothing; it may lose some."""
    yield from _whole(three_nodes)


def _whole(cluster: Cluster) -> Iterator[Cluster]:
    cluster.heal()
    yield cluster
    try:
        poll_until(lambda: not cluster.left(), LEAVE_S)
    except TimeoutError:
        pytest.fail("left on the nodes by the test:\n  " + "\n  ".join(cluster.left()), pytrace=False)


@pytest.fixture
def machines(cluster3: Cluster) -> RayCluster:
    """The same three nodes, for what only machines with their own addresses and files can show."""
    if not isinstance(cluster3, RayCluster):
        pytest.skip(why_not() or f"{ONE_HOST} is set")
    return cluster3


@pytest.fixture(scope="session")
def smollm() -> str:
    """The built-in model's directory, which every node sees."""
    return str(demo.demo_model().path)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """In place of the one for all tests: what Ray does on shared nodes meanwhile is none of the test's."""
    before = Snapshot.take()
    yield
    if left := leaks_since(before, lambda: {*shared_pids(), *(pid for each in _running for pid in each.pids())}):
        pytest.fail("left behind by the test:\n  " + "\n  ".join(left), pytrace=False)
