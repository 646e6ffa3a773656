"""vLLM's outputs as plain JSON values, and back: what a results file keeps of an answer.

Kept: the prompt and its tokens and logprobs, each answer's text, tokens, logprobs, finish and stop reason and the
versions of the weights that it came from; of a pooling output its data. Left out: metrics, routed experts, sampling
masks, and what a KV or encoder connector handed over, which mean nothing in another process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_ABOUT_DELIVERY = frozenset({"output_kind", "skip_clone", "stream_interval", "output_text_buffer_length"})
"""Fields of SamplingParams that say how an answer is handed over, and change nothing of it."""


def params_facts(params: Any) -> dict[str, Any]:
    """What a SamplingParams or PoolingParams asks for: its fields that are not as by default.

    Only those: a field that a later vLLM adds leaves the keys of older files as they are.
    """
    import msgspec

    usual = type(params)()
    names = [name for name in params.__struct_fields__ if not name.startswith("_") and name not in _ABOUT_DELIVERY]
    facts = {name: getattr(params, name) for name in names if getattr(params, name) != getattr(usual, name)}
    plain: dict[str, Any] = msgspec.to_builtins(facts, enc_hook=_plain)
    return {"kind": type(params).__name__, **plain}


def pack(output: Any) -> dict[str, Any]:
    """A RequestOutput or PoolingRequestOutput as values that JSON knows."""
    common = {
        "request_id": output.request_id,
        "prompt_token_ids": _listed(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
    }
    if not isinstance(output.outputs, list):
        data = output.outputs.data
        # Through float32, which holds every value of the smaller types exactly.
        return {
            **common,
            "dtype": str(data.dtype).removeprefix("torch."),
            "data": _packed_numbers(data.float().tolist()),
        }
    return {
        **common,
        "prompt": output.prompt,
        "prompt_logprobs": _pack_logprobs(output.prompt_logprobs),
        "outputs": [_pack_choice(choice) for choice in output.outputs],
    }


def unpack(record: Mapping[str, Any], lora_request: Any = None) -> Any:
    """The output that `pack` was given, as far as it was kept; `lora_request` is that of the prompt.

    Raises:
        KeyError, TypeError, ValueError: when the record is none of `pack`'s.
    """
    from vllm.outputs import PoolingOutput, PoolingRequestOutput, RequestOutput

    if "data" in record:
        import torch

        return PoolingRequestOutput(
            request_id=record["request_id"],
            outputs=PoolingOutput(torch.tensor(_numbers(record["data"]), dtype=getattr(torch, record["dtype"]))),
            prompt_token_ids=record["prompt_token_ids"],
            num_cached_tokens=record["num_cached_tokens"],
            finished=True,
        )
    return RequestOutput(
        request_id=record["request_id"],
        prompt=record["prompt"],
        prompt_token_ids=record["prompt_token_ids"],
        prompt_logprobs=_unpack_logprobs(record["prompt_logprobs"]),
        outputs=[_unpack_choice(choice, lora_request) for choice in record["outputs"]],
        finished=True,
        lora_request=lora_request,
        num_cached_tokens=record["num_cached_tokens"],
    )


def _pack_choice(choice: Any) -> dict[str, Any]:
    spans = getattr(choice, "weight_versions", None)  # From 0.32 on.
    return {
        "index": choice.index,
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "cumulative_logprob": _packed_numbers(choice.cumulative_logprob),
        "logprobs": _pack_logprobs(choice.logprobs),
        "weight_versions": None if spans is None else [[span.version, span.start, span.end] for span in spans],
    }


def _unpack_choice(record: Mapping[str, Any], lora_request: Any) -> Any:
    from vllm.outputs import CompletionOutput

    return CompletionOutput(
        index=record["index"],
        text=record["text"],
        token_ids=record["token_ids"],
        cumulative_logprob=_numbers(record["cumulative_logprob"]),
        logprobs=_unpack_logprobs(record["logprobs"]),
        finish_reason=record["finish_reason"],
        stop_reason=record["stop_reason"],
        lora_request=lora_request,
        **_weight_versions(record["weight_versions"]),
    )


def _weight_versions(spans: Sequence[Any] | None) -> dict[str, Any]:
    """A CompletionOutput's argument for them; none before 0.32, which has no place for them."""
    if spans is None:
        return {}
    try:
        from vllm.outputs import WeightVersionSpan
    except ImportError:
        return {}
    return {"weight_versions": [WeightVersionSpan(*span) for span in spans]}


def _pack_logprobs(positions: Any) -> list[Any] | None:
    # vLLM's two shapes of it, a list of dicts and FlatLogprobs, are read the same way.
    if positions is None:
        return None
    return [
        None
        if position is None
        else [[token, _packed_numbers(one.logprob), one.rank, one.decoded_token] for token, one in position.items()]
        for position in positions
    ]


def _unpack_logprobs(positions: Sequence[Any] | None) -> list[Any] | None:
    from vllm.logprobs import Logprob

    if positions is None:
        return None
    return [
        None
        if position is None
        else {token: Logprob(_numbers(logprob), rank, text) for token, logprob, rank, text in position}
        for position in positions
    ]


def _packed_numbers(value: Any) -> Any:
    # JSON has no infinities: a token that could not come has a logprob of -inf.
    if isinstance(value, list):
        return [_packed_numbers(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return float(value) if isinstance(value, str) else value


def _listed(values: Any) -> list[int] | None:
    return None if values is None else list(values)


def _plain(value: Any) -> Any:
    # What msgspec does not know: pydantic's dataclasses, such as structured outputs, know their fields.
    fields = getattr(value, "__dict__", None)
    if not fields:
        raise TypeError(f"{type(value).__name__} has no plain form")
    return {name: one for name, one in fields.items() if not name.startswith("_")}
