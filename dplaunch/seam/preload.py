"""What the zygote imports once, so that no rank has to. Runs in the zygote; must not start a thread or a device."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from dplaunch.seam.names import modules_of

MODULES = (
    "vllm.engine.arg_utils",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.structured_output",
    "vllm.v1.sample.rejection_sampler",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    # The commonest architectures; they bring in the layers that all the others use.
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
)
CPU_MODULES = (
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.utils.cpu_triton_utils",
    "vllm.triton_utils.dispatcher",
)
CUDA_MODULES = (
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.attention.backends.flash_attn",
)


QUIET_IMPORTS = {"HUMMING_DISABLE_PARALLEL_BUILD": "1"}
"""Of a package of kernels that vLLM 0.33 for CUDA brings along (humming, utils/nvrtc.py and ops/utils.py): when it is
imported it starts compilers, with a thread for each, for kernels that few models use and that it can build later."""


def preload() -> None:
    """Imports what every rank needs. A module that this vLLM lacks costs a rank its import, not the launch."""
    import torch

    # One thread until the rank says how many: a pool made here would be dead in every fork.
    torch.set_num_threads(1)
    with _environment(QUIET_IMPORTS):
        _import_all()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _import_all() -> None:
    for name in modules_of("make_arg_parser") + MODULES + (CUDA_MODULES if _cuda_build() else CPU_MODULES):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _cuda_build() -> bool:
    import torch

    return torch.version.cuda is not None


def exec_environment(env: Mapping[str, str], device_type: str) -> dict[str, str]:
    """A helper's environment: `env`, and what only counts when a program is loaded.

    vLLM sets LD_PRELOAD for the CPU workers that it executes (vllm/platforms/cpu.py): torch's own OpenMP, so that
    there are not two, and tcmalloc. Forked ranks inherit what the zygote was loaded with.
    """
    env = dict(env)
    present = env.get("LD_PRELOAD", "")
    # One OpenMP is enough: a user who preloads Intel's does not want GNU's too.
    if device_type != "cpu" or any(name in present for name in ("libgomp", "libiomp", "libomp")):
        return env
    wanted = [*_libraries("vllm", "libs/libtcmalloc_minimal*.so*"), *_libraries("torch", "lib/libgomp*.so*")]
    if wanted:
        env["LD_PRELOAD"] = ":".join([*map(str, wanted), *filter(None, [present])])
    return env


def _libraries(package: str, pattern: str) -> list[Path]:
    # Found without importing the package: the launcher has not done so yet.
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or []
    return [file for place in places for file in sorted(Path(place).glob(pattern))[:1]]
