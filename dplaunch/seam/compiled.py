"""One compile cache for the independent ranks of a group: the first compiles, the others load what it has compiled.

vLLM keeps what `torch.compile` made in .../HASH/rank_{worker}_{data_parallel_index}, so that each rank of a cold group
compiles the same code for itself. Ranks that do not step together differ in nothing but that number, which is in no
hash: their workers have 0 for it as long as the name is made, and one rank at a time compiles. It has compiled, saved
and tuned all of it when `determine_available_memory` returns: that is where vLLM runs the model for the first time.

What Triton compiles besides is kept for the next start as well (`keep_kernels`).

Left alone: ranks that step together, whose code knows of each other; workers whose device has another number than they
have, since compiled code names its device; Ray as a rank's own executor, whose workers may be on another disk; models
without a KV cache, which are run for the first time later; and whatever is not compiled by vLLM's own backend, as on a
CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from dplaunch.backend import RankBoot
from dplaunch.channel import RankChannel
from dplaunch.turns import Turn, turn

SHARING = frozenset({"uni", "mp"})
"""Executors whose workers are on the rank's own host."""

FOLDER = Path("torch_compile_cache", "dplaunch")
"""Where the locks are, in VLLM_CACHE_ROOT: who clears vLLM's compile cache clears them too."""

KERNELS = "TRITON_CACHE_DIR"
"""The variable that says where Triton's kernels are kept."""


def keep_kernels(device_type: str, environ: MutableMapping[str, str]) -> None:
    """Has a rank's workers keep what Triton compiles where Triton does by itself, so that the next start finds it.

    Where the variable is not set, Inductor sets it with its first kernel, to a folder of its own cache
    (torch/_inductor/runtime/triton_heuristics.py), and while vLLM compiles that cache is one for this compilation
    alone. So the kernels that vLLM's model runner had compiled after it, for 15 s and more, were gone with the process.

    Args:
        device_type: torch's name of the ranks' devices; a CPU has no such kernels.
        environ: of the rank's process; nothing is changed in it when the variable is set, or the folder cannot be had.
    """
    if device_type == "cpu" or environ.get(KERNELS):
        return
    # Triton, knobs.py (cache_knobs).
    folder = Path(environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton", "cache")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            environ[KERNELS] = str(folder)


@contextlib.contextmanager
def shared(executor: Any, boot: RankBoot, channel: RankChannel) -> Iterator[None]:
    """The block in which a rank compiles its model, or loads what another rank of its host has compiled before.

    Args:
        executor: vLLM's, whose workers have their model.
        boot: the rank.
        channel: is told when the rank waits for another one.

    Raises:
        Exception: what a worker raised.
    """
    keys: list[Any] = executor.collective_rpc(key_of) if may_share(executor.vllm_config) else []
    if not keys or None in keys:
        yield
        return
    with contextlib.ExitStack() as stack:
        come = _turn(stack, keys, boot, channel)
        if come is None:
            yield
            return
        executor.collective_rpc(be_number, args=(0,))
        # When this raises, the rank ends: nobody is left who would miss the workers' own numbers.
        yield
        places = executor.collective_rpc(be_number, args=(boot.rank,))
        # Without the mark the next rank takes its turn, and finds it compiled.
        with contextlib.suppress(OSError):
            come.made(place for place in places if place)


def may_share(config: Any) -> bool:
    """Whether a rank with this VllmConfig compiles what others of its group do."""
    from vllm.config import CompilationMode

    parallel = config.parallel_config
    return (
        config.compilation_config.mode == CompilationMode.VLLM_COMPILE
        and parallel.data_parallel_size == 1
        and parallel.distributed_executor_backend in SHARING
    )


def key_of(worker: Any) -> str | None:
    """In a worker: what its code depends on, the same in all ranks; None where its code is for itself alone."""
    import torch
    from vllm import envs
    from vllm.compilation.compiler_interface import is_compile_cache_enabled

    worker = getattr(worker, "worker", worker)
    config, device = worker.vllm_config, worker.device
    compilation = config.compilation_config
    if device.index not in (None, worker.rank) or not is_compile_cache_enabled(compilation.inductor_compile_config):
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    # What vLLM makes its own directories' names of, as far as it is known before the model is compiled.
    variables = sorted(envs.compile_factors().items())
    return repr((config.compute_hash(), variables, torch.__version__, name, compilation.cache_dir))


def be_number(worker: Any, number: int) -> str | None:
    """In a worker: takes this for its rank's number; returns the directory of what it has compiled, if any."""
    config = getattr(worker, "worker", worker).vllm_config
    config.parallel_config.data_parallel_index = number
    return config.compilation_config.local_cache_dir or None


def _turn(stack: contextlib.ExitStack, keys: list[str], boot: RankBoot, channel: RankChannel) -> Turn | None:
    """This rank's turn, which ends with the stack; None where there can be no lock."""
    from vllm import envs

    def on_wait(other: str) -> None:
        _say(f"rank {boot.rank} waits for {other} to compile")
        channel.phase(f"waits for {other} to compile")

    key = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
    folder = Path(envs.VLLM_CACHE_ROOT) / FOLDER
    try:
        return stack.enter_context(turn(folder, key, f"rank {boot.rank} (pid {os.getpid()})", on_wait))
    except OSError as error:
        _say(f"rank {boot.rank} compiles for itself: there can be no lock beside vLLM's compile cache ({error})")
        return None


def _say(message: str) -> None:
    # Into the rank's log.
    sys.stderr.write(f"dplaunch: {message}\n")
    sys.stderr.flush()
