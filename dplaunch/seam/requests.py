"""Requests and outputs of vLLM, changed for a rank that takes a request over from another.

By attribute and without importing vLLM. Checked with 0.26 to 0.33: `EngineCoreRequest`, `EngineCoreOutput`,
`SamplingParams`, and that `LogprobsLists` and `SamplingMaskLists` in an output hold that request's rows alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec


def continued(request: Any, tokens: Sequence[int]) -> Any:
    """The request that gives the rest of an answer: its tokens so far stand behind the prompt.

    What vLLM does itself with a request that it preempts: the prompt and the output are computed anew.
    """
    params = copy.copy(request.sampling_params)
    if params.max_tokens is not None:
        params.max_tokens -= len(tokens)
    params.min_tokens = max(0, params.min_tokens - len(tokens))
    # They came with the first token.
    _clear(params, "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start")
    return msgspec.structs.replace(
        request, prompt_token_ids=[*request.prompt_token_ids, *tokens], sampling_params=params
    )


def forget_prompt(output: Any) -> None:
    """Takes out of an output what is said of a prompt once, and was said: the frontend would count it twice."""
    _clear(output, "new_prompt_logprobs_tensors", "prompt_token_id_logprobs", "prefill_stats", "events")


def cut_front(output: Any, count: int) -> None:
    """Takes the first tokens out of an output, with all that belongs to them."""
    left = len(output.new_token_ids) - count
    output.new_token_ids = output.new_token_ids[count:]
    if output.new_logprobs is not None:
        output.new_logprobs = output.new_logprobs.slice_request(count, left)
    # vLLM has it from 0.28 on.
    if (mask := getattr(output, "new_sampling_mask", None)) is not None:
        output.new_sampling_mask = mask.slice_request(count, left) if left else None


def is_seen_at_its_end(request: Any) -> bool:
    """Whether nobody sees the answer of an EngineCoreRequest before its end, vLLM's frontend included.

    So it is with what `AsyncGroup.generate` asks. The frontend looks at each token where a text may end the answer, or
    logprobs are wanted. Who aborts his request sees it then: `seam.frontend` brings what there is.
    """
    params = request.sampling_params
    return (
        params is not None
        and params.output_kind.name == "FINAL_ONLY"
        and not params.stop
        and params.logprobs is None
        and not request.resumable
    )


def most_tokens(request: Any) -> int | None:
    """How many tokens the answer of an EngineCoreRequest has at most; None where there is no bound, or no answer."""
    params = request.sampling_params
    return None if params is None or request.resumable else params.max_tokens


def has_tokens_alone(output: Any) -> bool:
    """Whether an EngineCoreOutput has tokens, and says nothing else of its request."""
    # An array does not say yes or no when it is compared.
    if output.routed_experts is not None:
        return False
    # Asked for each token: the fastest comparison is that of msgspec.
    alone = _tokens_alone(output.__class__)
    alone.request_id, alone.new_token_ids = output.request_id, output.new_token_ids
    return bool(output == alone)


@functools.cache
def _tokens_alone(kind: Callable[[str, list[int]], Any]) -> Any:
    return kind("", [])


def _clear(struct: Any, *names: str) -> None:
    # The logprobs of chosen tokens of a prompt are there from 0.31 on.
    for name in set(names).intersection(struct.__struct_fields__):
        setattr(struct, name, None)


def departures(params: Any) -> set[str]:
    """The fields of a SamplingParams that are not as vLLM has them by default."""
    defaults = type(params)()
    return {name for name in type(params).__struct_fields__ if _differ(getattr(params, name), getattr(defaults, name))}


def _differ(value: Any, default: Any) -> bool:
    # A numpy array compares element by element.
    return type(value) is not type(default) or bool(value != default)
