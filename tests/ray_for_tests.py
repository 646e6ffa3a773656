"""A Ray cluster of one node for a whole test session, and a look at who occupies it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from dplaunch.testing import poll_until

NODE_S = 60.0
"""Seconds for a node to come or to go, on a busy machine."""

# Ray's processes end with the thread that started them, so this one waits.
_PROGRAM = """
import subprocess, sys
import ray
context = ray.init(
    address="local", num_cpus=8, num_gpus=4, include_dashboard=False, object_store_memory=100 * 2**20,
    configure_logging=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=sys.argv[1],
)
address = context.address_info["gcs_address"]
print(address, flush=True)
more = None
for command in sys.stdin:
    if command == "add\\n":
        more = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}",
             "--num-cpus=8", "--node-ip-address=127.0.0.1", f"--object-store-memory={100 * 2**20}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
    else:
        more.terminate()
        more.wait()
ray.shutdown()
"""


class RayForTests:
    """A running cluster, to which this process is connected."""

    def __init__(self, address: str, process: subprocess.Popen[str]) -> None:
        self.address = address
        self.pid = process.pid
        self._process = process

    @contextmanager
    def second_node(self) -> Iterator[None]:
        """While it is entered, the cluster has a further node of eight CPUs, on this machine too."""
        self._tell("add", nodes=2)
        try:
            yield
        finally:
            self._tell("remove", nodes=1)

    def _tell(self, command: str, nodes: int) -> None:
        import ray

        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        poll_until(lambda: sum(node["Alive"] for node in ray.nodes()) == nodes, NODE_S, f"{nodes} nodes")

    def occupied(self) -> tuple[dict[str, float], list[str]]:
        """What is taken of its resources, and the placement groups that are there."""
        import ray

        total, free = ray.cluster_resources(), ray.available_resources()
        taken = {kind: total[kind] - free.get(kind, 0.0) for kind in ("CPU", "GPU") if kind in total}
        groups = ray.util.placement_group_table().values()
        return taken, [group["placement_group_id"] for group in groups if group["state"] != "REMOVED"]

    def actors(self) -> list[dict[str, Any]]:
        """The actors that have a name, living or being made, in every namespace."""
        import ray

        found: list[dict[str, Any]] = ray.util.list_named_actors(all_namespaces=True)
        return found

    def pids(self) -> set[int]:
        """The processes of the cluster itself: those of Ray that hold no rank."""
        try:
            everyone = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        except psutil.Error:
            return set()
        return {process.pid for process in everyone if not _is_ours(process)}


def _is_ours(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "RankActor" in words or "NodeAgent" in words or "dplaunch::" in words


@contextmanager
def ray_for_tests(directory: str) -> Iterator[RayForTests]:
    """Starts one, connects to it, and ends both."""
    import ray

    # For whatever starts or joins a cluster in this session: no token in the home directory, no report to anyone.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        ray.init(address=address, configure_logging=False, log_to_driver=False)
        yield RayForTests(address, process)
        ray.shutdown()
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()
