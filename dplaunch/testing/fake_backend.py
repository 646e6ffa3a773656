"""A backend whose ranks are threads: no process is made, so that hundreds of ranks start in a moment.

It keeps the contract that mp and Ray keep. What would end a process is simulated (`dplaunch.testing.host`),
which asks for an engine that knows of it: the stand-in engine does, vLLM's does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from dplaunch.backend import Exit, RankBoot
from dplaunch.errors import BackendError, DplaunchError
from dplaunch.inventory import Inventory, local_node
from dplaunch.plan import RankSpec
from dplaunch.rank_main import EXIT_ENGINE_FAILED, load_function
from dplaunch.spec import LaunchSpec
from dplaunch.testing.host import InProcessChannel, SimulatedExit, StopFlag

JOIN_TIMEOUT_S = 5.0
"""Seconds for a killed thread to notice; the stand-in engine needs milliseconds."""


class FakeRank:
    """A rank that is a thread, in the shape of a process."""

    def __init__(self, boot: RankBoot) -> None:
        self._boot = boot
        self._stop = StopFlag()
        self._exit: Future[Exit] = Future()
        self.thread = threading.Thread(target=self._run, name=f"dplaunch-fake-{boot.instance_id}", daemon=True)
        self.thread.start()

    @property
    def pid(self) -> int | None:
        """None: its process is the launcher's own, which nobody should signal for its sake."""
        return None

    @property
    def node(self) -> str:
        return socket.gethostname()

    def describe(self) -> str:
        return f"thread {self.thread.name}"

    def poll(self) -> Exit | None:
        return self._exit.result() if self._exit.done() else None

    async def wait(self) -> Exit:
        # Shielded: a supervisor that stops waiting must not cancel the exit for the others who wait.
        return await asyncio.shield(asyncio.wrap_future(self._exit))

    def settled(self) -> None:
        """A thread leaves nothing behind that is not this process's."""

    def dump_stack(self) -> None:
        frame = sys._current_frames().get(self.thread.ident or 0)
        if frame is not None:
            self._log("Stack (most recent call last):\n" + "".join(traceback.format_stack(frame)))

    def terminate(self) -> None:
        self._stop.terminate()

    def kill(self) -> None:
        self._stop.kill()

    def _run(self) -> None:
        try:
            returncode = self._run_engine()
        finally:
            self._stop.close()
        self._exit.set_result(Exit.from_returncode(returncode))

    def _run_engine(self) -> int:
        try:
            with InProcessChannel(self._boot, self._stop) as channel:
                channel.phase("importing")
                try:
                    load_function(self._boot.engine)(self._boot, channel)
                except Exception as error:
                    self._log(traceback.format_exc())
                    channel.failed(error)
                    return EXIT_ENGINE_FAILED
        except SimulatedExit as exit_:
            return exit_.returncode
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        return -signal.SIGKILL if self._stop.killed.is_set() else 0

    def _log(self, text: str) -> None:
        if self._boot.log_file is not None:
            with contextlib.suppress(OSError), self._boot.log_file.open("a") as file:
                file.write(text)


class FakeBackend:
    """See the module.

    Args:
        inventory: what it says there is to run on; None for this host's cores.
    """

    def __init__(self, inventory: Inventory | None = None) -> None:
        self._inventory = inventory
        self._ranks: list[FakeRank] = []

    async def inventory(self, spec: LaunchSpec, more: int = 0) -> Inventory:
        return self._inventory or Inventory(nodes=(await asyncio.to_thread(local_node),))

    async def open(self, spec: LaunchSpec, env: Mapping[str, str], ranks: Sequence[RankSpec] = ()) -> None:
        pass

    async def address(self) -> str | None:
        return None

    async def call(self, function: str, payload: bytes) -> bytes:
        return await asyncio.to_thread(_call, function, payload)

    async def reserve(self, ranks: Sequence[RankSpec]) -> None:
        pass

    async def release(self, rank: int) -> None:
        pass

    async def spawn(self, boot: RankBoot) -> FakeRank:
        self._ranks = [rank for rank in self._ranks if rank.poll() is None]
        rank = FakeRank(boot)
        self._ranks.append(rank)
        return rank

    async def close(self) -> None:
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            await asyncio.to_thread(rank.thread.join, JOIN_TIMEOUT_S)


_CALL_LOCK = threading.Lock()


def _call(function: str, payload: bytes) -> bytes:
    # Functions count on a process that is thrown away afterwards, and change its environment as they like.
    with _CALL_LOCK:
        environ = dict(os.environ)
        try:
            return _call_here(function, payload)
        finally:
            os.environ.clear()
            os.environ.update(environ)


def _call_here(function: str, payload: bytes) -> bytes:
    try:
        answer: bytes = load_function(function)(payload)
    except DplaunchError:
        raise
    except SimulatedExit as exit_:
        end = Exit.from_returncode(exit_.returncode)
        raise BackendError(f"the helper process of {function} ended without an answer: {end}") from None
    except BaseException as error:
        raise BackendError(
            f"{function} failed: {type(error).__name__}: {error}", detail=traceback.format_exc()
        ) from error
    return answer
