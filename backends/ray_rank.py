"""A rank of the `ray` backend: a process somewhere in a cluster, and the seat that it is tied to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Protocol

from dplaunch.backend import Exit

from .agent import RemoteProcess
from .seat import Seat

GONE_S = 2.0
"""Seconds that a rank gets to end after its actor did, before its node counts as lost."""


class Process(Protocol):
    """A rank's process, wherever it is."""

    @property
    def pid(self) -> int | None: ...

    async def wait(self) -> Exit: ...

    def settled(self) -> None: ...

    def dump_stack(self) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class NodeCheck(Protocol):
    """Whether a rank's node is alive, as the cluster knows."""

    async def __call__(self) -> bool: ...


class RayRank:
    """A rank of the `ray` backend, in the shape of `subprocess.Popen`."""

    def __init__(self, process: Process, seat_: Seat, node: str, is_alive: NodeCheck) -> None:
        self._process = process
        self._seat = seat_
        self._node = node
        self._is_alive = is_alive
        self._ended = asyncio.create_task(self._watch())

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def node(self) -> str:
        return self._node

    def describe(self) -> str:
        return f"pid {self.pid} on node {self.node}, Ray actor {self._seat.actor_id[:8]}"

    def poll(self) -> Exit | None:
        return self._ended.result() if self._ended.done() and not self._ended.cancelled() else None

    async def wait(self) -> Exit:
        return await asyncio.shield(self._ended)

    def settled(self) -> None:
        if not self._ended.done():
            self._process.settled()

    def dump_stack(self) -> None:
        if not self._ended.done():
            self._process.dump_stack()

    def terminate(self) -> None:
        if not self._ended.done():
            self._process.terminate()

    def kill(self) -> None:
        if not self._ended.done():
            self._process.kill()

    async def _watch(self) -> Exit:
        """The process says how it ended; where it cannot any more, the cluster says why."""
        process = asyncio.ensure_future(self._process.wait())
        await asyncio.wait((process, self._seat.lost), return_when=asyncio.FIRST_COMPLETED)
        if not process.done():
            # It watches its actor by itself only where that came first.
            self._process.kill()
            await asyncio.wait((process,), timeout=GONE_S)
        try:
            if process.done() and process.exception() is None:
                exit_ = process.result()
                lost = self._seat.lost.done()
                return replace(exit_, reason=self._seat.lost.result()) if lost and exit_.signal is not None else exit_
            return Exit(reason=await self._why_lost())
        finally:
            process.cancel()
            if isinstance(self._process, RemoteProcess) and not process.done():
                self._process.forget()

    async def _why_lost(self) -> str:
        if not await self._is_alive():
            return f"node {self._node} was lost"
        if self._seat.lost.done():
            # Actor and agent at once. Ray has not counted the node as dead yet, and requests should not wait for it.
            return f"node {self._node} was lost, it does not answer"
        return f"its helper on node {self._node} was lost"
