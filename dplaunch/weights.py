"""What weights the ranks of a group should have, and how a rank gets them: the word on what is stale.

Consulted where a rank comes up (`dplaunch.arrivals`), and by every change of a group that runs (`dplaunch.updating`,
`dplaunch.standstill`, `dplaunch.adapters`). It knows ranks and calls them; what becomes of one
that fails is for others to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dplaunch.bucket import Bucket, Landmark
from dplaunch.client import GroupClient
from dplaunch.errors import GroupDeadError, WeightsError
from dplaunch.hosts import Failures, Hosts
from dplaunch.rank import Rank
from dplaunch.seam import weights as seam
from dplaunch.transfer import Relayed
from dplaunch.weight_source import Initial, Source

FIRST_VERSION = "0"
"""The version of the weights that ranks are started with."""

LAG_S = 30.0
"""Seconds that ranks may take longer than the first of them for the same step, beside four times as long as it."""


class Stance(enum.StrEnum):
    """What a group that runs is about."""

    SERVING = "serving"  # requests are answered
    PAUSED = "paused"  # requests wait
    ASLEEP = "asleep"  # requests wait, and the device's memory is free


class Weights:
    """Lives in the group's event loop.

    Args:
        client: calls ranks.
        alike: whether all ranks hold the same; with expert parallelism each has experts of its own.
    """

    def __init__(self, client: GroupClient, *, alike: bool = True) -> None:
        self.alike = alike
        self.version = FIRST_VERSION
        self._checksums: Mapping[int, str] = {}
        self.number = 0
        """Of the current weights; a rank's `weights` is that of what it has."""
        self.source: Source = Initial()
        self.loras: dict[str, Any] = {}
        """The adapters that every rank should have loaded, by name: vLLM's LoRARequest."""
        self.stance = Stance.SERVING
        self.level = 0
        """How deep the group sleeps, as vLLM counts it."""
        self.lock = asyncio.Lock()
        """Held while any of these changes, and while a rank that comes up is brought to them."""
        self._client = client
        self._landmark: Landmark | None = None

    def has_changed(self) -> bool:
        """Whether a rank that was just started is anything but what the group is."""
        return bool(self.number or self.loras) or self.stance is not Stance.SERVING

    async def load(
        self,
        ranks: Sequence[Rank],
        source: Source,
        *,
        deadline: float | None = None,
        verify: bool = True,
        touch: Callable[[], None] = lambda: None,
    ) -> Failures:
        """Has ranks load weights, side by side; each bucket is written once, and freed when all have read it.

        Args:
            ranks: which.
            source: what.
            deadline: monotonic time, seconds.
            verify: whether checksums of them will be asked for.
            touch: called before the first of them changes.

        Returns the ranks that did not get them.

        Raises:
            WeightsError: when the source fails.
        """
        if source.path is not None or isinstance(source, Initial):
            touch()
            return (await self.ask_all(ranks, seam.RELOAD, source.path, deadline=deadline))[1]
        if isinstance(source, Relayed):
            touch()
            return await self._relay(ranks, source, deadline)
        hosts = await Hosts.find(self.ask_all, ranks, self._mark(), deadline)
        async with contextlib.aclosing(_told(source, hosts.readers(ranks))) as buckets:
            first = await anext(buckets, None)
            if first is None:
                raise WeightsError("there are no weights in what was given", hint="Give (name, tensor) pairs.")
            bucket: Bucket | None = first
            try:
                touch()
                failed = (await self.ask_all(ranks, seam.BEGIN, verify, deadline=deadline))[1]
                while bucket is not None and len(failed) < len(ranks):
                    left = [rank for rank in ranks if rank not in failed]
                    failed |= await hosts.load(self.ask_all, left, bucket, deadline)
                    bucket.free()
                    bucket = await anext(buckets, None)
            finally:
                if bucket is not None:
                    bucket.free()
        left = [rank for rank in ranks if rank not in failed]
        return failed | (await self.ask_all(left, seam.END, deadline=deadline))[1]

    async def _relay(self, ranks: Sequence[Rank], source: Relayed, deadline: float | None) -> Failures:
        """Has vLLM's own weight-transfer engines take what a trainer sends them."""

        async def of_workers(method: str, **arguments: Any) -> None:
            left = [rank for rank in ranks if rank not in failed]
            call: tuple[Any, ...] = (seam.OF_WORKERS, method, None, [], arguments)
            failed.update((await self.ask_all(left, *call, deadline=deadline))[1])

        failed: Failures = {}
        await of_workers(source.begin)
        source.begun.set()
        async with contextlib.aclosing(source.parts()) as parts:  # type: ignore[type-var]
            async for part in parts:
                await of_workers("update_weights", update_info=part)
                if len(failed) == len(ranks):
                    return failed
        await of_workers("finish_weight_update")
        return failed

    def _mark(self) -> Landmark:
        if self._landmark is None:
            self._landmark = Landmark()
        return self._landmark

    @property
    def checksum(self) -> str:
        """Of the current weights: in a rank's memory or, where each has its own, of all; "" where nobody has asked."""
        told = set(self._checksums.values())
        if len(told) <= 1:
            return next(iter(told), "")
        return hashlib.sha256(repr(sorted(self._checksums.items())).encode()).hexdigest()

    def checksum_of(self, rank: int) -> str:
        """Of the current weights in this rank's memory; "" where that is not known."""
        return self.checksum if self.alike else self._checksums.get(rank, "")

    def commit(self, source: Source, version: str, checksums: Mapping[int, str]) -> None:
        """These are the group's weights from now on; `checksums` are those that ranks told of, by their numbers."""
        before, self.source = self.source, source
        before.close()
        self.version, self._checksums = version, checksums
        self.number += 1

    def close(self) -> None:
        """Lets go of everything that is kept. Idempotent."""
        self.source.close()
        if self._landmark is not None:
            self._landmark.close()
            self._landmark = None

    # Calls.

    async def ask_all(
        self, ranks: Sequence[Rank], method: str, *args: Any, deadline: float | None = None
    ) -> tuple[dict[Rank, Any], Failures]:
        """Calls ranks side by side: what each answered, and why the others did not.

        One that hangs must not use up the time of all: when the first has answered, the others have `LAG_S`.
        """
        began = time.monotonic()
        tasks = {asyncio.ensure_future(self.ask(rank, method, *args, deadline=deadline)): rank for rank in ranks}
        waiting, limit = set(tasks), float("inf")
        try:
            while waiting and (now := time.monotonic()) < limit:
                timeout = None if limit == float("inf") else limit - now
                done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if limit == float("inf") and any(task.exception() is None for task in done):
                    limit = time.monotonic() + LAG_S + 4 * (time.monotonic() - began)
        finally:
            for task in waiting:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        answers: dict[Rank, Any] = {}
        failed: Failures = {}
        for rank, result in zip(tasks.values(), results, strict=True):
            if isinstance(result, asyncio.CancelledError):
                failed[rank] = TimeoutError(f"rank {rank.identity.rank} did not acknowledge in time")
            elif isinstance(result, Exception):
                failed[rank] = result
            elif isinstance(result, BaseException):
                raise result
            else:
                answers[rank] = result
        return answers, failed

    async def ask(self, rank: Rank, method: str, *args: Any, deadline: float | None = None) -> Any:
        """Calls a utility method of a rank, in routing or not.

        Raises:
            GroupDeadError: when the rank ends first.
            TimeoutError: when it has not answered at the deadline.
            RuntimeError: when the method fails.
        """
        number = rank.identity.rank
        if rank.link is None or rank.handle is None:
            raise GroupDeadError(f"rank {number} is not running")
        call = asyncio.ensure_future(self._client.call_link(rank.link, method, *args))
        ended = asyncio.ensure_future(rank.handle.wait())
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            await asyncio.wait((call, ended), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                return call.result()
            if ended.done():
                raise GroupDeadError(f"rank {number} died meanwhile: {ended.result()}")
            raise TimeoutError(f"rank {number} did not acknowledge in time")
        finally:
            call.cancel()
            ended.cancel()


async def _told(source: Source, readers: Sequence[str]) -> Any:
    """A source's buckets; what it fails with is told as an error of the weights."""
    try:
        async with contextlib.aclosing(source.buckets(readers)) as buckets:  # type: ignore[type-var]
            async for bucket in buckets:
                yield bucket
    except WeightsError:
        raise
    except Exception as error:
        words = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        raise WeightsError(f"the weights could not be read: {words}") from error
