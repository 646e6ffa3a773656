"""Weights that come in several calls, as over HTTP: start, parts, finish. Together they are one update of the group.

Two kinds of parts. A bucket (`dplaunch.posted`) is memory of a trainer on this host; it may be kept for ranks that come
up later. Anything else is for vLLM's own weight-transfer engine in the workers (`--weight-transfer-config`), which gets
the tensors from the trainer over NCCL: nobody can have that stream again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dplaunch.bucket import Bucket
from dplaunch.errors import WeightsError

GAP_S = 120.0
"""Seconds after which a trainer that sends nothing is taken for gone: gathering a sharded layer takes seconds."""


@dataclass(eq=False)
class _Part:
    """One part, and whether the ranks have it."""

    content: Any
    done: asyncio.Event = field(default_factory=asyncio.Event)


class _Parts:
    """Parts, handed from whoever gets them to whoever loads them."""

    path = None

    def __init__(self, gap_s: float = GAP_S) -> None:
        self._gap_s = gap_s
        self._coming: asyncio.Queue[_Part | WeightsError | None] = asyncio.Queue()
        self._last: _Part | None = None

    async def put(self, content: Any) -> None:
        """Hands over a part; returns when the ranks have loaded it."""
        part = _Part(content)
        self._coming.put_nowait(part)
        await part.done.wait()

    def finish(self) -> None:
        """There are no more."""
        self._coming.put_nowait(None)

    def give_up(self, why: str) -> None:
        """There are no more, and those that were there are not all."""
        self._coming.put_nowait(WeightsError(why))

    async def _next(self) -> Any:
        if self._last is not None:
            # Whoever asks for the next one has loaded this one.
            self._last.done.set()
        try:
            async with asyncio.timeout(self._gap_s):
                part = self._last_or_raise(await self._coming.get())
        except TimeoutError:
            raise WeightsError(f"the trainer has sent nothing for {self._gap_s:.0f} s") from None
        self._last = part
        return None if part is None else part.content

    def _last_or_raise(self, part: _Part | WeightsError | None) -> _Part | None:
        if isinstance(part, WeightsError):
            raise part
        return part


class Posted(_Parts):
    """Buckets that a trainer on this host has written. A `Source`.

    Args:
        keep: whether their memory is kept, so that ranks that come up later get the same: a model's size.
        gap_s: seconds without a part after which the trainer is taken for gone.
    """

    def __init__(self, keep: bool, gap_s: float = GAP_S) -> None:
        super().__init__(gap_s)
        self._keep = keep
        self._kept: list[Bucket] = []
        self._complete = False

    def lost(self) -> str:
        if not self._keep:
            return "a trainer sent them, and they were not kept"
        return "" if self._complete else "its copy is not complete"

    async def buckets(self, readers: Sequence[str] = ()) -> AsyncIterator[Bucket]:
        if self._complete:
            for bucket in self._kept:
                yield Bucket(bucket.path, bucket.size, bucket.entries)
            return
        while (bucket := await self._next()) is not None:
            if self._keep:
                self._kept.append(bucket)
                # One that whoever loads it may free.
                bucket = Bucket(bucket.path, bucket.size, bucket.entries)
            yield bucket
        self._complete = True

    def close(self) -> None:
        """Lets go of the memory, also of parts that nobody has loaded. Idempotent."""
        kept, self._kept, self._complete = self._kept, [], False
        with contextlib.suppress(asyncio.QueueEmpty):
            while True:
                part = self._coming.get_nowait()
                if isinstance(part, _Part):
                    kept.append(part.content)
        for bucket in kept:
            bucket.free()


class Relayed(_Parts):
    """What vLLM's own weight-transfer engine is told, part by part; the tensors go another way. A `Source`.

    Args:
        begin: the worker's method that begins, "start_weight_update" or that for a draft model.
    """

    def __init__(self, begin: str) -> None:
        super().__init__()
        self.begin = begin
        self.begun = asyncio.Event()
        """Set when the workers wait for the first part."""

    def lost(self) -> str:
        return "they came from the trainer through vLLM's weight-transfer engine, which gives them once"

    async def parts(self) -> AsyncIterator[Any]:
        """What the workers' `update_weights` gets."""
        while (part := await self._next()) is not None:
            yield part

    async def buckets(self, readers: Sequence[str] = ()) -> AsyncIterator[Bucket]:
        return
        yield

    def close(self) -> None:
        """Nothing is kept."""
