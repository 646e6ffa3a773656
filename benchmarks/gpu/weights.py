"""New weights from a trainer beside its rank: on the device, and by the host (`python -m benchmarks.gpu.weights`).

One rank of the 8B model; the trainer's tensors are on the rank's device, as many bytes again. What is written to the
host is also measured without a rank, by all threads and by one.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import dplaunch
from benchmarks.common import Comparison
from benchmarks.gpu import looks
from benchmarks.gpu.models import shapes
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Script, Step
from dplaunch import bucket, device_memory, host_memory

ROUNDS = 3

SHARE = 0.45
"""Of the device, for the rank."""


def update(setup: Setup, notes: Notes) -> None:
    """A step: the same update in turn on both ways; afterwards the rank has the same weights by either."""
    import torch

    own: dict[str, Any] = {} if setup.cpu else {"gpu_memory_utilization": SHARE, "enforce_eager": True}
    settings = setup.settings("large", 1, **own)
    like = {"dtype": getattr(torch, settings.dtype), "device": "cpu" if setup.cpu else "cuda:0"}
    tensors = {name: torch.empty(shape, **like) for name, shape in shapes(settings.model.name).items()}
    notes.value("weights", sum(tensor.nbytes for tensor in tensors.values()) / 2**30, "GiB")
    for threads in (1, host_memory.MOST_THREADS):
        notes.value(f"written to the host by {threads}", _written(tensors, threads))
    taken = set()
    with looks.handed_over() as handed, dplaunch.launch(str(settings.model), dp=1, **settings.engine_args) as group:
        took: dict[str, list[float]] = {"on the device": [], "through the host": []}
        sums: dict[str, str] = {}
        for number in range(ROUNDS):
            for way, seconds in took.items():
                # Others in between, so that none finds there already what it brings.
                _fill(tensors, number + ROUNDS)
                group.update_weights(tensors, verify=False)
                _fill(tensors, number)
                before = len(handed)
                with _hidden(way == "through the host"):
                    seconds.append(group.update_weights(tensors, verify=False).seconds)
                notes.value(f"{way}, {number}", seconds[-1])
                if not setup.cpu:
                    there = len(handed) > before
                    notes.check("by the way that was meant", there == (way == "on the device"), len(handed) - before)
                    taken.add(torch.cuda.memory_allocated())
                if number == ROUNDS - 1:
                    (sums[way],) = group.weight_checksums().values()
    for way, seconds in took.items():
        notes.value(f"update {way}", statistics.median(seconds))
    notes.check("both ways give the same weights", len(set(sums.values())) == 1, sorted(sums.values()))
    if not setup.cpu:
        notes.check("each update gives back what it took of the device", len(taken) == 1, sorted(taken))


def _written(tensors: dict[str, Any], threads: int) -> float:
    """Seconds for what is done with weights before a rank is asked to load them from the host."""
    began = time.monotonic()
    with patch.object(host_memory, "MOST_THREADS", threads):
        for each in bucket.in_buckets(tensors.items()):
            each.free()
    return time.monotonic() - began


def _fill(tensors: dict[str, Any], number: int) -> None:
    """Makes other weights of each number."""
    for place, tensor in enumerate(tensors.values()):
        tensor.fill_(0.001 * (1 + number) * (1 + place % 7))


def _hidden(hides: bool) -> AbstractContextManager[Any]:
    """Has this process say that it has memory on no device."""
    return patch.object(device_memory, "own_devices", dict) if hides else contextlib.nullcontext()


SCRIPT = Script(
    "weights",
    __doc__,
    [Step(name="update", run=update, limit_s=360, about_s=200)],
    [
        Comparison(
            title="an update on the device over one through the host",
            unit="s",
            base="update through the host",
            ours="update on the device",
            goal=1.0,
        )
    ],
)

if __name__ == "__main__":
    SCRIPT.main()
