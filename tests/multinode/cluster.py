"""What tests ask of a cluster of Ray nodes, whatever its machines are."""

from __future__ import annotations

import abc
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from dplaunch.testing import poll_until
from tests.multinode.dialogue import Dialogue, converse

START_S = 90.0
"""Seconds for Ray to start on a machine that is busy with other tests; it takes five when idle."""

LOSS_S = 30.0
"""Seconds until Ray takes a node that does not answer for dead, with `RAY_ENV`: about seven when idle."""

CPUS = 2
STORE_BYTES = 80_000_000

RAY_ENV = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # By default a node that has fallen silent is given up after a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}

_NOT_GUESTS = re.compile(
    r"^cat$|/ray/|-m ray\.|^ray::(IDLE|DashboardAgent|RuntimeEnvAgent)|tests\.multinode\.observer", re.MULTILINE
)


class Cluster(abc.ABC):
    """A head on node 0 and workers on the others, each with `CPUS`; `start` it, and `stop` it in any case.

    Args:
        size: how many nodes.
        directory: an existing one, for logs and for whatever every node may see.
    """

    ray_address: str

    def __init__(self, size: int, directory: Path) -> None:
        self.size = size
        self.directory = directory
        self.observer: Dialogue | None = None
        self.lost: set[int] = set()
        """Nodes that a test took away; Ray may not have noticed yet."""
        self.programs: list[Dialogue] = []
        """What runs on node 0 between tests: it and the helper process that it keeps are no guests."""

    @abc.abstractmethod
    def start(self) -> None:
        """Returns when every node is alive."""

    @abc.abstractmethod
    def name(self, node: int) -> str:
        """What dplaunch calls the node."""

    @abc.abstractmethod
    def run(self, node: int, argv: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        """Starts a process on a node, by default in the cluster's environment."""

    @abc.abstractmethod
    def processes(self) -> list[psutil.Process]:
        """All processes of all nodes."""

    @abc.abstractmethod
    def pids(self) -> Iterable[int]:
        """The processes of all nodes and those that hold them."""

    @abc.abstractmethod
    def lose(self, node: int) -> None:
        """Kills a node. Ray notices later."""

    @abc.abstractmethod
    def replace(self, node: int) -> None:
        """Kills the node if it is there still, and starts another in its place."""

    @abc.abstractmethod
    def is_alive(self, node: int) -> bool:
        """Whether Ray takes the node for alive."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Ends every process of every node. Idempotent."""

    def converse(self, node: int, argv: Sequence[str], log: Path, **popen: Any) -> Dialogue:
        """Starts a process on a node that can be asked things."""
        return converse(lambda **pipes: self.run(node, argv, **pipes), log, **popen)

    def observe(self, *arguments: str, **popen: Any) -> None:
        """Starts the observer on node 0."""
        argv = [sys.executable, "-m", "tests.multinode.observer", *arguments]
        self.observer = self.converse(0, argv, self.directory / "observer.log", **popen)

    def ask(self, question: str, **arguments: Any) -> Any:
        """What `tests.multinode.observer` says to a question, which is the name of one of its functions."""
        if self.observer is None:
            raise RuntimeError("the cluster has not been started")
        return self.observer.ask(question, timeout_s=START_S, **arguments)

    def alive(self) -> list[dict[str, Any]]:
        """The nodes that Ray takes for alive: their id and address."""
        return [node for node in self.ask("nodes") if node["alive"]]

    def heal(self) -> None:
        """Replaces the nodes that Ray takes for dead; returns when every node is alive."""
        for node in range(1, self.size):
            if node in self.lost:
                self._await_death(node)
            if not self.is_alive(node):
                self.replace(node)
        self.await_nodes()

    def _await_death(self, node: int) -> None:
        poll_until(lambda: not self.is_alive(node), LOSS_S, f"Ray to take {self.name(node)} for dead")
        self.lost.discard(node)

    def await_nodes(self) -> None:
        """Returns when Ray takes every node for alive."""
        try:
            poll_until(lambda: len(self.alive()) == self.size, START_S, f"{self.size} live nodes")
        except TimeoutError as error:
            raise TimeoutError(f"{error}:\n{self.ask('nodes')}\n{self.logs()}") from None

    def logs(self) -> str:
        """The ends of the logs in `directory`."""
        texts = {log.name: log.read_text(errors="replace")[-2000:] for log in sorted(self.directory.glob("*.log"))}
        return "\n".join(f"--- {name}\n{text}" for name, text in texts.items())

    def guests(self) -> list[str]:
        """The processes on all nodes that are neither Ray's own nor the observer, as command lines."""
        kept = {pid for program in self.programs for pid in _program(program.process.pid)}
        return list(filter(None, (_guest(each) for each in self.processes() if each.pid not in kept)))

    def left(self) -> list[str]:
        """What a launch that is over has left on the nodes."""
        return [*self.guests(), *self.ask("actors"), *self.ask("groups")]


def _program(pid: int) -> Iterable[int]:
    """A program that was started on a node, what holds it out here, and its zygote; not what the zygote forked."""
    try:
        helper = psutil.Process(pid)
        found = [helper, *helper.children()]
        zygotes = [child for each in found for child in each.children() if "dplaunch::zygote" in child.cmdline()]
        return [each.pid for each in (*found, *zygotes)]
    except psutil.Error:
        return []


def _guest(process: psutil.Process) -> str:
    try:
        words = " ".join(process.cmdline()) or process.name()
    except psutil.ZombieProcess:
        words = f"(zombie) {process.name()}"
    except psutil.Error:
        return ""
    return "" if _NOT_GUESTS.search(words) else words.strip()
