"""Engines held by a Python process: one measurement in a process of its own.

`run_child` starts it; `python -m benchmarks.inprocess` is the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import child
from benchmarks.common import DPLAUNCH, STOCK, Settings
from benchmarks.load import Load, prompts, tokens_per_second
from benchmarks.servers import environment, stock_environment

QUESTION = "The capital of France is"

BATCH = {STOCK: "batch", DPLAUNCH: "generate"}
"""What the rate of a batch is called."""


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
    asked = {"task": task, **_asked(side, settings, load)}
    return child.ask_child("benchmarks.inprocess", asked, _environment(side))


def start_child(side: str, settings: Settings, load: Load, executor: str | None = None) -> child.Child:
    """Starts an engine in a process of its own, to be asked for the load again and again.

    Its first answer says after how many seconds it was there ("from_start"). To "engine" and to "batch" it answers with
    tokens/s ("rate"), and how many cores its frontend used ("cores").

    Args:
        side: "stock" or "dplaunch".
        settings: the benchmark's.
        load: what its engine gets to do.
        executor: dplaunch's; None for what it chooses.
    """
    asked = {"task": "serve", **_asked(side, settings, load, executor)}
    return child.Child("benchmarks.inprocess", asked, _environment(side))


def _asked(side: str, settings: Settings, load: Load | None = None, executor: str | None = None) -> dict[str, Any]:
    return {
        "side": side,
        "model": str(settings.model),
        "dp": settings.dp,
        "engine_args": settings.engine_args,
        "load": dataclasses.asdict(load) if load else None,
        "executor": executor or "auto",
        # CLOCK_MONOTONIC is one clock for all processes of a host.
        "started": time.monotonic(),
    }


def _environment(side: str) -> dict[str, str]:
    return stock_environment() if side == STOCK else environment()


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


@dataclass(frozen=True, slots=True)
class _Engine:
    """An engine that has answered.

    Args:
        llm: an AsyncLLM.
        batch: generates so many tokens for each prompt of a batch; returns how many came in all.
        called: when it was asked to start, by the monotonic clock.
        answered: when it had answered first.
    """

    llm: Any
    batch: Callable[[Sequence[str], int], Awaitable[int]]
    called: float
    answered: float


@contextlib.asynccontextmanager
async def _engine(question: dict[str, Any]) -> AsyncIterator[_Engine]:
    """The engine that was asked for; it is ended at the end."""
    opened = _stock_engine if question["side"] == STOCK else _dplaunch_engine
    called = time.monotonic()
    async with opened(question) as (llm, batch):
        await ask_engine(llm, 0, QUESTION, 1)
        yield _Engine(llm, batch, called, time.monotonic())


_Opened = tuple[Any, Callable[[Sequence[str], int], Awaitable[int]]]


@contextlib.asynccontextmanager
async def _stock_engine(question: dict[str, Any]) -> AsyncIterator[_Opened]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(
        model=question["model"],
        data_parallel_size=question["dp"],
        disable_log_stats=True,  # as in dplaunch.launch
        **question["engine_args"],
    )
    llm = AsyncLLM.from_engine_args(args)

    async def batch(asked: Sequence[str], tokens: int) -> int:
        """All at once, which is what one does there."""
        numbered = (ask_engine(llm, 1 + at, prompt, tokens) for at, prompt in enumerate(asked))
        return sum(await asyncio.gather(*numbered))

    try:
        yield llm, batch
    finally:
        llm.shutdown()


@contextlib.asynccontextmanager
async def _dplaunch_engine(question: dict[str, Any]) -> AsyncIterator[_Opened]:
    import dplaunch

    async with dplaunch.launch_async(
        model=question["model"],
        dp=question["dp"],
        backend="mp",
        executor=question["executor"],
        **question["engine_args"],
    ) as group:

        async def batch(asked: Sequence[str], tokens: int) -> int:
            outputs = await group.generate(asked, final_params(tokens))
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        yield group.engine, batch


async def _rate_of_engine(engine: _Engine, load: Load) -> float:
    """Tokens/s of clients that each wait for their answer."""
    return await tokens_per_second(load, lambda *request: ask_engine(engine.llm, *request))


async def _rate_of_batch(engine: _Engine, load: Load, name: str = "New") -> float:
    """Tokens/s of a batch; `name` makes its prompts others than those of other batches."""
    # No engine's prefix cache holds them already.
    fresh = [f"{name}: {prompt}" for prompt in prompts(load.in_batch)]
    started = time.monotonic()
    generated = await engine.batch(fresh, load.tokens)
    return generated / (time.monotonic() - started)


async def _stock_launch(question: dict[str, Any]) -> dict[str, float]:
    async with _engine(question) as engine:
        return {
            "from_start": engine.answered - question["started"],
            "from_call": engine.answered - engine.called,
        }


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


async def _generate(question: dict[str, Any]) -> dict[str, float]:
    load = Load(**question["load"])
    async with _engine(question) as engine:
        return {
            "from_start": engine.answered - question["started"],
            "engine": await _rate_of_engine(engine, load),
            BATCH[question["side"]]: await _rate_of_batch(engine, load),
        }


async def _serve(question: dict[str, Any]) -> None:
    load, asked = Load(**question["load"]), child.Questions()
    async with _engine(question) as engine:
        asked.answer({"from_start": engine.answered - question["started"]})
        number = 0
        async for what in asked:
            number += 1
            began, used = time.monotonic(), time.process_time()
            if what == "engine":
                rate = await _rate_of_engine(engine, load)
            else:
                rate = await _rate_of_batch(engine, load, f"New {number}")
            asked.answer({"rate": rate, "cores": (time.process_time() - used) / (time.monotonic() - began)})


def _main() -> None:
    question = child.question()
    match question["task"]:
        case "serve":
            asyncio.run(_serve(question))
        case "generate":
            child.answer(asyncio.run(_generate(question)))
        case _ if question["side"] == STOCK:
            child.answer(asyncio.run(_stock_launch(question)))
        case _:
            child.answer(_dplaunch_launch(question))


if __name__ == "__main__":
    _main()
