"""A closed loop of clients: each sends its next request when its last one is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Ask = Callable[[int, str, int], Awaitable[int]]
"""Sends request number N with a prompt and a number of tokens to generate; returns how many came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much is asked.

    Args:
        clients: requests in flight at any time.
        requests: in all.
        tokens: generated for each request.
        batch: prompts of a batch, all of them asked at once; None for as many as `requests`.
    """

    clients: int
    requests: int
    tokens: int
    batch: int | None = None

    @property
    def in_batch(self) -> int:
        """How many prompts a batch has."""
        return self.requests if self.batch is None else self.batch


FULL = Load(clients=16, requests=96, tokens=64)
QUICK = Load(clients=8, requests=16, tokens=16)

_SUBJECTS = ("rivers", "bridges", "the moon", "bread", "chess", "whales", "glass", "maps")


def prompts(count: int) -> list[str]:
    """Prompts that differ from the first word on, so that no cached prefix answers for another."""
    return [f"{number} facts about {_SUBJECTS[number % len(_SUBJECTS)]}:" for number in range(count)]


async def tokens_per_second(load: Load, ask: Ask) -> float:
    """Runs the load after one warm-up request a client; returns generated tokens per second."""
    await asyncio.gather(*(ask(-1 - number, "Warm up.", 4) for number in range(load.clients)))
    waiting = list(enumerate(prompts(load.requests)))

    async def client() -> int:
        generated = 0
        while waiting:
            number, prompt = waiting.pop(0)
            generated += await ask(number, prompt, load.tokens)
        return generated

    started = time.monotonic()
    totals = await asyncio.gather(*(client() for _ in range(load.clients)))
    return sum(totals) / (time.monotonic() - started)


async def http_tokens_per_second(load: Load, address: str, model: str) -> float:
    """The load through /v1/completions."""
    import aiohttp

    unlimited = aiohttp.ClientTimeout(total=None)
    # aiohttp's own bound of 100 connections would be the load's.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, timeout=unlimited, connector=connector) as session:

        async def ask(number: int, prompt: str, tokens: int) -> int:
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            async with session.post("/v1/completions", json=body) as response:
                response.raise_for_status()
                return int((await response.json())["usage"]["completion_tokens"])

        return await tokens_per_second(load, ask)
