"""Several Ray nodes on this host, with one address: where no namespaces can be made."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.multinode.cluster import RAY_ENV, Cluster
from tests.multinode.netns import ROOT
from tests.multinode.observer import MAKE


class OneHostCluster(Cluster):
    """Ray's own test cluster, in the observer's process; its nodes share everything but their ids."""

    def __init__(self, size: int) -> None:
        super().__init__(size, Path(tempfile.mkdtemp(prefix="dplray", dir="/tmp")))
        self._ids: list[str] = []

    def start(self) -> None:
        self.observe(MAKE)
        self._ids = [self.ask("add") for _ in range(self.size)]
        self.ray_address = self.ask("connect")
        self.await_nodes()

    def name(self, node: int) -> str:
        return f"{self.ray_address.partition(':')[0]}/{self._ids[node][:6]}"

    def run(self, node: int, argv: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        # All nodes are one machine: a driver is on its first node, whichever is meant.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
        env = {**kept, **RAY_ENV, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(self.directory)}
        if self._ids:
            env["RAY_ADDRESS"] = self.ray_address
        process: subprocess.Popen[Any] = subprocess.Popen(argv, **{"env": env, "start_new_session": True, **popen})
        return process

    def processes(self) -> list[psutil.Process]:
        if self.observer is None:
            return []
        try:
            return psutil.Process(self.observer.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def pids(self) -> Iterable[int]:
        own = [] if self.observer is None else [self.observer.process.pid]
        return {process.pid for process in self.processes()} | set(own)

    def lose(self, node: int) -> None:
        self.ask("lose", node_id=self._ids[node])
        self.lost.add(node)

    def replace(self, node: int) -> None:
        if self.is_alive(node):
            self.lose(node)
        self._ids[node] = self.ask("add")

    def is_alive(self, node: int) -> bool:
        return self._ids[node] in [each["id"] for each in self.alive()]

    def stop(self) -> None:
        if self.observer is not None:
            mine = self.processes()
            self.observer.close()
            for process in mine:
                if process.is_running():
                    process.kill()
            psutil.wait_procs(mine, 10)
        shutil.rmtree(self.directory, ignore_errors=True)
