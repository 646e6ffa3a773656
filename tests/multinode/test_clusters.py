"""The Ray clusters that the other tests stand on: nodes, their addresses, their loss."""

from __future__ import annotations

import psutil
import pytest

from dplaunch.testing import poll_until
from tests.multinode.cluster import CPUS, LOSS_S, Cluster
from tests.multinode.netns import Network
from tests.multinode.one_host import OneHostCluster
from tests.multinode.ray_cluster import RayCluster

pytest.importorskip("ray")


def test_every_node_is_there_once_with_its_own_id(cluster3: Cluster) -> None:
    nodes = cluster3.alive()
    assert len({node["id"] for node in nodes}) == cluster3.size == 3
    assert cluster3.ask("free_cpus") == 3 * CPUS


def test_an_actor_that_is_pinned_to_a_node_sees_that_nodes_address(machines: RayCluster) -> None:
    nodes, seen = machines.alive(), machines.ask("visit")
    assert [node["address"] for node in nodes] == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
    assert [(each["id"], each["address"]) for each in seen] == [(node["id"], node["address"]) for node in nodes]
    assert [each["hostname"] for each in seen] == ["machine0", "machine1", "machine2"]


def test_what_is_not_rays_own_is_a_guest(machines: RayCluster) -> None:
    assert machines.guests() == []
    sleeper = machines.run(1, ["sleep", "600"])
    try:
        poll_until(lambda: machines.guests() == ["sleep 600"], what="the guest")
    finally:
        for process in machines.processes():
            if process.name() == "sleep":
                process.kill()
        sleeper.wait(10)


def test_a_lost_node_is_dead_to_ray_and_the_others_live(machines: RayCluster) -> None:
    lost = machines.network.processes(1)
    machines.lose(1)
    assert not any(process.is_running() for process in lost)
    poll_until(lambda: len(machines.alive()) == 2, LOSS_S, "Ray's notice")
    assert [node["address"] for node in machines.alive()] == ["10.77.0.1", "10.77.0.3"]
    machines.heal()
    assert [each["hostname"] for each in machines.ask("visit")] == ["machine0", "machine1", "machine2"]


def test_nothing_is_left_of_a_cluster_that_was_stopped() -> None:
    with Network(1) as network:
        cluster = RayCluster(network)
        cluster.start()
        processes = cluster.processes()
        assert len(processes) > 5
        cluster.stop()
    assert not any(process.is_running() for process in processes)
    assert not network.directory.exists()


def test_where_no_machines_can_be_made_one_hosts_nodes_do_the_same() -> None:
    cluster = OneHostCluster(2)
    try:
        cluster.start()
        names = [cluster.name(node) for node in (0, 1)]
        assert [f"{node['address']}/{node['id'][:6]}" for node in cluster.alive()] == sorted(names)
        assert {each["id"] for each in cluster.ask("visit")} == {node["id"] for node in cluster.alive()}
        poll_until(lambda: not cluster.left(), what="the visitors' end")
        cluster.lose(1)
        poll_until(lambda: len(cluster.alive()) == 1, LOSS_S, "Ray's notice")
        cluster.heal()
        processes = [psutil.Process(pid) for pid in cluster.pids()]
    finally:
        cluster.stop()
    assert not any(process.is_running() for process in processes)
    assert not cluster.directory.exists()
