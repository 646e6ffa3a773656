"""Our weight-transfer engine in vLLM's workers: loads buckets of shared memory, the host's or its own device's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dplaunch import bucket, device_memory
from dplaunch.seam import older

ENGINE = "dplaunch"
"""Its name in vLLM's factory."""

SHOWN_NAMES = 3
"""Names that an error lists; a model has hundreds."""


def make_engine(worker: Any) -> Any:
    """One for a worker, over its model."""
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # It is there already.
        WeightTransferEngineFactory.register_engine(ENGINE, engine_class())
    return WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=ENGINE), worker.vllm_config, worker.device, worker.model_runner.get_model()
    )


@dataclass
class BucketInfo:
    """What our engine is told of one bucket."""

    path: str
    entries: Sequence[Any]
    handle: bytes


@functools.cache
def engine_class() -> type[Any]:
    """Made when vLLM is there."""
    import torch
    from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class BucketEngine(WeightTransferEngine):  # type: ignore[misc]
        """Loads weights in checkpoint format from buckets that are mapped."""

        init_info_cls = WeightTransferInitInfo
        update_info_cls = BucketInfo

        def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
            super().__init__(config, vllm_config, device, model)
            self.loaded: set[str] = set()
            self._device = device

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
                weights = self._tensors(update_info)
                self.loaded |= self.model.load_weights(weights) or set()

        def _tensors(self, told: BucketInfo) -> Iterator[tuple[str, Any]]:
            if told.handle:
                return device_memory.tensors_in(told.handle, self._device.index, told.entries)
            return bucket.tensors_in(told.path, told.entries)

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
