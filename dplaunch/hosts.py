"""How a bucket of weights reaches every rank: once to each host, whatever backend started the ranks there.

Ranks of the launcher's host map its memory. On another host one rank takes the bucket from its socket into memory that
the others there map: the network carries as many copies as there are hosts. Who is together on a host is not asked of a
backend but tried, with a `Landmark`: containers of one machine may be apart, and Ray nodes of one machine together.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dplaunch import device_memory
from dplaunch.bucket import Bucket, Landmark
from dplaunch.rank import Rank
from dplaunch.seam import weights as seam
from dplaunch.threads import in_thread

Failures = dict[Rank, Exception]
"""Ranks that did not do as they were told, and why."""

TAKE_S = 30.0
"""Seconds that a rank has to take a bucket, beside those for its bytes: an engine's step, which comes first."""

SLOW_BYTES_PER_S = 10 * 2**20
"""Of a network that weights may still be sent over."""


class AskAll(Protocol):
    """See `Weights.ask_all`."""

    async def __call__(
        self, ranks: Sequence[Rank], method: str, *args: Any, deadline: float | None = None
    ) -> tuple[dict[Rank, Any], Failures]: ...


@dataclass(frozen=True, slots=True)
class Hosts:
    """Which ranks read the same memory.

    Args:
        near: those on the launcher's host.
        far: those of each other host.
        devices: for those that read this process's memory on their device, its name.
    """

    near: list[Rank]
    far: list[list[Rank]]
    devices: dict[Rank, str] = field(default_factory=dict)

    @classmethod
    async def find(cls, ask_all: AskAll, ranks: Sequence[Rank], landmark: Landmark, deadline: float | None) -> Hosts:
        """Asks the ranks what they see. One that does not answer counts as on a host of its own."""
        seen, _ = await ask_all(ranks, seam.SEES, landmark.path, landmark.secret, deadline=deadline)
        near = [rank for rank in ranks if seen.get(rank)]
        rest, far = [rank for rank in ranks if rank not in near], []
        while rest:
            first, *others = rest
            marks, _ = await ask_all([first], seam.LANDMARK, deadline=deadline)
            seen, _ = await ask_all(others, seam.SEES, *marks[first], deadline=deadline) if marks else ({}, {})
            far.append([first, *(rank for rank in others if seen.get(rank))])
            rest = [rank for rank in others if not seen.get(rank)]
        return cls(near, far, await _on_our_devices(ask_all, ranks, deadline))

    def readers(self, ranks: Sequence[Rank]) -> list[str]:
        """On which device each of the ranks reads a bucket; "" for none."""
        return [self.devices.get(rank, "") for rank in ranks]

    async def load(self, ask_all: AskAll, ranks: Sequence[Rank], bucket: Bucket, deadline: float | None) -> Failures:
        """Has ranks load a bucket; those that did not."""
        beside = [rank for rank in ranks if bucket.device and self.devices.get(rank) == bucket.device]
        others = [rank for rank in ranks if rank not in beside]
        here = [rank for rank in self.near if rank in others]
        groups = [left for host in self.far if (left := [rank for rank in host if rank in others])]
        data = await asyncio.to_thread(bucket.read) if groups else b""
        loaded, there, far = await asyncio.gather(
            ask_all(here, seam.LOAD, bucket.path, bucket.entries, deadline=deadline),
            _load_beside(ask_all, beside, bucket, deadline),
            asyncio.gather(*(_load_far(ask_all, group, bucket, data, deadline) for group in groups)),
        )
        failed: Failures = loaded[1] | there
        for each in far:
            failed |= each
        return failed


async def _on_our_devices(ask_all: AskAll, ranks: Sequence[Rank], deadline: float | None) -> dict[Rank, str]:
    """Which ranks are on a device on which this process has memory, and see it."""
    ours = device_memory.own_devices()
    if not ours:
        return {}
    names, _ = await ask_all(ranks, seam.DEVICE, deadline=deadline)
    found: dict[Rank, str] = {}
    for name, device in ours.items():
        there = [rank for rank in ranks if names.get(rank) == name]
        if not there:
            continue
        try:
            mark = await in_thread(functools.partial(device_memory.DeviceMark, device, len(there)), "weights")
        except RuntimeError:
            continue  # There is no room, or its allocator shares nothing: by the host's memory then.
        try:
            looks = (ask_all([rank], seam.SEES_DEVICE, mark.handle(), mark.secret, deadline=deadline) for rank in there)
            found |= {rank: name for seen, _ in await asyncio.gather(*looks) for rank, sees in seen.items() if sees}
        finally:
            mark.free()
    return found


async def _load_beside(ask_all: AskAll, ranks: list[Rank], bucket: Bucket, deadline: float | None) -> Failures:
    """Each opens the device's memory by a handle of its own."""
    failed: Failures = {}
    if (memory := bucket.on_device) is not None:
        calls = (ask_all([rank], seam.LOAD, "", bucket.entries, memory.handle(), deadline=deadline) for rank in ranks)
        for _, cannot in await asyncio.gather(*calls):
            failed |= cannot
    return failed


async def _load_far(
    ask_all: AskAll, ranks: list[Rank], bucket: Bucket, data: bytes, deadline: float | None
) -> Failures:
    """The first of them takes the bucket for all; the next one when it cannot."""
    failed: Failures = {}
    while ranks:
        taker, others = ranks[0], ranks[1:]
        limit = time.monotonic() + TAKE_S + len(data) / SLOW_BYTES_PER_S
        paths, cannot = await ask_all(
            [taker], seam.TAKE, data, deadline=limit if deadline is None else min(limit, deadline)
        )
        if not cannot:
            return failed | (await ask_all(ranks, seam.LOAD, paths[taker], bucket.entries, deadline=deadline))[1]
        failed, ranks = failed | cannot, others
    return failed
