"""Tokens per second, dplaunch beside stock with one frontend each (`python -m benchmarks.gpu.throughput`).

A small and a larger dense model with made-up weights, over HTTP and in process; each executor; one rank and all of
them, with the same load for each rank. `--only small-group,small-stock,small-http-dplaunch,small-http-stock` is a
call of its own, the same with `large-` another.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine
from typing import Any

from benchmarks.common import DPLAUNCH, STOCK, Comparison
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Script, Step
from benchmarks.inprocess import ask_engine, final_params, run_child
from benchmarks.load import Load, http_tokens_per_second, prompts, tokens_per_second
from benchmarks.servers import SERVED_NAME, dplaunch_server, stock_server
from dplaunch.sync import new_loop

UNIT = "tokens/s"

CLIENTS, REQUESTS, TOKENS = 256, 1024, 128
"""For each rank: in flight at a time, in all; and generated for each request."""

MODELS = ("small", "large")


def load_of(setup: Setup, dp: int) -> Load:
    """The load of a group: as much for each rank, however many there are."""
    if setup.cpu:
        return Load(clients=4 * dp, requests=8 * dp, tokens=8)
    return Load(clients=CLIENTS * dp, requests=REQUESTS * dp, tokens=TOKENS)


def in_group(name: str) -> Callable[[Setup, Notes], None]:
    """A step: dplaunch in one process, launch after launch: each executor with all ranks, then one rank."""

    def run(setup: Setup, notes: Notes) -> None:
        cases = [("mp", setup.dp), ("mp", 1), ("uni", setup.dp)]
        for executor, dp in dict.fromkeys(cases):
            label = f"{name} {executor} dp={'all' if dp == setup.dp else dp}"
            work = functools.partial(_measure, setup, notes, name, executor, dp, label)
            notes.attempt(label, functools.partial(_in_a_loop, work))

    return run


def _in_a_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work())


async def _measure(setup: Setup, notes: Notes, name: str, executor: str, dp: int, label: str) -> None:
    import dplaunch

    settings, load = setup.settings(name, dp=dp), load_of(setup, dp)
    called = time.monotonic()
    async with dplaunch.launch_async(
        model=str(settings.model), dp=dp, executor=executor, **settings.engine_args
    ) as group:
        notes.value(f"{label}: ready after", time.monotonic() - called)
        rate = await tokens_per_second(load, lambda *request: ask_engine(group.engine, *request))
        notes.value(f"{label} engine", rate, UNIT)
        # Not what the engine's prefix cache already holds.
        fresh = [f"New: {prompt}" for prompt in prompts(load.requests)]
        began = time.monotonic()
        outputs = await group.generate(fresh, final_params(load.tokens), progress=False)
        generated = sum(len(output.outputs[0].token_ids) for output in outputs)
        notes.value(f"{label} generate", generated / (time.monotonic() - began), UNIT)


def stock_engine(name: str) -> Callable[[Setup, Notes], None]:
    """A step: stock's AsyncLLM over all ranks."""

    def run(setup: Setup, notes: Notes) -> None:
        measured = run_child(STOCK, "generate", setup.settings(name), load_of(setup, setup.dp))
        notes.value(f"{name} stock engine", measured["engine"], UNIT)

    return run


def over_http(name: str, side: str) -> Callable[[Setup, Notes], None]:
    """A step: one server with one frontend."""

    def run(setup: Setup, notes: Notes) -> None:
        serve = stock_server if side == STOCK else dplaunch_server
        with serve(setup.settings(name)) as (server, seconds):
            notes.value(f"{name} {side} http: first answer after", seconds)
            rate = asyncio.run(http_tokens_per_second(load_of(setup, setup.dp), server.address, SERVED_NAME))
            notes.value(f"{name} {side} http", rate, UNIT)

    return run


def _compare(title: str, base: str, ours: str, goal: float | None = None) -> Comparison:
    return Comparison(title=title, unit=UNIT, base=base, ours=ours, goal=goal, more_is_better=True)


def _comparisons(name: str) -> list[Comparison]:
    return [
        _compare(f"{name} over HTTP, over stock", f"{name} stock http", f"{name} dplaunch http", 1.0),
        _compare(f"{name} in process, over stock", f"{name} stock engine", f"{name} mp dp=all engine", 1.0),
        _compare(f"{name} generate, over stock's engine", f"{name} stock engine", f"{name} mp dp=all generate", 1.0),
        _compare(f"{name} executor mp over uni", f"{name} uni dp=all engine", f"{name} mp dp=all engine"),
        _compare(f"{name} all ranks over one", f"{name} mp dp=1 engine", f"{name} mp dp=all engine"),
        _compare(f"{name} all ranks over one, generate", f"{name} mp dp=1 generate", f"{name} mp dp=all generate"),
    ]


def _steps(name: str, slow: float) -> list[Step]:
    return [
        Step(name=f"{name}-group", run=in_group(name), limit_s=240 * slow),
        Step(name=f"{name}-stock", run=stock_engine(name), limit_s=200 * slow),
        Step(name=f"{name}-http-dplaunch", run=over_http(name, DPLAUNCH), limit_s=120 * slow),
        Step(name=f"{name}-http-stock", run=over_http(name, STOCK), limit_s=200 * slow),
    ]


SCRIPT = Script(
    "throughput",
    __doc__,
    [*_steps("small", 1.0), *_steps("large", 1.5)],
    [line for name in MODELS for line in _comparisons(name)],
)

if __name__ == "__main__":
    SCRIPT.main()
