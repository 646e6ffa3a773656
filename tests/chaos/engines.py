"""What a soak run is done to, and requests with known answers: stand-ins, or vLLM's engines on the built-in model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dplaunch.group import AsyncGroup
from dplaunch.seam import frontend
from dplaunch.spec import ExecutorKind, LaunchSpec, ProbePolicy, RequestPolicy, RestartPolicy
from dplaunch.testing import StandInPlan
from tests.chaos.load import Ask, ask
from tests.chaos.rig import DEADLY, MANY, chaos_spec, faults
from tests.conftest import shared_pids

MAX_FAILURES = 4
"""Dying ranks for one request. Faults come so fast that chance may put a harmless one on more than two."""

PROMPTS = (
    "The capital of France is",
    "One, two, three, four,",
    "Once upon a time there was",
    "The three primary colours are",
    "Water boils at",
    "def fibonacci(n):",
    "My favourite animal is the",
    "In the year 1969",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run; `minutes` is for the harm, without start and end.

    With `workers`, each of vLLM's engines has a worker process, which imports vLLM anew at every restart.
    """

    seed: int
    minutes: float = 10.0
    backend: str = "mp"
    ranks: int = 6
    streams: int = 24
    real: bool = False
    workers: bool = False


@dataclass(frozen=True, slots=True)
class Engines:
    """What to launch and what to ask it.

    Args:
        spec: the launch.
        next_ask: the next request.
        prepare: called once the group runs, before anything is done to it.
    """

    spec: LaunchSpec
    next_ask: Callable[[], Ask]
    prepare: Callable[[AsyncGroup], Any]

    def kept(self) -> set[int]:
        """Processes that stay when the group ends: they are the whole process's."""
        return set(shared_pids())


def standin_engines(options: Options, directory: Path) -> Engines:
    """Stand-ins whose restarts fail now and then."""
    source = random.Random(options.seed + 1)
    plan = StandInPlan(default=DEADLY, faults=faults(), token_delay_s=0.03)
    requests = RequestPolicy(max_failures=MAX_FAILURES)
    spec = chaos_spec(directory, options.backend, options.ranks, plan=plan, requests=requests)
    frontend.import_vllm(quiet=True)

    def next_ask() -> Ask:
        prompt = [source.randrange(20, 900) for _ in range(source.randrange(1, 9))]
        leave = source.randrange(1, 8) if source.random() < 0.1 else None
        return ask(prompt, source.randrange(8, 80), leave)

    async def prepare(group: AsyncGroup) -> None:
        pass

    return Engines(spec, next_ask, prepare)


async def real_engines(options: Options, directory: Path) -> Engines:
    """vLLM's own; the undisturbed answers are asked of them first."""
    from dplaunch import demo
    from tests.real.conftest import ENGINE_ARGS

    source = random.Random(options.seed + 1)
    spec = LaunchSpec(
        model=str(demo.demo_model().path),
        dp=options.ranks,
        backend=options.backend,
        engine_args=ENGINE_ARGS,
        executor=ExecutorKind.MP if options.workers else ExecutorKind.UNI,
        log_dir=directory / "logs",
        restart=RestartPolicy(limit=MANY, window_s=3.0, backoff_s=0.05),
        probe=ProbePolicy(interval_s=1.0, timeout_s=15.0),
        requests=RequestPolicy(max_failures=MAX_FAILURES),
        base_id="soak",
    )
    known: list[Ask] = []

    async def prepare(group: AsyncGroup) -> None:
        known.extend(await undisturbed(group, PROMPTS, 48))

    def next_ask() -> Ask:
        chosen = source.choice(known)
        length = source.randrange(8, len(chosen.expected) + 1)
        leave = source.randrange(1, 8) if source.random() < 0.1 else None
        return replace(chosen, expected=chosen.expected[:length], leave_after=leave)

    return Engines(spec, next_ask, prepare)


async def undisturbed(group: AsyncGroup, prompts: Sequence[str], tokens: int) -> list[Ask]:
    """What the group answers when nothing happens to it."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    outputs = await group.generate(list(prompts), params)
    return [Ask(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]
