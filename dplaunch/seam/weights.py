"""Weights inside a rank: how they come into vLLM's workers, and what they amount to.

Tensors go through vLLM's own weight-transfer session (`Worker.start_weight_update`, `update_weights`,
`finish_weight_update`) with an engine of ours that maps buckets of shared memory, the host's or its own device's; a
checkpoint goes through `Worker.reload_weights`. Both load layer by layer into the tensors that are there, so that
captured graphs and the KV cache stay. Source: vllm/v1/worker/gpu_worker.py and vllm/model_executor/model_loader/reload,
checked with 0.26 to 0.33; the CPU worker inherits all of it, with two gaps that are closed here:

* A tied output layer keeps the packed copy of the embedding that it made at the start, and so answers with old weights
  (`dispatch_cpu_unquantized_gemm`): see `_pack_again`.
* vLLM's checksums see no linear layer, whose weights are packed out of sight: see `dplaunch_weight_checksum`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from dplaunch import bucket, device_memory
from dplaunch.seam import older
from dplaunch.seam.bucket_engine import engine_class, make_engine

_KEPT = "_dplaunch_own_transfer_engine"
"""Where a worker keeps its user's transfer engine while ours is in its place."""

SEES = "dplaunch_sees"
LANDMARK = "dplaunch_landmark"
TAKE = "dplaunch_take_bucket"
BEGIN = "dplaunch_begin_weights"
LOAD = "dplaunch_load_bucket"
END = "dplaunch_end_weights"
RELOAD = "dplaunch_reload_weights"
CHECKSUM = "dplaunch_weight_checksum"
DEVICE = "dplaunch_device"
SEES_DEVICE = "dplaunch_sees_device"

OF_WORKERS = "collective_rpc"
"""vLLM's own utility method: a method of every worker, a timeout, its arguments, and those with names."""


class RankWeights:
    """What our engine core adds to vLLM's: utility methods, called by the launcher while the engine is paused."""

    _loaded = ""
    """A digest over what was loaded since the start, in ranks whose checksums do not see it."""

    _digests = False

    _kept: bucket.Depot | None = None

    def _depot(self) -> bucket.Depot:
        if self._kept is None:
            self._kept = bucket.Depot()
        return self._kept

    def dplaunch_sees(self, path: str, secret: str) -> bool:
        """Whether this rank is on the host where that landmark is, so that it can map the buckets that are there."""
        return bucket.sees(path, secret)

    def dplaunch_landmark(self) -> tuple[str, str]:
        """What another rank sees if it is on this rank's host: a path, and a secret."""
        return self._depot().landmark()

    def dplaunch_device(self) -> str:
        """The device that all this rank's weights are on, by its UUID; "" where that is not one CUDA device."""
        names: list[str] = self._on_workers(device)
        return names[0] if len(names) == 1 else ""

    def dplaunch_sees_device(self, handle: bytes, secret: bytes) -> bool:
        """Whether this rank reads a trainer's memory on its device."""
        seen: list[bool] = self._on_workers(sees_device, handle, secret)
        return all(seen)

    def dplaunch_begin_weights(self, verify: bool = True) -> None:
        """New weights follow, in buckets; `verify` says whether a checksum of them will be asked for."""
        self._loaded = ""
        self._digests = verify and self._packs_out_of_sight()
        self._on_workers(begin)

    def dplaunch_take_bucket(self, data: bytes) -> str:
        """Keeps a bucket, on another host than the launcher's, for the ranks that are there; the path to map."""
        return self._depot().take(data)

    def dplaunch_load_bucket(self, path: str, entries: Sequence[Any], handle: bytes = b"") -> None:
        """Loads one bucket.

        Args:
            path: where it is mapped from: the memory of the launcher, or of a rank that took it.
            entries: what is in it.
            handle: in place of the path, memory on this rank's device.
        """
        self._on_workers(load, path, entries, handle)
        if self._digests:
            self._loaded = bucket.digest(self._loaded, path, entries)

    def dplaunch_end_weights(self) -> None:
        """All buckets were loaded, by this rank and by those that map them here."""
        self._depot().clear()
        self._on_workers(end)

    def dplaunch_reload_weights(self, path: str | None) -> None:
        """Loads a checkpoint from disk; without a path the one that the engine was started with."""
        self._on_workers(reload, path)
        self._loaded = bucket.digest_of_files(path) if path is not None and self._packs_out_of_sight() else ""

    def dplaunch_weight_checksum(self) -> str:
        """One digest over all parameters of all workers, as they are in memory; equal in ranks with equal weights.

        On a CPU, where vLLM packs the weights of linear layers and forgets them, also over what was loaded.
        """
        return combined(self.compute_weight_checksums(), self._loaded)  # type: ignore[attr-defined]

    def _packs_out_of_sight(self) -> bool:
        kind: str = self.vllm_config.device_config.device_type  # type: ignore[attr-defined]
        return kind == "cpu"

    def _on_workers(self, work: Any, *args: Any) -> list[Any]:
        answers: list[Any] = self.collective_rpc(work, args=args)  # type: ignore[attr-defined]
        return answers


def combined(parts: Sequence[Mapping[str, str]], loaded: str = "") -> str:
    """One digest of vLLM's: its keys begin with the rank's own number ("dp0:pp0:..."), which is left out."""
    lines = sorted(f"{name.partition(':')[2]} {digest}" for part in parts for name, digest in part.items())
    return hashlib.sha256("\n".join([*lines, loaded]).encode()).hexdigest()


def lora_request(name: str, number: int, path: str) -> Any:
    """vLLM's LoRARequest: what `generate` takes as `lora_request`, and an engine's `add_lora`."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, path)


# In each worker. vLLM's executors send functions by name, and call them with the worker.


def begin(worker: Any) -> None:
    """Opens a weight-transfer session with our engine, whatever engine the user has."""
    worker = getattr(worker, "worker", worker)
    own = worker.weight_transfer_engine
    if not isinstance(own, engine_class()):
        setattr(worker, _KEPT, own)
        worker.weight_transfer_engine = make_engine(worker)
    worker.weight_transfer_engine.loaded.clear()
    with older.config_of(worker):
        worker.start_weight_update()


def load(worker: Any, path: str, entries: Sequence[Any], handle: bytes) -> None:
    """Loads a bucket into the session that is open."""
    worker = getattr(worker, "worker", worker)
    with older.config_of(worker):
        worker.update_weights({"path": path, "entries": entries, "handle": handle})


def device(worker: Any) -> str:
    """The name of the worker's device."""
    return device_memory.name_of(getattr(worker, "worker", worker).device)


def sees_device(worker: Any, handle: bytes, secret: bytes) -> bool:
    """Whether the worker reads what a trainer wrote on its device."""
    return device_memory.sees(handle, secret, getattr(worker, "worker", worker).device.index)


def end(worker: Any) -> None:
    """Ends the session.

    Raises:
        ValueError: when the model has parameters that were in no bucket.
    """
    worker = getattr(worker, "worker", worker)
    ours = worker.weight_transfer_engine
    try:
        with older.config_of(worker):
            worker.finish_weight_update()
    finally:
        worker.weight_transfer_engine = getattr(worker, _KEPT, None)
    ours.check_complete()
    _pack_again(worker)
    _forget_encoded(worker)


def reload(worker: Any, path: str | None) -> None:
    """Loads a checkpoint into the model."""
    worker = getattr(worker, "worker", worker)
    with older.config_of(worker):
        worker.reload_weights(weights_path=path or worker.model_config.model)
    _pack_again(worker)


def _pack_again(worker: Any) -> None:
    """Has layers pack their weights anew that vLLM leaves as they were loaded, which its CPU kernels cannot read.

    Those are layers that share their weights with others, into which nothing was loaded, and, from 0.28 on, experts
    (`_setup_kernel` of vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py packs them the first time).
    """
    on_cpu = worker.device.type == "cpu"
    for layer in worker.model_runner.get_model().modules():
        method = getattr(layer, "quant_method", None)
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and method is not None and weight is not None and weight.numel():
            method.process_weights_after_loading(layer)
        experts: Any = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if on_cpu and hasattr(experts, "process_weights_after_loading"):
            experts.process_weights_after_loading(layer)


def _forget_encoded(worker: Any) -> None:
    # What a reload from disk does itself: images that were encoded with the old weights.
    worker.model_runner.reset_encoder_cache()
    worker.model_runner.reset_mm_cache()
