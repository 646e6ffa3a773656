"""New weights from a trainer beside its rank: on the device, and by the host (`python -m benchmarks.gpu.weights`).

One rank of the 8B model; the trainer's tensors are on the rank's device, as many bytes again.
"""

from __future__ import annotations

import contextlib
import statistics
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import dplaunch
from benchmarks.common import Comparison
from benchmarks.gpu.models import shapes
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Script, Step
from dplaunch import device_memory

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
    memory = device_memory.DeviceMemory
    counted = patch.object(memory, "handle", autospec=True, side_effect=memory.handle)
    with counted as handed, dplaunch.launch(str(settings.model), dp=1, **settings.engine_args) as group:
        took: dict[str, list[float]] = {"on the device": [], "through the host": []}
        sums: dict[str, str] = {}
        for number in range(ROUNDS):
            for way, seconds in took.items():
                # Others in between, so that none finds there already what it brings.
                for which in (number + ROUNDS, number):
                    _fill(tensors, which)
                    with _hidden(way == "through the host"):
                        seconds.append(group.update_weights(tensors, verify=False).seconds)
                if number == ROUNDS - 1:
                    (sums[way],) = group.weight_checksums().values()
    for way, seconds in took.items():
        notes.value(f"update {way}", statistics.median(seconds), "s")
    notes.check("both ways give the same weights", len(set(sums.values())) == 1, sorted(sums.values()))
    if not setup.cpu:
        notes.check("buckets were handed over on the device", handed.call_count > 1, handed.call_count)


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
    [Step(name="update", run=update, limit_s=240, about_s=120)],
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
