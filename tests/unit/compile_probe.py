"""What `test_compiled` runs in a process of its own: ranks, one process each, that compile with vLLM's own backend.

`python -m tests.unit.compile_probe DIRECTORY` prints one JSON object. Ranks 0 and 1 come together when nothing is
compiled, and rank 2 when they have ended. vLLM uses that backend on devices only: the mode is put back here.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cloudpickle
import torch

from dplaunch.backend import RankBoot
from dplaunch.channel import RankChannel
from dplaunch.seam import compiled


class Channel:
    """Keeps what the rank says it is busy with, and says on a pipe when it waits."""

    def __init__(self, waits: int) -> None:
        self.phases: list[str] = []
        self._waits = waits

    def phase(self, name: str) -> None:
        self.phases.append(name.partition(" (pid")[0])
        os.write(self._waits, b"w")


def a_config() -> bytes:
    """What all ranks share, as the launcher hands it to them."""
    import vllm._custom_ops  # noqa: F401  (0.30's compiler passes look for vLLM's operators)
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig

    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.VLLM_COMPILE))
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.backend = "inductor"
    config.compilation_config.compile_sizes = []
    config.parallel_config.distributed_executor_backend = "uni"
    pickled: bytes = cloudpickle.dumps(config)
    return pickled


def compile_one(config: Any) -> dict[str, Any]:
    """Compiles a model and runs it; says whether it was loaded instead."""
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.arange(64.0).reshape(8, 8) / 64, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight).softmax(-1) + x.sum()

    with set_current_vllm_config(config), torch.inference_mode(), set_forward_context(None, config, num_tokens=4):
        model: Any = Model(vllm_config=config)
        answer = model(torch.ones(4, 8))
    return {"loaded": model.was_aot_compile_fn_loaded_from_disk, "answer": hashlib.sha256(answer.numpy()).hexdigest()}


def a_rank(number: int, pickled: bytes, waits: int, within: Callable[[], None]) -> dict[str, Any]:
    """One rank's start; `within` is called before it lets go of its turn."""
    config = cloudpickle.loads(pickled)
    config.parallel_config.data_parallel_index = number
    config.instance_id = f"base_dp{number}"
    worker = SimpleNamespace(vllm_config=config, device=torch.device("cpu"), rank=0)
    executor = SimpleNamespace(
        vllm_config=config, collective_rpc=lambda method, args=(): [method(SimpleNamespace(worker=worker), *args)]
    )
    channel = Channel(waits)
    with compiled.shared(executor, cast(RankBoot, SimpleNamespace(rank=number)), cast(RankChannel, channel)):
        found = compile_one(config)
        within()
    return {**found, "phases": channel.phases, "number": config.parallel_config.data_parallel_index}


def forked(run: Callable[[], dict[str, Any]], path: Path) -> int:
    """Runs it in a child, which writes what it returns; returns the child's pid."""
    if pid := os.fork():
        return pid
    try:
        path.write_text(json.dumps(run()))
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def main(directory: Path) -> None:
    """Prints what each rank says, and the names of the directories in vLLM's cache."""
    os.environ["VLLM_CACHE_ROOT"] = str(directory)
    pickled = a_config()
    begun, waits = os.pipe(), os.pipe()
    silent = os.open(os.devnull, os.O_WRONLY)

    def until_another_waits() -> None:
        os.close(waits[1])  # so that the end of the other one is seen, should it not wait
        os.write(begun[1], b"b")
        os.read(waits[0], 1)

    first = forked(lambda: a_rank(0, pickled, silent, until_another_waits), directory / "0")
    os.close(begun[1])
    os.read(begun[0], 1)
    second = forked(lambda: a_rank(1, pickled, waits[1], lambda: None), directory / "1")
    os.close(waits[1])
    exits = [os.waitpid(pid, 0)[1] for pid in (first, second)]
    exits.append(os.waitpid(forked(lambda: a_rank(2, pickled, silent, lambda: None), directory / "2"), 0)[1])
    ranks = [json.loads((directory / str(number)).read_text()) for number, exit_ in enumerate(exits) if exit_ == 0]
    kept = sorted({path.name for path in directory.glob("torch_compile_cache/**/rank_*_*")})
    sys.stdout.flush()
    os.write(1, f"\n{json.dumps({'exits': exits, 'ranks': ranks, 'kept': kept})}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
