"""Engines held by a Python process: one measurement in a process of its own.

`run_child` starts it; `python -m benchmarks.inprocess` is the child.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from benchmarks import child
from benchmarks.common import DPLAUNCH, STOCK, Settings
from benchmarks.load import Load, prompts, tokens_per_second
from benchmarks.servers import environment, stock_environment

QUESTION = "The capital of France is"


def run_child(side: str, task: str, settings: Settings, load: Load | None = None) -> dict[str, float]:
    """Runs one measurement and returns what it measured.

    Args:
        side: "stock" or "dplaunch".
        task: "launch" (twice for dplaunch: again in the same process) or "generate".
        settings: the benchmark's.
        load: for "generate".

    Raises:
        RuntimeError: when the child fails; carries the end of its output.
    """
    asked = {
        "side": side,
        "task": task,
        "model": str(settings.model),
        "dp": settings.dp,
        "engine_args": settings.engine_args,
        "load": dataclasses.asdict(load) if load else None,
        # CLOCK_MONOTONIC is one clock for all processes of a host.
        "started": time.monotonic(),
    }
    return child.ask_child("benchmarks.inprocess", asked, stock_environment() if side == STOCK else environment())


# ---- in the child ----


def final_params(tokens: int) -> Any:
    """Greedy, exactly so many tokens, all of them in one output."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)


async def ask_engine(engine: Any, number: int, prompt: Any, tokens: int) -> int:
    """Sends one request to an AsyncLLM; returns how many tokens came."""
    generated = 0
    async for output in engine.generate(prompt, final_params(tokens), request_id=f"bench{number}"):
        generated = len(output.outputs[0].token_ids)
    return generated


def _stock_engine(question: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(
        model=question["model"],
        data_parallel_size=question["dp"],
        disable_log_stats=True,  # as in dplaunch.launch
        **question["engine_args"],
    )
    return AsyncLLM.from_engine_args(args)


async def _stock_launch(question: dict[str, Any]) -> dict[str, float]:
    called = time.monotonic()
    engine = _stock_engine(question)
    await ask_engine(engine, 0, QUESTION, 1)
    answered = time.monotonic()
    engine.shutdown()
    return {"from_start": answered - question["started"], "from_call": answered - called}


async def _stock_generate(question: dict[str, Any]) -> dict[str, float]:
    engine = _stock_engine(question)
    await ask_engine(engine, 0, QUESTION, 1)
    answered = time.monotonic()
    load = Load(**question["load"])
    rate = await tokens_per_second(load, lambda *request: ask_engine(engine, *request))
    fresh = _fresh(load)
    started = time.monotonic()
    asked = (ask_engine(engine, load.requests + at, prompt, load.tokens) for at, prompt in enumerate(fresh))
    generated = sum(await asyncio.gather(*asked))
    seconds = time.monotonic() - started
    engine.shutdown()
    return {"from_start": answered - question["started"], "engine": rate, "batch": generated / seconds}


def _dplaunch_launch(question: dict[str, Any]) -> dict[str, float]:
    first = _dplaunch_once(question)
    second = _dplaunch_once(question)
    return {"first_from_start": first[1] - question["started"], "second_from_call": second[1] - second[0]}


def _dplaunch_once(question: dict[str, Any]) -> tuple[float, float]:
    import dplaunch

    called = time.monotonic()
    with dplaunch.launch(model=question["model"], dp=question["dp"], backend="mp", **question["engine_args"]) as group:
        group.generate([QUESTION], final_params(1))
        return called, time.monotonic()


async def _dplaunch_generate(question: dict[str, Any]) -> dict[str, float]:
    import dplaunch

    load = Load(**question["load"])
    async with dplaunch.launch_async(
        model=question["model"], dp=question["dp"], backend="mp", **question["engine_args"]
    ) as group:
        engine = group.engine
        await ask_engine(engine, 0, QUESTION, 1)
        answered = time.monotonic()
        rate = await tokens_per_second(load, lambda *request: ask_engine(engine, *request))
        fresh = _fresh(load)
        started = time.monotonic()
        outputs = await group.generate(fresh, final_params(load.tokens))
        seconds = time.monotonic() - started
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"from_start": answered - question["started"], "engine": rate, "generate": generated / seconds}


def _fresh(load: Load) -> list[str]:
    """The prompts of a batch, which no engine's prefix cache holds already."""
    return [f"New: {prompt}" for prompt in prompts(load.in_batch)]


_TASKS: dict[tuple[str, str], Callable[[dict[str, Any]], dict[str, float]]] = {
    (STOCK, "launch"): lambda question: asyncio.run(_stock_launch(question)),
    (STOCK, "generate"): lambda question: asyncio.run(_stock_generate(question)),
    (DPLAUNCH, "launch"): _dplaunch_launch,
    (DPLAUNCH, "generate"): lambda question: asyncio.run(_dplaunch_generate(question)),
}


def _main() -> None:
    question = child.question()
    child.answer(_TASKS[question["side"], question["task"]](question))


if __name__ == "__main__":
    _main()
