"""A Ray cluster on a `Network`: machines with addresses of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from dplaunch.testing import poll_until
from tests.multinode.cluster import CPUS, RAY_ENV, START_S, STORE_BYTES, Cluster
from tests.multinode.netns import Network

PORT = 6379


class RayCluster(Cluster):
    """What it is made of is killed, never asked to end.

    Args:
        network: the machines; they are the caller's.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(network.size, network.directory)
        self.network = network
        self.ray_address = f"{network.address(0)}:{PORT}"

    def start(self) -> None:
        self._ray(0, "--head", f"--port={PORT}", "--include-dashboard=false")
        poll_until(lambda: "Ray runtime started" in self._log(0).read_text(), START_S, "Ray's head")
        for node in range(1, self.size):
            self._ray(node, f"--address={self.ray_address}")
        self.observe()
        self.await_nodes()

    def name(self, node: int) -> str:
        return self.network.address(node)

    def run(self, node: int, argv: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        return self.network.run(node, argv, **{"env": self.env(), **popen})

    def env(self, **more: str) -> dict[str, str]:
        """The environment of processes on nodes."""
        own = str(self.network.own)
        return self.network.env(**RAY_ENV, RAY_TMPDIR=own, RAY_ADDRESS=self.ray_address, **more)

    def processes(self) -> list[psutil.Process]:
        return [process for node in range(self.size) for process in self.network.processes(node)]

    def pids(self) -> Iterable[int]:
        return {process.pid for process in self.processes()} | set(self.network.helpers)

    def lose(self, node: int) -> None:
        """Kills every process of a node; returns when they are gone. Ray notices later."""
        self.network.kill(node)
        self.lost.add(node)

    def cut(self, node: int) -> None:
        """Takes a node off the network; its processes go on."""
        self.network.cut(node)
        self.lost.add(node)

    def replace(self, node: int) -> None:
        self.network.replace(node)
        self._ray(node, f"--address={self.ray_address}")

    def is_alive(self, node: int) -> bool:
        return self.name(node) in [each["address"] for each in self.alive()]

    def stop(self) -> None:
        self.network.close()
        if self.observer is not None:
            self.observer.close()

    def _ray(self, node: int, *arguments: str) -> None:
        argv = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments),
            f"--node-ip-address={self.network.address(node)}",
            f"--num-cpus={CPUS}",
            f"--object-store-memory={STORE_BYTES}",
        ]
        with self._log(node).open("w") as log:
            self.run(node, argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def _log(self, node: int) -> Path:
        return self.directory / f"ray{node}.log"
