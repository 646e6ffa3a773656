"""Groups of many stand-in ranks in one Python process: their start, what they cost when idle, a request's way, deaths.

`measure_scale` asks for it; `python -m benchmarks.scale` is the child.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import child
from benchmarks.inprocess import ask_engine
from benchmarks.servers import environment
from dplaunch import AsyncGroup, LaunchSpec
from dplaunch.events import RankState
from dplaunch.router import Router
from dplaunch.sync import new_loop
from dplaunch.testing import STANDIN_ENGINE, StandInPlan, poll_until_async

BACK_LIMIT_S = 120.0
"""Seconds until killed ranks are given up."""

IN_FLIGHT = 4
"""Requests that each rank has while the router is timed."""

ROUTED = 20000
"""How often the router is asked: a tenth of a second, so that one interruption does not count."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "max_position_embeddings": 2048,
    "vocab_size": 1024,
    "torch_dtype": "float32",
}
"""All that is read of the model: stand-ins load none."""


def measure_scale(sizes: Sequence[int], *, idle_s: float, kill: int, requests: int) -> dict[str, float]:
    """Measures groups of these sizes, one after the other, in a process of their own; the first is the cold one.

    Args:
        sizes: data-parallel ranks of each group. The first one's figures are named "cold", and only it is watched
            while idle, and loses ranks.
        idle_s: how long the first group is watched while nothing happens, seconds.
        kill: ranks of the first group that are killed at once.
        requests: one-token requests to each of the others.

    Returns:
        "cold start" (s, from the start of the process), "idle launcher" and "idle zygote" (% of a core), "killed",
        "back" (how many of these came back), "back seconds"; and for each size N but the first "N start", "N close"
        (s), "N routing" (us for the choice of a rank and its counting), "N request" (us, the median of what the data
        path does before a request is on its way).

    Raises:
        RuntimeError: when the child fails; carries the end of its output.
    """
    asked = {
        "sizes": list(sizes),
        "idle_s": idle_s,
        "kill": kill,
        "requests": requests,
        # CLOCK_MONOTONIC is one clock for all processes of a host.
        "started": time.monotonic(),
    }
    return child.ask_child("benchmarks.scale", asked, environment())


def routing_us(ranks: int, count: int = ROUTED) -> float:
    """Microseconds of CPU to choose a rank for a request, and to count its begin and its end."""
    router = Router()
    for rank in range(ranks):
        router.open(rank)
    in_flight = []
    for _ in range(IN_FLIGHT * ranks):
        in_flight.append(_route(router))
    began = time.process_time()
    for number in range(count):
        at = number % len(in_flight)
        router.end(in_flight[at])
        in_flight[at] = _route(router)
    return 1e6 * (time.process_time() - began) / count


def _route(router: Router) -> int:
    rank = router.choose()
    if rank is None:
        raise RuntimeError("no rank is open")
    router.begin(rank)
    return rank


# ---- in the child ----


async def _measure(asked: dict[str, Any]) -> dict[str, float]:
    measured: dict[str, float] = {}
    first, *others = asked["sizes"]
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        async with _group(directory, first) as group:
            measured["cold start"] = time.monotonic() - asked["started"]
            measured |= await _idle(asked["idle_s"])
            measured |= await _kill(group, asked["kill"])
        for size in others:
            measured |= await _one(directory, size, asked["requests"])
    return measured


def _group(directory: str, size: int) -> AsyncGroup:
    spec = LaunchSpec(
        model=directory,
        dp=size,
        backend="mp",
        log_dir=Path(directory) / f"logs{size}",
        engine=STANDIN_ENGINE,
        engine_args={
            "standin": StandInPlan(),
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": "float32",
            "kv_cache_memory_bytes": 2**20,
        },
    )
    return AsyncGroup(spec, quiet_vllm=True)


async def _one(directory: str, size: int, requests: int) -> dict[str, float]:
    called = time.monotonic()
    group = await _group(directory, size).open()
    try:
        start = time.monotonic() - called
        adding = await _adding_us(group, requests)
    finally:
        closing = time.monotonic()
        await group.close()
    return {
        f"{size} start": start,
        f"{size} close": time.monotonic() - closing,
        f"{size} routing": routing_us(size),
        f"{size} request": adding,
    }


async def _adding_us(group: AsyncGroup, requests: int) -> float:
    """What the data path takes for a request before it is on its way: its rank, its bookkeeping, its encoding."""
    client: Any = group.client
    times: list[float] = []
    add: Callable[[Any], None] = client.add

    def timed(request: Any) -> None:
        began = time.perf_counter()
        add(request)
        times.append(time.perf_counter() - began)

    client.add = timed
    try:
        for number in range(requests):
            await ask_engine(group.engine, number, {"prompt_token_ids": [16, 17, 18]}, 1)
    finally:
        del client.add
    return 1e6 * statistics.median(times)


async def _idle(seconds: float) -> dict[str, float]:
    launcher = psutil.Process()
    zygotes = [process for process in launcher.children() if "zygote" in " ".join(process.cmdline())]
    # What the start left to be done is not the idle group's.
    await asyncio.sleep(1.0)
    before, began = [_cpu_s(process) for process in (launcher, *zygotes)], time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    used = [_cpu_s(process) - earlier for process, earlier in zip((launcher, *zygotes), before, strict=True)]
    return {"idle launcher": 100 * used[0] / took, "idle zygote": 100 * sum(used[1:]) / took}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def _kill(group: AsyncGroup, count: int) -> dict[str, float]:
    doomed = group.supervisor.ranks[:count]
    killed = time.monotonic()
    for rank in doomed:
        if rank.handle is not None and rank.handle.pid is not None:
            os.kill(rank.handle.pid, signal.SIGKILL)

    def back() -> int:
        return sum(rank.state is RankState.READY and rank.identity.incarnation > 0 for rank in doomed)

    await poll_until_async(lambda: back() == count, timeout_s=BACK_LIMIT_S, what="the killed ranks are back")
    return {"killed": count, "back": back(), "back seconds": time.monotonic() - killed}


def _main() -> None:
    asked = child.question()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        child.answer(runner.run(_measure(asked)))


if __name__ == "__main__":
    _main()
