"""What a script runs with: how many devices, which models, and vLLM's arguments on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import Settings
from benchmarks.gpu.inside import EXTENSION
from benchmarks.gpu.models import model

ENVIRONMENT = {
    # Its first use compiles for a minute and a half.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # No NVLink multicast: where a device is lent through a virtual machine, its host may not bear it.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Images of containers may say the opposite, and then each import compiles vLLM's sources anew: twice the time.
    "PYTHONDONTWRITEBYTECODE": "",
}
"""For both sides, and every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSettings(Settings):
    """The settings of a benchmark, with engine arguments of its own.

    Args:
        args: vLLM's engine arguments by their Python names; True for a switch.
    """

    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def engine_args(self) -> dict[str, Any]:
        """The same on both sides."""
        return dict(self.args)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a step is told.

    Args:
        dp: ranks where all devices are used.
        devices: how many there are; 0 for a rehearsal on CPU.
        directory: where it may leave files for the steps after it.
    """

    dp: int
    devices: int
    directory: str

    @property
    def cpu(self) -> bool:
        """Whether this is a rehearsal, whose figures mean nothing."""
        return self.devices == 0

    def settings(self, name: str, dp: int | None = None, **args: Any) -> GpuSettings:
        """A model of `models.CONFIGS` with weights that vLLM makes up; on CPU a tiny one in its place."""
        return self._settings(model(self._fit(name)), dp, {"load_format": "dummy", **args})

    def with_weights(self, dp: int | None = None, **args: Any) -> GpuSettings:
        """The model whose answers can be compared; its workers say which device they are on."""
        own = {"worker_extension_cls": EXTENSION, **args}
        return self._settings(model("tiny" if self.cpu else "check", weights=True), dp, own)

    def _fit(self, name: str) -> str:
        if not self.cpu:
            return name
        return "tiny-moe" if name == "moe" else "tiny"

    def _settings(self, path: Path, dp: int | None, args: Mapping[str, Any]) -> GpuSettings:
        return GpuSettings(
            model=path,
            dp=self.dp if dp is None else dp,
            dtype="float32" if self.cpu else "bfloat16",
            rounds=1,
            quick=self.cpu,
            args={**(_CPU_ARGS if self.cpu else _GPU_ARGS), **args},
        )


# The sizes of batches are vLLM's defaults for such a device over HTTP; in process it has others. Both sides get them.
_GPU_ARGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "gpu_memory_utilization": 0.8,
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 8192,
    # A prompt that was asked before is no cheaper: for what comes after a first pass, and for who takes it over.
    "enable_prefix_caching": False,
}

_CPU_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 * 2**20,
    "gpu_memory_utilization": 0.1,
    "max_num_seqs": 16,
    "enable_prefix_caching": False,
}
