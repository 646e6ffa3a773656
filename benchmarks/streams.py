"""Streaming clients that note when each piece of an answer came, and what that says about a rank's death."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.load import prompts

RANK_HEADER = "X-data-parallel-rank"
"""vLLM's HTTP header that pins a request to a rank (vllm/entrypoints/generate/base/serving.py)."""

DONE = "[DONE]"


@dataclass(slots=True)
class Stream:
    """One streamed answer as its client saw it; times are monotonic seconds.

    Args:
        prompt: the number of its prompt.
        began: when it was sent.
        pieces: what came, event by event. A server that cannot keep up puts several tokens into one.
        arrivals: when each came.
        counts: how many tokens had come by then.
    """

    prompt: int
    began: float
    pieces: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ended: float = math.inf
    error: str = ""

    @property
    def text(self) -> str:
        """All that came."""
        return "".join(self.pieces)

    def in_flight(self, at: float) -> bool:
        """Whether it had begun and not ended at that time."""
        return self.began <= at < self.ended

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds from each token to the next, where both came in that span; those of one event share its time."""
        found: list[float] = []
        events = zip(self.arrivals, self.counts, strict=True)
        for (earlier, before), (later, after) in itertools.pairwise(events):
            if start <= earlier and later <= end and after > before:
                found += [(later - earlier) / (after - before)] * (after - before)
        return found

    def pause(self, at: float) -> float:
        """Seconds from the last sign of life before that time to the first after it; 0 if there is none after."""
        after = [arrival for arrival in self.arrivals if arrival > at]
        before = [arrival for arrival in self.arrivals if arrival <= at]
        return after[0] - (before[-1] if before else self.began) if after else 0.0


class Clients:
    """A closed loop of streaming clients: each sends its next request when its last one has ended.

    Args:
        address: the server's.
        model: its name in requests.
        clients: requests in flight at any time.
        questions: how many different prompts there are; they are asked in turn, again and again.
        tokens: generated for each.
    """

    def __init__(self, address: str, model: str, *, clients: int, questions: int, tokens: int) -> None:
        self._session = aiohttp.ClientSession(
            address, timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0)
        )
        self._model = model
        self._clients = clients
        self._prompts = prompts(questions)
        self._tokens = tokens

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def once(self) -> list[Stream]:
        """Every prompt once, with as many at a time as there are clients."""
        left = iter(range(len(self._prompts)))
        streams: list[Stream] = []

        async def client() -> None:
            for number in left:
                await self._ask(number, streams)

        await asyncio.gather(*(client() for _ in range(self._clients)))
        return streams

    @contextlib.asynccontextmanager
    async def steadily(self, rank: int | None = None) -> AsyncIterator[list[Stream]]:
        """The load for as long as the block runs; at its end each request may finish. Yields the streams so far.

        A client whose request failed sends no more: its server may be gone.

        Args:
            rank: pins every request to a rank.
        """
        streams: list[Stream] = []
        numbers = itertools.count()
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                stream = await self._ask(next(numbers) % len(self._prompts), streams, rank)
                if stream.error:
                    return

        tasks = [asyncio.create_task(client()) for _ in range(self._clients)]
        try:
            yield streams
            stop.set()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def answers(self, rank: int) -> bool:
        """Whether a rank answers a request of one token that is pinned to it."""
        probe = await self._ask(0, [], rank, tokens=1)
        return not probe.error

    async def _ask(
        self, number: int, streams: list[Stream], rank: int | None = None, *, tokens: int | None = None
    ) -> Stream:
        stream = Stream(number, time.monotonic())
        streams.append(stream)
        body = {
            "model": self._model,
            "prompt": self._prompts[number],
            "max_tokens": self._tokens if tokens is None else tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        headers = {} if rank is None else {RANK_HEADER: str(rank)}
        try:
            async with self._session.post("/v1/completions", json=body, headers=headers) as response:
                if response.status != 200:
                    stream.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                else:
                    await _read(response.content, stream)
        except (aiohttp.ClientError, ConnectionError) as error:
            stream.error = f"{type(error).__name__}: {error}"
        stream.ended = time.monotonic()
        return stream


async def _read(lines: aiohttp.StreamReader, stream: Stream) -> None:
    """Takes the server-sent events of one answer; it is an error if they end before the answer does."""
    reason = None
    async for line in lines:
        data = line.decode().strip().removeprefix("data: ")
        if not data:
            continue
        if data == DONE:
            break
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            stream.error = str(event["error"])[:200]
            return
        for choice in event["choices"]:
            stream.pieces.append(choice["text"])
            stream.arrivals.append(time.monotonic())
            stream.counts.append(event["usage"]["completion_tokens"])
            reason = choice["finish_reason"] or reason
    if reason != "length":
        stream.error = f"the answer ended with {reason}, not at its length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """What the clients saw of a rank's death.

    Args:
        in_flight: requests at the moment of the kill.
        failed: of those.
        failed_later: of those that were sent after it.
        compared: finished requests whose text is known.
        differ: of those, how many texts are not the known one.
        pause_s: the longest that a stream in flight at the kill stood still over it.
        before_s: the median between two pieces before the kill.
        during_s: the same while one rank served alone.
    """

    in_flight: int
    failed: int
    failed_later: int
    compared: int
    differ: int
    pause_s: float
    before_s: float
    during_s: float


def judge(streams: Sequence[Stream], known: Sequence[Stream], start: float, killed: float, back: float) -> Death:
    """What happened to the streams of a run.

    While a rank is gone every piece comes from the one that is left, so the gaps between pieces that came after
    the kill and before the return are the survivor's; those before are of both, which have the same load.

    Args:
        streams: of the run.
        known: of the undisturbed one.
        start: when the load was steady, monotonic seconds.
        killed: when the rank was killed.
        back: when it answered again.
    """
    texts = {stream.prompt: stream.text for stream in known}
    caught = [stream for stream in streams if stream.in_flight(killed)]
    finished = [stream for stream in streams if not stream.error and stream.ended < math.inf]
    return Death(
        in_flight=len(caught),
        failed=sum(bool(stream.error) for stream in caught),
        failed_later=sum(bool(stream.error) for stream in streams if stream.began > killed),
        compared=len(finished),
        differ=sum(stream.text != texts[stream.prompt] for stream in finished),
        pause_s=max((stream.pause(killed) for stream in caught), default=0.0),
        before_s=median_gap(streams, start, killed),
        during_s=median_gap(streams, killed, back),
    )


def median_gap(streams: Sequence[Stream], start: float, end: float) -> float:
    """The median between two pieces of a stream in that span, seconds; 0 where there are none."""
    gaps = [gap for stream in streams for gap in stream.gaps(start, end)]
    return statistics.median(gaps) if gaps else 0.0
