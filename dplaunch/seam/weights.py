"""Weights inside a rank: how they come into vLLM's workers, and what they amount to.

Tensors go through vLLM's own weight-transfer session (`Worker.start_weight_update`, `update_weights`,
`finish_weight_update`) with an engine of ours that maps buckets of shared memory; a checkpoint goes through
`Worker.reload_weights`. Both load layer by layer into the tensors that are there, so that captured graphs and the KV
cache stay. Source: vllm/v1/worker/gpu_worker.py and vllm/model_executor/model_loader/reload, checked with 0.26 to
0.33; the CPU worker inherits all of it, with two gaps that are closed here:

* A tied output layer keeps the packed copy of the embedding that it made at the start, and so answers with old weights
  (`dispatch_cpu_unquantized_gemm`): see `_pack_again`.
* vLLM's checksums see no linear layer, whose weights are packed out of sight: see `dplaunch_weight_checksum`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dplaunch import bucket
from dplaunch.seam import older

ENGINE = "dplaunch"
"""The name of our weight-transfer engine in vLLM's factory."""

_KEPT = "_dplaunch_own_transfer_engine"
"""Where a worker keeps its user's transfer engine while ours is in its place."""

SHOWN_NAMES = 3
"""Names that an error lists; a model has hundreds."""

SEES = "dplaunch_sees"
LANDMARK = "dplaunch_landmark"
TAKE = "dplaunch_take_bucket"
BEGIN = "dplaunch_begin_weights"
LOAD = "dplaunch_load_bucket"
END = "dplaunch_end_weights"
RELOAD = "dplaunch_reload_weights"
CHECKSUM = "dplaunch_weight_checksum"

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

    def dplaunch_begin_weights(self, verify: bool = True) -> None:
        """New weights follow, in buckets; `verify` says whether a checksum of them will be asked for."""
        self._loaded = ""
        self._digests = verify and self._packs_out_of_sight()
        self._on_workers(begin)

    def dplaunch_take_bucket(self, data: bytes) -> str:
        """Keeps a bucket, on another host than the launcher's, for the ranks that are there; the path to map."""
        return self._depot().take(data)

    def dplaunch_load_bucket(self, path: str, entries: Sequence[Any]) -> None:
        """Loads one bucket.

        Args:
            path: where it is mapped from: the memory of the launcher, or of a rank that took it.
            entries: what is in it.
        """
        self._on_workers(load, path, entries)
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

    def _on_workers(self, work: Any, *args: Any) -> None:
        self.collective_rpc(work, args=args)  # type: ignore[attr-defined]


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
    if not isinstance(own, _engine_class()):
        setattr(worker, _KEPT, own)
        worker.weight_transfer_engine = _make_engine(worker)
    worker.weight_transfer_engine.loaded.clear()
    with older.config_of(worker):
        worker.start_weight_update()


def load(worker: Any, path: str, entries: Sequence[Any]) -> None:
    """Loads a bucket into the session that is open."""
    worker = getattr(worker, "worker", worker)
    with older.config_of(worker):
        worker.update_weights({"path": path, "entries": entries})


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


def _make_engine(worker: Any) -> Any:
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # It is there already.
        WeightTransferEngineFactory.register_engine(ENGINE, _engine_class())
    return WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=ENGINE), worker.vllm_config, worker.device, worker.model_runner.get_model()
    )


@dataclass
class BucketInfo:
    """What our engine is told of one bucket."""

    path: str
    entries: Sequence[Any]


@functools.cache
def _engine_class() -> type[Any]:
    import torch
    from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class BucketEngine(WeightTransferEngine):  # type: ignore[misc]
        """Loads weights in checkpoint format from buckets that are mapped."""

        init_info_cls = WeightTransferInitInfo
        update_info_cls = BucketInfo

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.loaded: set[str] = set()

        def init_transfer_engine(self, init_info: Any) -> None:
            """Nothing: there is nobody to meet."""

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            """As the base class, but it does not ask for an accelerator where there is none."""
            self.receive_weights(self.parse_update_info(update_info))
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: BucketInfo) -> None:
            # A layer that goes on in the next bucket keeps its tensors, and with them this bucket's memory.
            with older.without_mtp_check():
                weights = bucket.tensors_in(update_info.path, update_info.entries)
                self.loaded |= self.model.load_weights(weights) or set()

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def check_complete(self) -> None:
            """Refuses what vLLM's own first load refuses, a checkpoint without some of the parameters."""
            if self.model_config.quantization is not None or not self.loaded:
                return  # Their names are not those of the checkpoint, or the model does not say what it took.
            wanted = {name.replace(".base_layer.", ".") for name, _ in self.model.named_parameters()}
            if missing := sorted(wanted - self.loaded):
                names = ", ".join(missing[:SHOWN_NAMES])
                raise ValueError(f"{len(missing)} of {len(wanted)} parameters were not in the weights: {names}")

        def shutdown(self) -> None:
            """Nothing is held."""

        @staticmethod
        def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
            """The other end, which vLLM before 0.28 wants to have here too; ours is the launcher."""
            raise NotImplementedError("weights come from the launcher: group.update_weights")

    return BucketEngine
