"""A node of a cluster where the launcher is not: one Ray actor with the same helper that the mp backend uses."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dplaunch.backend import Exit, RankBoot
from dplaunch.demo import demo_model
from dplaunch.errors import BackendError
from dplaunch.spec import LaunchSpec, StartMethod

from .messages import Failure
from .mp import MpBackend, MpRank
from .probe import first_line

LOG_CHUNK_BYTES = 256 * 1024
LOG_POLL_S = 0.1
"""Seconds between two looks at a log file that does not grow."""

LAST_LINES_S = 2.0
"""Seconds that a rank's last lines may take to arrive after it has ended."""


@dataclass(frozen=True, slots=True)
class Born:
    """A rank's process on the node."""

    number: int
    pid: int | None


class AgentLostError(BackendError):
    """Raised when a node's agent is out of reach, with the node or without."""


class NodeAgent:
    """Makes and watches the ranks of one node, in a process of Ray's there.

    What goes wrong is returned as a `Failure`, not raised: Ray would wrap it.
    """

    def __init__(self, preload: str) -> None:
        self._backend = MpBackend(preload)
        self._ranks: dict[int, MpRank] = {}
        self._logs: dict[int, Path] = {}
        self._numbers = itertools.count()
        # Ray's workers have a session directory, but not one that is gone with them.
        self._directory = Path(tempfile.mkdtemp(prefix="dplaunch-"))

    async def open(self, start_method: str, env: Mapping[str, str], builtin: Path | None) -> Failure | None:
        """Begins to import what ranks need; makes the built-in model here too where the launcher's is at `builtin`."""
        try:
            await self._backend.open(LaunchSpec(start_method=StartMethod(start_method)), env)
            if builtin is not None:
                await asyncio.to_thread(_make_builtin, builtin)
        except Exception as error:
            return Failure.of(error)
        return None

    async def spawn(self, boot: bytes, keeper: int) -> Born | Failure:
        """Forks a rank that ends with the process `keeper`; its log goes to a file of this node, see `read`."""
        try:
            wanted: RankBoot = pickle.loads(boot)
            number = next(self._numbers)
            log = self._directory / f"{number}.log"
            log.touch()
            self._ranks[number] = await self._backend.spawn(replace(wanted, log_file=log), (keeper,))
            self._logs[number] = log
        except Exception as error:
            return Failure.of(error)
        return Born(number, self._ranks[number].pid)

    async def wait(self, number: int) -> Exit:
        """Returns how a rank ended, when it does."""
        return await self._ranks[number].wait()

    async def read(self, number: int, offset: int) -> bytes:
        """The rank's output from `offset` on, as soon as there is some; nothing once it has ended and all is read."""
        while True:
            over = self._ranks[number].poll() is not None
            if chunk := await asyncio.to_thread(_read, self._logs[number], offset):
                return chunk
            if over:
                return b""
            await asyncio.sleep(LOG_POLL_S)

    async def settled(self, number: int) -> None:
        """The rank serves from now on."""
        self._ranks[number].settled()

    async def dump_stack(self, number: int) -> None:
        """Has the rank write its stacks to its log."""
        self._ranks[number].dump_stack()

    async def terminate(self, number: int) -> None:
        """SIGTERM."""
        self._ranks[number].terminate()

    async def kill(self, number: int) -> None:
        """SIGKILL to the rank and all below it."""
        self._ranks[number].kill()

    async def close(self) -> None:
        """Ends what is left."""
        await self._backend.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class Agent:
    """The launcher's end of a `NodeAgent`.

    Args:
        node_id: Ray's id of the node.
        preload: what the node's helper imports.
    """

    def __init__(self, node_id: str, preload: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._actor: Any = (
            ray.remote(NodeAgent)
            .options(
                num_cpus=0,
                max_restarts=0,
                # One call waits for each rank's end and one for its output.
                max_concurrency=10_000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote(preload)
        )
        self._opened: asyncio.Task[None] | None = None

    def open(self, start_method: str, env: Mapping[str, str], *, builtin: bool) -> None:
        """Begins to warm the node, and returns at once. `builtin` says that ranks load the built-in model."""
        self._opened = asyncio.create_task(self._open(start_method, dict(env), builtin))

    async def _open(self, start_method: str, env: dict[str, str], builtin: bool) -> None:
        path = (await asyncio.to_thread(demo_model)).path if builtin else None
        failure = await self._actor.open.remote(start_method, env, path)
        if failure is not None:
            raise failure.as_error("the node's helper process could not be started")

    async def spawn(self, boot: RankBoot, keeper: int) -> RemoteProcess:
        """Forks a rank there.

        Raises:
            AgentLostError: when the agent is out of reach.
            BackendError: when it cannot be made.
        """
        import ray

        try:
            if self._opened is not None:
                await asyncio.shield(self._opened)
            born = await self._actor.spawn.remote(pickle.dumps(replace(boot, env=dict(boot.env))), keeper)
        except ray.exceptions.RayError as error:
            raise AgentLostError(f"the node's helper was lost: {first_line(error)}") from error
        if isinstance(born, Failure):
            raise born.as_error("the rank's process could not be made")
        return RemoteProcess(self._actor, born, boot.log_file)

    async def close(self) -> None:
        """Ends the actor and what is left of its ranks."""
        import ray

        if self._opened is not None:
            self._opened.cancel()
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            await asyncio.wait_for(self._actor.close.remote(), 2 * LAST_LINES_S)
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError, ValueError):
            ray.kill(self._actor)


class RemoteProcess:
    """A rank's process on another node; its output is appended to the launcher's log file as it comes."""

    def __init__(self, actor: Any, born: Born, log_file: Path | None) -> None:
        self.pid = born.pid
        self._actor = actor
        self._number = born.number
        self._log = asyncio.create_task(self._copy_log(log_file))

    async def wait(self) -> Exit:
        """How it ended.

        Raises:
            ray.exceptions.RayError: when the node's agent is out of reach.
        """
        exit_: Exit = await self._actor.wait.remote(self._number)
        # Whoever hears of the end reads the last lines next.
        await asyncio.wait((self._log,), timeout=LAST_LINES_S)
        return exit_

    def settled(self) -> None:
        self._actor.settled.remote(self._number)

    def dump_stack(self) -> None:
        self._actor.dump_stack.remote(self._number)

    def terminate(self) -> None:
        self._actor.terminate.remote(self._number)

    def kill(self) -> None:
        self._actor.kill.remote(self._number)

    def forget(self) -> None:
        """Stops copying the log: the node is gone."""
        self._log.cancel()

    async def _copy_log(self, log_file: Path | None) -> None:
        import ray

        offset = 0
        with contextlib.suppress(ray.exceptions.RayError):
            while chunk := await self._actor.read.remote(self._number, offset):
                offset += len(chunk)
                if log_file is not None:
                    await asyncio.to_thread(_append, log_file, chunk)


def _make_builtin(wanted: Path) -> None:
    made = demo_model().path
    if made != wanted:
        raise BackendError(
            f"the built-in model is at {made} on node {socket.gethostname()}, and at {wanted} on the launcher's",
            hint="Use the same user on every node, or --model with a path or name that is the same everywhere.",
        )


def _read(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(LOG_CHUNK_BYTES)


def _append(path: Path, chunk: bytes) -> None:
    # As a rank of this host would: another group of lines may be written in between, but none is lost.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        os.write(file, chunk)
    finally:
        os.close(file)
