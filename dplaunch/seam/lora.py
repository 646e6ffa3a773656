"""Adapters on a CPU: a request without one is not answered with another's.

vLLM marks the tokens of such a request with -1. Its kernels for devices leave them alone; the operations in plain torch
of its CPU workers (vllm/lora/ops/torch_ops/lora_ops.py) take -1 for an index, which is that of the last slot. With the
default of one slot, a plain request that is batched with an adapter's gets the adapter's answer, without a word. Seen
with 0.32; https://github.com/vllm-project/vllm/pull/48421 would mend it, and is open. This module can go when every
version that is supported has it.

All of it is in eager mode: vLLM compiles no model with adapters on a CPU (vllm/platforms/cpu.py), so no graph remembers
the functions as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

OPERATIONS = ("bgmv_expand", "bgmv_expand_slice")
"""The last step of an adapter's part in a layer: what they are given as input counts for nothing where it is 0."""


def needs_care(config: Any) -> bool:
    """Whether an engine with this VllmConfig would mix them up."""
    return config.lora_config is not None and config.device_config.device_type == "cpu"


def tell_apart(worker: Any) -> None:
    """Mends the operations in a worker's process, which is the rank's own or a child of it. Called for each worker."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in OPERATIONS:
        operation = getattr(lora_ops, name)
        mended = operation if hasattr(operation, "__wrapped__") else only_adapters(operation)
        # Looked up in both: the one for prompts calls those of its own module.
        for module in (lora_ops, punica_cpu):
            setattr(module, name, mended)


def only_adapters(operation: Callable[..., None]) -> Callable[..., None]:
    """The operation, which adds nothing to tokens without an adapter."""

    @functools.wraps(operation)
    def mended(inputs: Any, weights: Any, output: Any, indices: Any, *args: Any, **kwargs: Any) -> None:
        # Not a product with 0: what the last slot has made of a foreign token may be infinite.
        inputs = inputs.masked_fill((indices < 0).unsqueeze(1), 0)
        operation(inputs, weights, output, indices, *args, **kwargs)

    return mended
