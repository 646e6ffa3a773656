"""An mp group and a Ray group side by side in one process, asked in turn.

`measure_dispatch` asks for it; `python -m benchmarks.dispatch` is the child. Both groups live all the time, and
their blocks alternate within seconds: what else the machine does, the frontend's process and the cores are the same
for both. The price is that Ray's own processes run beside mp's blocks too, so what they take is measured with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import child
from benchmarks.common import Settings
from benchmarks.inprocess import ask_engine
from benchmarks.load import Load, prompts, tokens_per_second
from benchmarks.servers import environment
from dplaunch import AsyncGroup, LaunchSpec
from dplaunch.seam.rank import REPORT
from dplaunch.spec import VLLM_ENGINE
from dplaunch.sync import new_loop
from dplaunch.testing import STANDIN_ENGINE, StandInPlan

BACKENDS = ("mp", "ray")

_RAYS_OWN = re.compile(r"(^|/)ray(let|::|/)|gcs_server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much is asked of each backend, in blocks that alternate.

    Args:
        requests: one at a time, one token each.
        calls: bare round trips, one at a time: a utility call, which no scheduler or model delays.
        blocks: the number of blocks that requests and calls are split into, and of full loads; even.
        load: at full concurrency, in each block.
    """

    requests: int
    calls: int
    blocks: int
    load: Load


def measure_dispatch(standin: bool, first: str, amount: Amount, settings: Settings) -> dict[str, float]:
    """Measures both backends in one process.

    Args:
        standin: with engines that answer at once in place of vLLM.
        first: the backend whose group is started first.
        amount: how much is asked.
        settings: the benchmark's.

    Returns:
        For each backend, by "mp ..." and "ray ...": "latency" (ms, the median of all requests), "p95" (ms), "call"
        (us, the median of all calls), "rate" (tokens/s, the median of the blocks). And "ray own cpu", the share of one
        core (%) that Ray's processes took.

    Raises:
        RuntimeError: when the child fails; carries the end of its output.
    """
    asked = {
        "standin": standin,
        "order": [first, *(name for name in BACKENDS if name != first)],
        "amount": asdict(amount),
        "model": str(settings.model),
        "dp": settings.dp,
        "engine_args": settings.engine_args,
    }
    return child.ask_child("benchmarks.dispatch", asked, environment())


def turns(names: Sequence[str], blocks: int) -> Iterator[str]:
    """Whose block is next: there and back again (A B, B A), so that a drift of the machine favours nobody."""
    for block in range(blocks):
        yield from reversed(names) if block % 2 else names


# ---- in the child ----


async def _measure(asked: dict[str, Any]) -> dict[str, float]:
    amount = Amount(**{**asked["amount"], "load": Load(**asked["amount"]["load"])})
    async with contextlib.AsyncExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        groups: dict[str, AsyncGroup] = {}
        for backend in asked["order"]:
            group = AsyncGroup(_spec(asked, backend, logs / backend), quiet_vllm=True)
            groups[backend] = await stack.enter_async_context(group)
        before, began = _rays_cpu_s(), time.monotonic()
        measured = await _ask_all(groups, amount, tokens=bool(asked["standin"]))
        measured["ray own cpu"] = 100 * (_rays_cpu_s() - before) / (time.monotonic() - began)
    return measured


def _spec(asked: dict[str, Any], backend: str, logs: Path) -> LaunchSpec:
    engine_args = dict(asked["engine_args"])
    if asked["standin"]:
        engine_args |= {"standin": StandInPlan(), "skip_tokenizer_init": True}
    return LaunchSpec(
        model=asked["model"],
        dp=asked["dp"],
        backend=backend,
        log_dir=logs,
        engine=STANDIN_ENGINE if asked["standin"] else VLLM_ENGINE,
        engine_args=engine_args,
    )


async def _ask_all(groups: dict[str, AsyncGroup], amount: Amount, *, tokens: bool) -> dict[str, float]:
    order = list(groups)
    latencies: dict[str, list[float]] = {name: [] for name in order}
    calls: dict[str, list[float]] = {name: [] for name in order}
    rates: dict[str, list[float]] = {name: [] for name in order}
    warm_up, sizes = amount.load.clients, (amount.requests // amount.blocks, amount.calls // amount.blocks)
    for name in order:
        await _latencies(groups[name], _prompts(warm_up, tokens))
    asked = dict.fromkeys(order, 0)
    for name in turns(order, amount.blocks):
        start = asked[name]
        asked[name] += sizes[0]
        latencies[name] += await _latencies(groups[name], _prompts(amount.requests, tokens)[start : asked[name]])
        calls[name] += await _calls(groups[name], sizes[1])
    for name in turns(order, amount.blocks):
        ask = functools.partial(_ask, groups[name].engine, tokens)
        rates[name].append(await tokens_per_second(amount.load, ask))
    return {
        f"{name} {what}": value
        for name in order
        for what, value in {
            "latency": 1e3 * statistics.median(latencies[name]),
            "p95": 1e3 * statistics.quantiles(latencies[name], n=20)[-1],
            "call": 1e6 * statistics.median(calls[name]),
            "rate": statistics.median(rates[name]),
        }.items()
    }


async def _latencies(group: AsyncGroup, batch: Sequence[Any]) -> list[float]:
    engine = group.engine
    return [await _timed(functools.partial(ask_engine, engine, at, one, 1)) for at, one in enumerate(batch)]


async def _calls(group: AsyncGroup, count: int) -> list[float]:
    ranks = group.client.ranks
    return [await _timed(functools.partial(group.call, REPORT, rank=ranks[at % len(ranks)])) for at in range(count)]


async def _timed(work: Callable[[], Awaitable[Any]]) -> float:
    started = time.perf_counter()
    await work()
    return time.perf_counter() - started


async def _ask(engine: Any, tokens: bool, number: int, prompt: str, wanted: int) -> int:
    return await ask_engine(engine, number, _as_tokens(prompt) if tokens else prompt, wanted)


def _prompts(count: int, tokens: bool) -> list[Any]:
    return [_as_tokens(prompt) if tokens else prompt for prompt in prompts(count)]


def _as_tokens(prompt: str) -> dict[str, list[int]]:
    """A stand-in has no tokenizer, and the frontend none for it: any ids do."""
    return {"prompt_token_ids": [16 + byte for byte in prompt.encode()]}


def _rays_cpu_s() -> float:
    """CPU seconds that Ray's processes below this one have taken: those that hold the cluster and the ranks' places."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if _RAYS_OWN.search(" ".join(process.cmdline()[:3])):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def _main() -> None:
    asked = child.question()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        child.answer(runner.run(_measure(asked)))


if __name__ == "__main__":
    _main()
