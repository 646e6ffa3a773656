"""Updates of a group's weights in one Python process: real engines from memory and from disk, and many stand-ins.

`measure_weights` asks for it; `python -m benchmarks.weights` is the child.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import child
from benchmarks.common import Settings
from benchmarks.scale import CONFIG
from benchmarks.servers import environment
from dplaunch import AsyncGroup, LaunchSpec, launch_async
from dplaunch.sync import new_loop
from dplaunch.testing import STANDIN_ENGINE, StandInPlan

TENSOR_BYTES = 16 * 2**20
"""Of each tensor that stand-ins are given: a layer of a model of a billion parameters."""


def measure_weights(settings: Settings, ranks: Sequence[int], mib: int, updates: int) -> dict[str, float]:
    """Measures updates in a process of their own.

    Args:
        settings: the model for real engines, with 1 and `dp` ranks.
        ranks: the sizes of the groups of stand-ins.
        mib: of the weights that these are given, each reading all of it, as a loader would.
        updates: how often each is done; a figure is their median.

    Returns:
        Seconds, each from the call to its return: "N memory" and "N disk" of N real ranks, and "N memory plain" without
        checksums; "N stand-ins" without checksums; "mib" of the real model.

    Raises:
        RuntimeError: when the child fails; carries the end of its output.
    """
    asked = {
        "model": str(settings.model),
        "real": sorted({1, settings.dp}),
        "ranks": list(ranks),
        "engine_args": settings.engine_args,
        "mib": mib,
        "updates": updates,
    }
    return child.ask_child("benchmarks.weights", asked, environment())


# ---- in the child ----


async def _measure(asked: dict[str, Any]) -> dict[str, float]:
    measured: dict[str, float] = {}
    for ranks in asked["real"]:
        measured |= await _real(asked, ranks)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        for ranks in asked["ranks"]:
            measured |= await _stand_ins(Path(directory), ranks, asked["mib"], asked["updates"])
    return measured


async def _real(asked: dict[str, Any], ranks: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, asked["engine_args"]["dtype"])
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype)
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    measured = {"mib": size / 2**20}
    async with launch_async(model=asked["model"], dp=ranks, progress=False, **asked["engine_args"]) as group:
        for name, source, verify in (
            ("memory", model, True),
            ("memory plain", model, False),
            ("disk", asked["model"], True),
        ):
            measured[f"{ranks} {name}"] = await _median(group, source, verify, asked["updates"])
    return measured


async def _stand_ins(directory: Path, ranks: int, mib: int, updates: int) -> dict[str, float]:
    import torch

    count = max(1, mib * 2**20 // TENSOR_BYTES)
    weights = {f"layers.{number}": torch.zeros(TENSOR_BYTES, dtype=torch.uint8) for number in range(count)}
    spec = LaunchSpec(
        model=str(directory),
        dp=ranks,
        backend="mp",
        log_dir=directory / f"logs{ranks}",
        engine=STANDIN_ENGINE,
        engine_args={
            "standin": StandInPlan(copies_weights=True),
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": "float32",
            "kv_cache_memory_bytes": 2**20,
        },
    )
    async with AsyncGroup(spec, quiet_vllm=True) as group:
        return {f"{ranks} stand-ins": await _median(group, weights, False, updates)}


async def _median(group: AsyncGroup, source: Any, verify: bool, updates: int) -> float:
    # The first one pays for what is imported and mapped once.
    seconds = [(await group.update_weights(source, verify=verify)).seconds for _ in range(updates + 1)]
    return statistics.median(seconds[1:])


def _main() -> None:
    asked = child.question()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        child.answer(runner.run(_measure(asked)))


if __name__ == "__main__":
    _main()
