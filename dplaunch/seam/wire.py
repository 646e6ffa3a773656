"""vLLM's wire protocol between a frontend and an engine core: constants at once, codecs when vLLM is imported.

Source: vllm/v1/engine/core.py (EngineCoreProc), vllm/v1/engine/__init__.py and vllm/v1/serial_utils.py, checked
with 0.26 to 0.33. Messages to an engine: [request type, payload frames...]; from it: the frames of one
EngineCoreOutputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec

ADD = b"\x00"
ABORT = b"\x01"
START_WAVE = b"\x02"
UTILITY = b"\x03"

ENGINE_DEAD = b"ENGINE_CORE_DEAD"
"""The one-frame message that an engine core sends when its loop has raised."""


def encode_addresses(inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """The answer to HELLO: one input and one output address for each frontend.

    Written as a plain map, which is how msgspec writes vLLM's dataclass EngineHandshakeMetadata, so that a rank can
    be answered while the launcher still imports vLLM.
    """
    addresses = {
        "inputs": list(inputs),
        "outputs": list(outputs),
        "coordinator_input": None,
        "coordinator_output": None,
        "frontend_stats_publish_address": None,
    }
    return msgspec.msgpack.encode({"addresses": addresses, "parallel_config": {}})


class Codec:
    """Encodes requests and decodes outputs with vLLM's own classes; importing vLLM is its first use's cost."""

    @functools.cached_property
    def _encoder(self) -> Any:
        from vllm.v1.serial_utils import MsgpackEncoder

        return MsgpackEncoder()

    @functools.cached_property
    def _decoder(self) -> Any:
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackDecoder

        return MsgpackDecoder(EngineCoreOutputs)

    def encode(self, message: Any) -> Sequence[Any]:
        """The frames of a request, a list of request ids, or a utility call (client, call id, method, args)."""
        frames: Sequence[Any] = self._encoder.encode(message)
        return frames

    def decode(self, frames: Sequence[Any]) -> Any:
        """An EngineCoreOutputs."""
        return self._decoder.decode(frames)


def weights_of(outputs: Any) -> str | None:
    """The version of the weights that an EngineCoreOutputs was computed with; vLLM says it from 0.32 on."""
    version: str | None = getattr(outputs, "weight_version", None)
    return version


def tokens_alone(request_id: str, tokens: Sequence[int], weights: str | None) -> Any:
    """An EngineCoreOutputs with some tokens of one answer.

    Args:
        request_id: whose answer it is.
        tokens: the token ids.
        weights: what `weights_of` said of them.
    """
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    version = {} if weights is None else {"weight_version": weights}
    return EngineCoreOutputs(outputs=[EngineCoreOutput(request_id, list(tokens))], **version)


def pinned_engine(request: Any, ranks: int) -> int | None:
    """The rank that vLLM wants a request on: the caller's, or that of a late-interaction query; None for any."""
    rank: int | None = request.data_parallel_rank
    if rank is not None:
        return rank
    from vllm.v1.pool.late_interaction import get_late_interaction_engine_index

    index: int | None = get_late_interaction_engine_index(request.pooling_params, ranks)
    return index
