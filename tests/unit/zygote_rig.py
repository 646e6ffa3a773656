"""The launcher's side of the zygote's tests: a backend with trivial engines, and what they noted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import zmq
from dplaunch.backends.mp import MpBackend, MpRank
from dplaunch.backends.registry import registry

from dplaunch.backend import RankBoot
from dplaunch.spec import LaunchSpec, StartMethod
from dplaunch.testing import poll_until_async
from tests.unit import zygote_engines

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0
"""Seconds for the first process of a zygote, which imports torch, on a busy machine."""


class Rig:
    """An opened backend, and a socket that takes what ranks say."""

    def __init__(
        self,
        directory: Path,
        start_method: StartMethod = StartMethod.FORK,
        preload: str = zygote_engines.PRELOAD,
    ) -> None:
        self.directory = directory
        self.backend = MpBackend(preload)
        self.start_method = start_method
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        # An abstract address has no file, and no limit of 107 characters that a test's directory exceeds.
        self.address = f"ipc://@dplaunch-test-{os.getpid()}-{id(self)}"
        self._socket.bind(self.address)
        self._count = 0

    async def __aenter__(self) -> Self:
        await self.backend.open(LaunchSpec(start_method=self.start_method), helper_env())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.backend.close()
        self._socket.close(linger=0)
        self._context.term()

    @property
    def zygote_pid(self) -> int:
        """The helper's process id."""
        pid: int = self.backend._nursery().pid
        return pid

    def boot(self, engine: str, env: Mapping[str, str] | None = None) -> RankBoot:
        """Boots `engine`; what it notes will be in a file of its own."""
        self._count += 1
        return RankBoot(
            name=f"EngineCore_DP{self._count}",
            rank=self._count,
            incarnation=0,
            process_title=f"dplaunch::test_dp{self._count}",
            instance_id=f"test_dp{self._count}",
            handshake_address=self.address,
            env={"PATH": os.environ["PATH"], **(env or {})},
            cpus=(),
            log_file=self.directory / f"{self._count}.log",
            engine=f"{zygote_engines.__name__}:{engine}",
            payload=str(self.directory / f"{self._count}.json").encode(),
            sys_path=tuple(sys.path),
        )

    async def start(self, engine: str, env: Mapping[str, str] | None = None) -> tuple[MpRank, dict[str, Any]]:
        """A rank that has noted something, and what."""
        boot = self.boot(engine, env)
        rank = await self.backend.spawn(boot)
        path = Path(boot.payload.decode())
        await poll_until_async(path.exists, START_TIMEOUT_S, what=f"a note of {engine}")
        noted: dict[str, Any] = json.loads(path.read_text())
        return rank, noted


def helper_env() -> dict[str, str]:
    """What the zygote gets: this environment, where `tests` can be found."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def gone(*pids: int) -> bool:
    """Whether none of these runs. An orphan that nobody collects counts as gone: it holds nothing."""
    return not any(psutil.pid_exists(pid) and not _defunct(pid) for pid in pids)


def _defunct(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def run_script(text: str, *arguments: str, by_stdin: bool = False, directory: Path) -> subprocess.Popen[str]:
    """A launcher of its own, that runs `text`."""
    script = directory / "script.py"
    script.write_text(text)
    with script.open() as source:
        return subprocess.Popen(
            [sys.executable, "-" if by_stdin else str(script), *arguments],
            stdin=source if by_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=helper_env(),
            cwd=directory,
        )


def end_zygotes() -> None:
    """Ends every zygote of this process."""
    registry().end_all()
