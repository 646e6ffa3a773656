"""The `mp` backend: ranks are processes of the launcher's own host, forked from a zygote."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from dplaunch.backend import Exit, RankBoot
from dplaunch.errors import BackendError
from dplaunch.inventory import Inventory, local_node
from dplaunch.plan import RankSpec
from dplaunch.spec import LaunchSpec, StartMethod

from .child import Child
from .messages import CallJob, Failure, Job, RankJob
from .nursery import Nursery, ZygoteKey, ZygoteLostError
from .registry import registry, shutdown_zygotes
from .tree import CLEAR_TIMEOUT_S

__all__ = ["DEFAULT_PRELOAD", "MpBackend", "MpRank", "shutdown_zygotes"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_PRELOAD = "dplaunch.seam.preload:preload"

LOADER_VARIABLES = (
    "GLIBC_TUNABLES",
    "LD_AUDIT",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PYTHONHASHSEED",
    "PYTHONMALLOC",
)
"""What a fork cannot change any more: groups that differ in one of these do not share a zygote."""


class MpRank:
    """A rank that is a process, in the shape of `subprocess.Popen`."""

    def __init__(self, child: Child) -> None:
        self._child = child

    @property
    def pid(self) -> int | None:
        return self._child.pid

    @property
    def node(self) -> str:
        return socket.gethostname()

    def describe(self) -> str:
        return f"pid {self.pid}"

    def poll(self) -> Exit | None:
        return self._child.ended.result() if self._child.ended.done() else None

    async def wait(self) -> Exit:
        return await _result(self._child.ended)

    def settled(self) -> None:
        self._child.settled()

    def dump_stack(self) -> None:
        self._child.dump_stack()

    def terminate(self) -> None:
        self._child.terminate()

    def kill(self) -> None:
        self._child.kill()


class MpBackend:
    """Makes ranks as processes of this host.

    Args:
        preload: "module:function" that the zygote calls once, to import what every rank needs.
    """

    def __init__(self, preload: str = DEFAULT_PRELOAD) -> None:
        self._preload = preload
        self._pid = os.getpid()
        self._key: ZygoteKey | None = None
        self._env: dict[str, str] = {}
        self._children: list[Child] = []

    async def inventory(self, spec: LaunchSpec, more: int = 0) -> Inventory:
        spec.cluster.refuse("mp")
        # In a thread: drivers take their time.
        return Inventory(nodes=(await asyncio.to_thread(local_node),))

    async def open(self, spec: LaunchSpec, env: Mapping[str, str], ranks: Sequence[RankSpec] = ()) -> None:
        """As the protocol says.

        Raises:
            BackendError: when the zygote's process cannot be made.
            UsageError: when `DPLAUNCH_ZYGOTE_LINGER_S` is no number of seconds.
        """
        # numpy would make a pool of threads at its import, which a fork does not copy.
        self._env = {"OPENBLAS_NUM_THREADS": "1", **env}
        fork = spec.start_method is StartMethod.FORK
        loader_env = tuple((name, env[name]) for name in LOADER_VARIABLES if name in env)
        key = ZygoteKey(str(spec.start_method), self._preload if fork else None, loader_env)
        registry().hold(key)
        if self._key is not None:
            registry().release(self._key)
        self._key = key
        self._nursery()

    async def address(self) -> str | None:
        return None

    async def call(self, function: str, payload: bytes) -> bytes:
        """As the protocol says; an error of dplaunch's own that the function raises is raised here as it was.

        Raises:
            BackendError: when the function raises anything else, or its process ends without an answer.
        """
        job = CallJob(
            function=function,
            payload=payload,
            env=self._env,
            sys_path=tuple(sys.path),
            cwd=_working_directory(),
        )
        child = await self._born(job)
        try:
            exit_ = await _result(child.ended)
        except asyncio.CancelledError:
            child.kill()
            raise
        if child.answer is None:
            raise BackendError(
                f"{function} ended without an answer: {exit_}",
                hint="The last that it wrote is below." if child.output else "It wrote nothing.",
                detail=child.output,
            )
        if isinstance(child.answer.result, Failure):
            raise child.answer.result.as_error(f"{function} failed")
        return child.answer.result

    async def reserve(self, ranks: Sequence[RankSpec]) -> None:
        """Nothing: the plan has given out what there is."""

    async def release(self, rank: int) -> None:
        """Nothing, as for `reserve`."""

    async def spawn(self, boot: RankBoot, keepers: tuple[int, ...] = ()) -> MpRank:
        """As the protocol says.

        Args:
            boot: what the process becomes.
            keepers: processes of this host that hold something for the rank: it ends with the first of them.

        Raises:
            BackendError: when the process cannot be made; carries what the zygote wrote if that is why.
        """
        # A read-only view of a dict, which a plan may hold, cannot be pickled.
        boot = replace(boot, env=dict(boot.env))
        return MpRank(await self._born(RankJob(boot=boot, cwd=_working_directory(), keepers=keepers)))

    async def close(self) -> None:
        # In a forked copy of the launcher, ranks and zygote belong to the original.
        if self._key is None or self._pid != os.getpid():
            return
        key, self._key = self._key, None
        try:
            await self._clear()
        finally:
            registry().release(key)

    async def _clear(self) -> None:
        for child in self._children:
            child.kill()
        # One that is not born yet is killed at its birth; waiting for that would be waiting for the imports.
        leaving = {asyncio.wrap_future(child.cleared): child for child in self._children if child.born.done()}
        self._children.clear()
        if not leaving:
            return
        # The clearing has the same deadline, and then says that it failed.
        done, _ = await asyncio.wait(leaving, timeout=2 * CLEAR_TIMEOUT_S)
        for future, child in leaving.items():
            if future not in done or not future.result():
                logger.warning("Processes of pid %s are still there %g s after SIGKILL.", child.pid, CLEAR_TIMEOUT_S)

    async def _born(self, job: Job) -> Child:
        try:
            return await self._fork(job)
        except ZygoteLostError as error:
            # One that served and died between our look and our request: once more, with a new one.
            if not error.replaceable:
                raise
        return await self._fork(job)

    async def _fork(self, job: Job) -> Child:
        child = self._nursery().fork(job)
        self._children = [known for known in self._children if not known.cleared.done()]
        self._children.append(child)
        try:
            await _result(child.born)
        except asyncio.CancelledError:
            child.kill()
            raise
        return child

    def _nursery(self) -> Nursery:
        if self._key is None:
            raise BackendError("the mp backend is not open", hint="Await open() first, and nothing after close().")
        return registry().nursery(self._key, self._env)


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "/"  # it was removed under us; paths that matter are absolute


async def _result(future: Future[T]) -> T:
    # Any loop may wait: the future is set by a thread, and giving up does not cancel it for others.
    return await asyncio.wrap_future(future)
