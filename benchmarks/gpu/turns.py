"""Tokens/s of engines that are all there at once, asked in turn (`python -m benchmarks.gpu.turns`).

A start is dear and a machine's pace wanders, from one minute to the next and with where the kernel puts what spins. So
each engine is started once, and all get the same load in turn, round after round, the other way round in every second
one. They share the devices' memory, and each is alone when it works.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import DPLAUNCH, STOCK, Comparison, throughput
from benchmarks.gpu import devices
from benchmarks.gpu.models import shapes
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.sides import RATE, Run, caches, load_of
from benchmarks.gpu.steps import Script, Step
from benchmarks.inprocess import start_child

ROUNDS = 3

IDLE_S = 2.0
"""Seconds between two turns: vLLM's processes look for work without a pause for one after the last."""

SHARE = 0.85
"""Of a device, for the weights and KV caches of all; the rest is for what each needs besides."""

GRAPHS = 512
"""Requests at once for which vLLM has CUDA graphs by itself; with more it starts each kernel on its own."""

KINDS = ("engine", "batch")


@dataclass(frozen=True, slots=True)
class Party:
    """Who takes turns.

    Args:
        side: whose engine.
        dp: ranks; None for all.
        executor: dplaunch's; None for what it chooses.
        at_once: the most requests that a rank runs at a time; None for as many as elsewhere.
    """

    side: str
    dp: int | None = None
    executor: str | None = None
    at_once: int | None = None

    def limit(self) -> dict[str, Any]:
        """The engine argument that says so."""
        return {"max_num_seqs": self.at_once} if self.at_once else {}

    def name(self, model: str, kind: str) -> str:
        """What its rates are called."""
        dp, at_once = self.dp and f"dp={self.dp}", self.at_once and f"{self.at_once} at once"
        words = [model, self.side, self.executor, dp, at_once, kind, "in turn"]
        return " ".join(str(word) for word in words if word)


ALL = (Party(STOCK), Party(DPLAUNCH))
SINGLE = Party(DPLAUNCH, 1)
FEWER = (Party(STOCK, at_once=GRAPHS), Party(DPLAUNCH, at_once=GRAPHS))
ONE = (Party(STOCK, 1), Party(DPLAUNCH, 1, "mp"), Party(DPLAUNCH, 1, "uni"))


def in_turn(model: str, parties: Sequence[Party]) -> Run:
    """A step: these, with this model.

    Args:
        model: of `models.CONFIGS`.
        parties: who takes turns.
    """

    def run(setup: Setup, notes: Notes) -> None:
        with contextlib.ExitStack() as stack:
            children = []
            for party in parties:
                args = {} if setup.cpu else _room(model, len(parties)) | party.limit()
                settings = setup.settings(model, party.dp, **args)
                os.environ.update(caches(setup, party.side))
                child = start_child(party.side, settings, load_of(setup, settings.dp), party.executor)
                children.append((party, stack.enter_context(child)))
            for party, child in children:
                notes.value(f"{party.name(model, 'start')}, side by side", child.answer()["from_start"])
            for number in range(ROUNDS):
                for kind in KINDS:
                    for party, child in children if number % 2 == 0 else reversed(children):
                        time.sleep(IDLE_S)
                        _tell(notes, party.name(model, kind), child.ask(kind))

    return run


def _tell(notes: Notes, name: str, found: Mapping[str, float]) -> None:
    notes.value(name, found["rate"], RATE)
    notes.value(f"{name}: its frontend", found["cores"], "cores")


def _room(model: str, parties: int) -> dict[str, Any]:
    """Memory for one of several on each device: a cache whose size nobody has to find out."""
    weights = 2 * sum(math.prod(shape) for shape in shapes(model).values())
    own = int(devices.size() * SHARE / parties)
    return {"gpu_memory_utilization": SHARE / parties, "kv_cache_memory_bytes": own - weights}


def _compared(title: str, model: str, base: Party, ours: Party, goal: float | None = None) -> list[Comparison]:
    return [
        throughput(f"{model}: tokens/s in turn, {kind}, {title}", base.name(model, kind), ours.name(model, kind), goal)
        for kind in KINDS
    ]


_STOCKS_ONE, _MP_ONE, _UNI_ONE = ONE

SCRIPT = Script(
    "turns",
    __doc__,
    [
        # With all ranks beside one: how much more several do. On one device that is the same twice.
        Step(name="all", run=in_turn("small", (*ALL, SINGLE)), limit_s=540, about_s=250),
        Step(name="all-large", run=in_turn("large", (*ALL, SINGLE)), limit_s=540, about_s=330),
        Step(name="one", run=in_turn("small", ONE), limit_s=420, about_s=260),
        Step(name="fewer", run=in_turn("small", (*ALL, *FEWER)), limit_s=540, about_s=300),
    ],
    [
        *_compared("dplaunch over stock", "small", *ALL, goal=1.0),
        *_compared("one rank, dplaunch over stock", "small", _STOCKS_ONE, _MP_ONE, goal=1.0),
        *_compared("one rank, executor mp over uni", "small", _UNI_ONE, _MP_ONE),
        *_compared("all ranks over one", "small", SINGLE, ALL[1]),
        *_compared("all ranks over one", "large", SINGLE, ALL[1]),
        *_compared(f"{GRAPHS} at once on both, dplaunch over stock", "small", *FEWER, goal=1.0),
        *_compared(f"dplaunch, {GRAPHS} at once over 1024", "small", ALL[1], FEWER[1]),
        *_compared("dplaunch over stock", "large", *ALL, goal=1.0),
    ],
)

if __name__ == "__main__":
    SCRIPT.main()
