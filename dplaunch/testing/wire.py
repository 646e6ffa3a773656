"""The messages of vLLM's engine-core protocol that the stand-in engine needs, checked with vLLM 0.26 to 0.33.

vLLM encodes its structs as arrays and appends new fields at the end, so only the leading fields that are used
have to be named here, and both sides ignore or default the rest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

VLLM_VERSION = "0.32.0"
"""What the stand-in engine says that it is."""

ADD = b"\x00"
ABORT = b"\x01"
UTILITY = b"\x03"

FINISH_STOP = 0
FINISH_LENGTH = 1
FINISH_ABORT = 2

DEFAULT_MAX_TOKENS = 16
"""vLLM leaves values that equal its defaults out of a message; this is its default."""

RAW_VIEW = 3
"""The extension type under which vLLM sends the bytes of a small tensor within a message."""


class Request(msgspec.Struct, array_like=True, gc=False):
    """The head of vLLM's EngineCoreRequest."""

    request_id: str
    prompt_token_ids: list[int] | None
    mm_features: Any
    sampling_params: dict[str, Any] | None
    pooling_params: Any
    arrival_time: float
    lora_request: Any
    cache_salt: str | None
    data_parallel_rank: int | None
    prompt_embeds: Any = None
    prompt_is_token_ids: Any = None
    client_index: int = 0


class PrefillStats(msgspec.Struct):
    """vLLM's statistics of a prompt, sent with the first token."""

    num_prompt_tokens: int
    num_computed_tokens: int


class Output(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """The head of vLLM's EngineCoreOutput."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: None = None
    new_prompt_logprobs_tensors: None = None
    pooling_output: Any = None
    finish_reason: int | None = None
    stop_reason: None = None
    events: None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    trace_headers: None = None
    prefill_stats: PrefillStats | None = None


class UtilityOutput(msgspec.Struct, array_like=True):
    """vLLM's UtilityOutput; `result` is (type information or None, value)."""

    call_id: int
    failure_message: str | None = None
    result: tuple[None, Any] | None = None


class Outputs(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """The head of vLLM's EngineCoreOutputs."""

    engine_index: int = 0
    outputs: list[Output] = []
    scheduler_stats: None = None
    timestamp: float = 0.0
    utility_output: UtilityOutput | None = None
    finished_requests: set[str] | None = None
    wave_complete: None = None
    start_wave: None = None
    weight_version: str | None = None


def engine_identity(index: int = 0) -> bytes:
    """The ZeroMQ identity of an engine core; an independent rank is index 0 in its own world of one."""
    return index.to_bytes(2, "little")


def encode_outputs(
    outputs: Sequence[Output] = (),
    *,
    utility: UtilityOutput | None = None,
    finished: set[str] | None = None,
    version: str | None = None,
) -> bytes:
    """One message of results, with the monotonic time that vLLM takes intervals from."""
    message = Outputs(
        outputs=list(outputs),
        timestamp=time.monotonic(),
        utility_output=utility,
        finished_requests=finished or None,
        weight_version=version,
    )
    return msgspec.msgpack.encode(message)


def encode_tensor(values: Sequence[float]) -> tuple[str, tuple[int], msgspec.msgpack.Ext]:
    """A small vector of float32 as vLLM sends tensors."""
    import struct

    return "float32", (len(values),), msgspec.msgpack.Ext(RAW_VIEW, struct.pack(f"={len(values)}f", *values))
