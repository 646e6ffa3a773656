"""A small mixture of experts, in lockstep with expert parallelism and independent (`python -m benchmarks.gpu.moe`).

In each mode: uneven batches end; a rank dies with requests in flight, and all of them are answered. In lockstep the
whole group comes back, once.
"""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import dplaunch
from benchmarks.common import throughput
from benchmarks.gpu import looks
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Script, Step
from benchmarks.load import prompts
from dplaunch.events import Event, RankState
from dplaunch.testing import poll_until

UNDER_WAY_S = 1.0
"""Seconds after which a batch of long answers is in the middle."""


class Watched:
    """A group that notes which incarnations of which ranks got ready."""

    def __init__(self) -> None:
        self.ready: list[tuple[int | None, int]] = []

    def __call__(self, event: Event) -> None:
        if event.state is RankState.READY and not event.phase:
            self.ready.append((event.rank, event.incarnation))


def mode(name: str, **args: Any) -> Callable[[Setup, Notes], None]:
    """A step: one mode of the same model."""

    def run(setup: Setup, notes: Notes) -> None:
        # What vLLM's CPU build lacks for it; with GPUs nothing is needed.
        own: Any = {"worker_extension_cls": "tests.real.cpu_experts.OnCpu"} if setup.cpu and name == "lockstep" else {}
        settings, watched = setup.settings("moe", **own), Watched()
        called = time.monotonic()
        with dplaunch.launch(
            model=str(settings.model), dp=settings.dp, listener=watched, **settings.engine_args, **args
        ) as group:
            notes.value(f"{name}: ready after", time.monotonic() - called)
            notes.check(f"the plan says {name}", group.plan.mode == name, group.plan.mode_reason)
            _uneven(setup, group, notes, name)
            _fast(setup, group, notes, name)
            _death(setup, group, notes, name, watched)

    return run


def _uneven(setup: Setup, group: dplaunch.Group, notes: Notes, name: str) -> None:
    """One rank has one short answer to give, another many long ones, a third would have none at all."""
    many, long = (4, 12) if setup.cpu else (32, 200)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        short = pool.submit(group.generate, ["Only one"], looks.greedy(4), data_parallel_rank=0, progress=False)
        last = group.ranks_up[-1]
        batch = group.generate(prompts(many), looks.greedy(long), data_parallel_rank=last, progress=False)
        lengths = sorted({len(output.outputs[0].token_ids) for output in [*short.result(), *batch]})
    notes.check(f"{name}: uneven batches end", lengths == [4, long], f"lengths {lengths}")
    again = group.generate(prompts(2 * setup.dp), looks.greedy(8), progress=False)
    notes.check(f"{name}: and the next batch", len(again) == 2 * setup.dp)


def _fast(setup: Setup, group: dplaunch.Group, notes: Notes, name: str) -> None:
    count, tokens = (8, 8) if setup.cpu else (512 * setup.dp, 128)
    began = time.monotonic()
    group.generate(prompts(count), looks.greedy(tokens), progress=False)
    notes.value(f"{name}: generate", count * tokens / (time.monotonic() - began), "tokens/s")


def _death(setup: Setup, group: dplaunch.Group, notes: Notes, name: str, watched: Watched) -> None:
    count, tokens = (16, 600) if setup.cpu else (64, 2000)
    rank = group.ranks_up[-1]
    (report,) = group.call("dplaunch_report", rank=rank)
    before = set(watched.ready)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        batch = pool.submit(group.generate, prompts(count), looks.greedy(tokens), on_error="return", progress=False)
        time.sleep(UNDER_WAY_S)
        under_way, killed = not batch.done(), time.monotonic()
        os.kill(report["pid"], signal.SIGKILL)
        answers = batch.result()
    notes.value(f"{name}: batch ended after the kill by", time.monotonic() - killed)
    poll_until(lambda: len(group.ranks_up) == setup.dp, looks.BACK_S, "all ranks")
    notes.value(f"{name}: all ranks back, at most", time.monotonic() - killed)
    failed = [str(answer) for answer in answers if isinstance(answer, Exception)]
    notes.check(f"{name}: requests were in flight at the kill", under_way, count)
    notes.check(f"{name}: none of them failed", not failed, failed[:1] or f"{len(answers)} answered")
    wanted = {(each, 1) for each in (range(setup.dp) if name == "lockstep" else [rank])}
    came = set(watched.ready) - before
    notes.check(f"{name}: who came back, once", came == wanted, sorted(came, key=str))
    after = group.generate(prompts(setup.dp), looks.greedy(8), progress=False)
    notes.check(f"{name}: it answers after that", len(after) == setup.dp)


COMPARISONS = [
    throughput("lockstep over independent", "independent: generate", "lockstep: generate"),
]

SCRIPT = Script(
    "moe",
    __doc__,
    [
        Step(
            name="lockstep",
            run=mode("lockstep", enable_expert_parallel=True),
            limit_s=280,
            about_s=110,
            devices=2,
        ),
        Step(name="independent", run=mode("independent"), limit_s=220, about_s=90, devices=2),
    ],
    COMPARISONS,
)

if __name__ == "__main__":
    SCRIPT.main()
