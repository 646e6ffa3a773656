"""Looking at a running group from outside and from inside: devices, answers, helpers, deaths."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import psutil

import dplaunch
from benchmarks.gpu import devices
from benchmarks.gpu.inside import FACTS
from dplaunch import device_memory
from dplaunch.seam.rank import REPORT
from dplaunch.testing import poll_until

PROMPTS = ["The capital of France is", "Seven sheep went to", "def add(a, b):", "1 2 3 5 8 13", "Once upon a time"]

TOKENS = 24

BACK_S = 180.0
"""Seconds until a killed rank is given up; with a warm compile cache 15 to 21 were seen."""


@contextmanager
def handed_over() -> Iterator[list[str]]:
    """Gets the device, by UUID, of each piece of memory that is handed to a rank meanwhile; no piece is held."""
    memory, uuids = device_memory.DeviceMemory, list[str]()
    handle = memory.handle

    def noted(self: device_memory.DeviceMemory) -> bytes:
        uuids.append(devices.plain(self.name))
        return handle(self)

    with patch.object(memory, "handle", noted):
        yield uuids


def facts(group: dplaunch.Group, rank: int | None = None) -> list[list[dict[str, Any]]]:
    """For each rank what its workers say of their devices."""
    return [list(workers) for workers in group.call("collective_rpc", FACTS, rank=rank)]


def worker_pids(group: dplaunch.Group, rank: int | None = None) -> list[int]:
    """The processes that drive the devices."""
    return [worker["pid"] for workers in facts(group, rank) for worker in workers]


def answers(group: dplaunch.Group, rank: int, count: int = len(PROMPTS), lora: Any = None) -> list[list[int]]:
    """Greedy tokens of one rank, one prompt at a time: a batch of another shape may round otherwise."""
    asked = [
        group.generate([prompt], greedy(), data_parallel_rank=rank, lora_request=lora, progress=False)
        for prompt in PROMPTS[:count]
    ]
    return [list(output.outputs[0].token_ids) for (output,) in asked]


def stock_answers(engine_args: Mapping[str, Any], path: str) -> list[list[int]]:
    """The same of `vllm.LLM` in this process, one prompt at a time."""
    from vllm import LLM

    llm = LLM(model=path, **engine_args)
    asked = [llm.generate([prompt], greedy(), use_tqdm=False) for prompt in PROMPTS]
    return [list(output.outputs[0].token_ids) for (output,) in asked]


def greedy(tokens: int = TOKENS) -> Any:
    """SamplingParams for so many of the most likely tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def zygotes() -> list[int]:
    """The helper processes below this one that ranks are forked from."""
    return [pid for pid, title in _children() if "dplaunch::zygote" in title]


def _children() -> Iterator[tuple[int, str]]:
    for child in psutil.Process().children(recursive=True):
        try:
            yield child.pid, " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue


def kill_rank(group: dplaunch.Group, rank: int) -> float:
    """SIGKILL for a rank, and its return; the seconds between the two."""
    (report,) = group.call(REPORT, rank=rank)
    killed = time.monotonic()
    os.kill(report["pid"], signal.SIGKILL)
    poll_until(lambda: rank not in group.ranks_up, BACK_S, "the rank to be gone")
    poll_until(lambda: rank in group.ranks_up, BACK_S, "the rank to be back")
    return time.monotonic() - killed


def trainer(path: str, device: str) -> Any:
    """The model as a trainer holds it, in this process; on "cuda" this initialises CUDA here."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)


def shift(module: Any, seed: int) -> None:
    """Changes every weight a little: enough for other answers."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            chance = torch.Generator(device=parameter.device).manual_seed(seed)
            noise = torch.randn(parameter.shape, generator=chance, device=parameter.device, dtype=torch.float32)
            parameter.add_((noise * 0.02).to(parameter.dtype))


@contextmanager
def timed(tell: Any, name: str) -> Iterator[None]:
    """Tells how long the block took, seconds, when it ends well."""
    started = time.monotonic()
    yield
    tell(name, time.monotonic() - started)
