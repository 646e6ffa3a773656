"""One batch of skewed answer lengths over a group's ranks, dispatched in two ways: one measurement in a child process.

`measure_batches` asks for it; `python -m benchmarks.batches` is the child. Both ways ask the same group for the same
number of tokens, one after the other, so the engines, the frontend and the cores are the same for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import child
from benchmarks.common import Settings
from benchmarks.inprocess import final_params
from benchmarks.load import prompts
from benchmarks.servers import environment
from dplaunch import AsyncGroup, LaunchSpec
from dplaunch.rank_env import blocks
from dplaunch.spec import VLLM_ENGINE
from dplaunch.sync import new_loop
from dplaunch.testing import STANDIN_ENGINE, StandInPlan

SHORTEST, LONGEST = 8, 512
"""Tokens of an answer, at least and at most."""

MEDIAN, SIGMA, WITHIN_TASK = 56, 1.2, 0.5
"""Of the log-normal distribution of answer lengths; and how far those of one task are spread."""

TASKS = 8

CHANGED = 0.3
"""How far answers differ when the same prompts are asked again, of other weights: sigma, log-normal too."""

LOOK_S = 0.01
"""Seconds between two looks at whether each rank has something to do."""

WAYS = ("chunks", "dplaunch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much is asked.

    Args:
        prompts: in the batch.
        max_num_seqs: sequences that a rank runs at a time.
        step_s: seconds of a step of a stand-in engine, as long however many sequences run: like a device's.
    """

    prompts: int
    max_num_seqs: int
    step_s: float = 0.0


def shuffled(count: int, chance: random.Random) -> list[int]:
    """Answer lengths in any order."""
    return [_length(chance.gauss(math.log(MEDIAN), SIGMA)) for _ in range(count)]


def by_task(count: int, chance: random.Random) -> list[int]:
    """The same distribution, but the prompts of a task stand together and their answers are alike."""
    between = math.sqrt(SIGMA**2 - WITHIN_TASK**2)
    lengths: list[int] = []
    for block in blocks(range(count), TASKS):
        middle = chance.gauss(math.log(MEDIAN), between)
        lengths += [_length(chance.gauss(middle, WITHIN_TASK)) for _ in block]
    return lengths


def longest_first(count: int, chance: random.Random) -> list[int]:
    """The same, sorted."""
    return sorted(shuffled(count, chance), reverse=True)


ORDERS = {"by task": by_task, "longest first": longest_first, "shuffled": shuffled}


AGAIN = ("by task", "shuffled")
"""The orders whose prompts are asked once more: dplaunch has answered them before, and chunks do not care."""

BATCHES = (*ORDERS, *(f"{order}, again" for order in AGAIN))
"""All that is measured in a round."""


def changed(lengths: Sequence[int], chance: random.Random) -> list[int]:
    """The lengths of the same prompts' answers after some training."""
    return [_length(chance.gauss(math.log(length), CHANGED)) for length in lengths]


def measure_batches(standin: bool, turn: int, amount: Amount, settings: Settings) -> dict[str, float]:
    """Measures both ways with each of `BATCHES`.

    Args:
        standin: with engines that compute nothing in place of vLLM.
        turn: the number of the round: it draws the lengths, and says which way goes first.
        amount: how much is asked.
        settings: the benchmark's.

    Returns:
        By "WAY BATCH rate" the tokens a second, and by "WAY BATCH idle" the share of the time (%) in which at least
        one rank had nothing left to do.

    Raises:
        RuntimeError: when the child fails; carries the end of its output.
    """
    asked = {
        "standin": standin,
        "turn": turn,
        "amount": asdict(amount),
        "model": str(settings.model),
        "dp": settings.dp,
        "engine_args": settings.engine_args,
    }
    return child.ask_child("benchmarks.batches", asked, environment())


# ---- in the child ----


async def _measure(asked: dict[str, Any]) -> dict[str, float]:
    amount, turn = Amount(**asked["amount"]), asked["turn"]
    measured: dict[str, float] = {}
    async with _group(asked, amount) as group:
        await _ask(
            group, "dplaunch", _batch("warm-up", 2 * asked["dp"], asked["standin"]), [SHORTEST] * 2 * asked["dp"]
        )
        for number, (order, draw) in enumerate(ORDERS.items()):
            chance = random.Random(turn)
            lengths = draw(amount.prompts, chance)
            ways = WAYS if (turn + number) % 2 else WAYS[::-1]
            # For each way a batch of its own: what one has answered is nothing that the other may know.
            batches = {way: _batch(f"{order} {way}", amount.prompts, asked["standin"]) for way in ways}
            for way in ways:
                measured |= await _sample(group, way, order, batches[way], lengths)
            if order in AGAIN:
                for way in ways:
                    measured |= await _sample(
                        group, way, f"{order}, again", batches["dplaunch"], changed(lengths, random.Random(turn))
                    )
    return measured


async def _sample(group: Any, way: str, name: str, batch: Sequence[Any], lengths: Sequence[int]) -> dict[str, float]:
    rate, idle = await timed(group, functools.partial(_ask, group, way, batch, lengths))
    return {f"{way} {name} rate": rate, f"{way} {name} idle": idle}


@contextlib.asynccontextmanager
async def _group(asked: dict[str, Any], amount: Amount) -> AsyncIterator[AsyncGroup]:
    # Prompts that are asked again are computed again, as after an update of the weights.
    engine_args = {**asked["engine_args"], "max_num_seqs": amount.max_num_seqs, "enable_prefix_caching": False}
    if asked["standin"]:
        plan = StandInPlan(token_delay_s=amount.step_s, max_num_seqs=amount.max_num_seqs)
        engine_args |= {"standin": plan, "skip_tokenizer_init": True}
    with tempfile.TemporaryDirectory(prefix="bench-") as logs:
        spec = LaunchSpec(
            model=asked["model"],
            dp=asked["dp"],
            log_dir=Path(logs),
            engine=STANDIN_ENGINE if asked["standin"] else VLLM_ENGINE,
            engine_args=engine_args,
        )
        async with AsyncGroup(spec, quiet_vllm=True) as group:
            yield group


async def timed(group: Any, work: Callable[[], Awaitable[int]]) -> tuple[float, float]:
    """Tokens a second, and the share (%) of the time in which a rank had nothing left to do."""
    began = time.monotonic()
    busy = dict.fromkeys(group.client.ranks, began)

    async def look() -> None:
        while True:
            now = time.monotonic()
            busy.update({rank: now for rank, load in group.client.load.items() if load})
            await asyncio.sleep(LOOK_S)

    looking = asyncio.create_task(look())
    tokens = await work()
    seconds = time.monotonic() - began
    looking.cancel()
    return tokens / seconds, max(0.0, 100 * (began + seconds - min(busy.values())) / seconds)


async def _ask(group: Any, way: str, batch: Sequence[Any], lengths: Sequence[int]) -> int:
    params = [final_params(length) for length in lengths]
    if way == "dplaunch":
        outputs = await group.generate(batch, params, progress=False)
    else:
        chunks = blocks(range(len(batch)), len(group.client.ranks))
        answers = await asyncio.gather(
            *(
                group.generate(
                    [batch[at] for at in chunk],
                    [params[at] for at in chunk],
                    data_parallel_rank=rank,
                    progress=False,
                )
                for rank, chunk in zip(group.client.ranks, chunks, strict=True)
            )
        )
        outputs = [output for answer in answers for output in answer]
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def _batch(name: str, count: int, tokens: bool) -> list[Any]:
    texts = [f"{name}: {prompt}" for prompt in prompts(count)]
    # A stand-in has no tokenizer, and the frontend none for it: any ids do.
    return [[16 + byte for byte in text.encode()] for text in texts] if tokens else texts


def _length(logarithm: float) -> int:
    return max(SHORTEST, min(LONGEST, round(math.exp(logarithm))))


def _main() -> None:
    asked = child.question()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        child.answer(runner.run(_measure(asked)))


if __name__ == "__main__":
    _main()
