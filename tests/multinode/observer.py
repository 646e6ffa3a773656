"""Looks at a Ray cluster from inside: runs on a node and answers a test's questions.

With "make" as its argument it makes that cluster too, of nodes of this host.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from tests.multinode.cluster import CPUS, STORE_BYTES
from tests.multinode.dialogue import answer

MAKE = "make"

ENDED = ("DEAD", "REMOVED")


def nodes() -> list[dict[str, Any]]:
    """Every node that Ray has known, in the order of its address."""
    import ray

    facts = [
        {"id": node["NodeID"], "address": node["NodeManagerAddress"], "alive": bool(node["Alive"])}
        for node in ray.nodes()
    ]
    return sorted(facts, key=lambda node: (node["address"], node["id"]))


def visit() -> list[dict[str, Any]]:
    """What an actor sees on each live node: its address, host name and process id; in the order of `nodes`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Visitor:
        def look(self) -> dict[str, Any]:
            return {
                "id": ray.get_runtime_context().get_node_id(),
                "address": ray.util.get_node_ip_address(),
                "hostname": os.uname().nodename,
                "pid": os.getpid(),
            }

    remote: Any = ray.remote(Visitor)
    there = [NodeAffinitySchedulingStrategy(node["id"], soft=False) for node in nodes() if node["alive"]]
    visitors = [remote.options(num_cpus=0, scheduling_strategy=each).remote() for each in there]
    seen: list[dict[str, Any]] = ray.get([visitor.look.remote() for visitor in visitors], timeout=60)
    for visitor in visitors:
        ray.kill(visitor)
    return seen


def actors() -> list[str]:
    """The actors that have not ended, of every job."""
    from ray._private import state

    return [f"{key} {actor['State']}" for key, actor in state.actors().items() if actor["State"] not in ENDED]


def groups() -> list[str]:
    """The placement groups that have not been removed, of every job."""
    import ray

    table = ray.util.placement_group_table()
    return [f"{key} {group['state']}" for key, group in table.items() if group["state"] not in ENDED]


def free_cpus() -> float:
    """The CPUs of the cluster that nobody holds."""
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


class OneHost:
    """Ray's own test cluster: several nodes of this host, made by this process."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._nodes: dict[str, Any] = {}

    def add(self) -> str:
        """One more node; the first is the head. Its id."""
        node = self._cluster.add_node(
            num_cpus=CPUS, object_store_memory=STORE_BYTES, include_dashboard=False, wait=bool(self._nodes)
        )
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def connect(self) -> str:
        """The cluster's address, once this process is connected to it."""
        import ray

        ray.init(self._cluster.address, log_to_driver=False, logging_level="ERROR")
        return str(self._cluster.address)

    def lose(self, node_id: str) -> None:
        """Kills a node's processes."""
        self._cluster.remove_node(self._nodes.pop(node_id), allow_graceful=False)

    def end(self) -> None:
        """Ends all of it."""
        self._cluster.shutdown()


def main() -> None:
    import ray

    commands: dict[str, Callable[..., Any]] = {
        "nodes": nodes,
        "visit": visit,
        "actors": actors,
        "groups": groups,
        "free_cpus": free_cpus,
    }
    if sys.argv[1:] != [MAKE]:
        ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
        answer(commands)
        return
    made = OneHost()
    try:
        answer({**commands, "add": made.add, "connect": made.connect, "lose": made.lose})
    finally:
        ray.shutdown()
        made.end()


if __name__ == "__main__":
    main()
