"""What vLLM's CPU build lacks for expert parallelism over several ranks, so that real engines can step together here.

Named as a worker extension, so that each rank's worker imports it. On GPUs vLLM has all of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


class OnCpu:
    """A worker extension that adds nothing: importing its module is what counts."""


def _all_gatherv(self: Any, given: Any, dim: int = 0, sizes: Sequence[int] | None = None) -> Any:
    """All ranks' rows. Each may have another number of them: padded to the most, since gloo takes equal ones."""
    if isinstance(given, list):
        return [_all_gatherv(self, each, dim, sizes) for each in given]
    counts = sizes or [given.shape[0]] * self.world_size
    padded = given.new_zeros((max(counts), *given.shape[1:]))
    padded[: given.shape[0]] = given
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _reduce_scatterv(self: Any, given: Any, dim: int = -1, sizes: Sequence[int] | None = None) -> Any:
    """The sum over all ranks of this rank's rows."""
    whole = given.clone()
    torch.distributed.all_reduce(whole, group=self.device_group)
    counts = sizes or [whole.shape[0] // self.world_size] * self.world_size
    return whole.split(list(counts))[self.rank_in_group].contiguous()


_apply = CPUUnquantizedExperts.apply
_signature = inspect.signature(_apply)


def _apply_own(self: Any, *args: Any, **kwargs: Any) -> None:
    """Leaves out the experts that other ranks hold; the kernel takes every number for one of its own."""
    bound = _signature.bind(self, *args, **kwargs)
    given = bound.arguments
    if given["expert_map"] is not None:
        own = given["expert_map"][given["topk_ids"].long()]
        given["topk_weights"] = given["topk_weights"] * (own >= 0)
        given["topk_ids"] = own.clamp(min=0).to(given["topk_ids"].dtype)
    _apply(*bound.args, **bound.kwargs)


CpuCommunicator.all_gatherv = _all_gatherv
CpuCommunicator.reduce_scatterv = _reduce_scatterv
CPUUnquantizedExperts.apply = _apply_own
