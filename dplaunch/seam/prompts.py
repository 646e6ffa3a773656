"""Prompts as users write them, made into what AsyncLLM takes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

SHORT = 4000
"""Characters of a prompt that is tokenized at once, in the event loop: about a millisecond.

vLLM has a thread for it. Where the event loop is busy, as at the start of a batch, that thread waits for it a few
milliseconds for each prompt, however short.
"""

_TOKENS = frozenset({"prompt_token_ids", "prompt"})
"""The keys of a prompt that is tokenized, and of its text."""


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages."""
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping) and "role" in prompt[0]


def _is_short(prompt: Any) -> bool:
    """Whether it takes no time to speak of to make a prompt ready: a short text, or token ids and nothing else."""
    if isinstance(prompt, Mapping):
        return "prompt_token_ids" in prompt and _TOKENS.issuperset(prompt)
    return isinstance(prompt, str) and len(prompt) <= SHORT


def tokenize_short_ones_at_once(renderer: Any) -> None:
    """Has vLLM's frontend tokenize short texts in the event loop too, for requests over HTTP and to the engine.

    Chat templates stay in its thread.

    Args:
        renderer: an AsyncLLM's.
    """
    in_thread = renderer._tokenize_prompt_async

    async def tokenize(prompt: Any, params: Any) -> Any:
        if _is_short(prompt.get("prompt")):
            return renderer._tokenize_prompt(prompt, params)
        return await in_thread(prompt, params)

    renderer._tokenize_prompt_async = tokenize


async def render(engine: Any, prompt: Any) -> Any:
    """A string, token ids, a vLLM prompt dict, or chat messages, tokenized as AsyncLLM takes it.

    Chat messages go through the model's own chat template, with a generation prompt and without a second BOS
    token, as `vllm.LLM.chat` does it.

    Raises:
        ValueError: when the prompt is empty or of no known kind, or the model has no chat template.
    """
    if is_chat(prompt):
        return await _render_chat(engine, list(prompt))
    if isinstance(prompt, Mapping) and "type" in prompt:
        return prompt  # Rendered by the caller, with vLLM's own renderer.
    if not isinstance(prompt, str | Mapping):
        if not isinstance(prompt, Sequence) or not all(isinstance(token, int) for token in prompt):
            raise ValueError(f"a prompt is a string, token ids or chat messages, not {type(prompt).__name__}")
        prompt = {"prompt_token_ids": list(prompt)}
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    renderer = engine.renderer
    parsed = parse_model_prompt(engine.model_config, prompt)
    if _is_short(prompt):
        return renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params)[0]
    inputs = await renderer.render_cmpl_async([parsed], renderer.default_cmpl_tok_params)
    return inputs[0]


def submit(
    engine: Any,
    prompt: Any,
    params: Any,
    request_id: str,
    *,
    data_parallel_rank: int | None,
    lora_request: Any,
) -> AsyncIterator[Any]:
    """Hands a rendered prompt to the engine; yields its final output alone.

    Args:
        params: what `final_params` made.
    """
    from vllm.pooling_params import PoolingParams

    if isinstance(params, PoolingParams):
        return _pool(engine, prompt, params, request_id, data_parallel_rank, lora_request)
    outputs: AsyncIterator[Any] = engine.generate(
        prompt,
        params.clone(),
        request_id,
        prompt_text=prompt.get("prompt"),  # Given back with the output.
        data_parallel_rank=data_parallel_rank,
        lora_request=lora_request,
    )
    return outputs


def final_params(engine: Any, params: Any) -> Any:
    """Parameters for requests of a batch: one message at the end, which has no use for the steps in between.

    Each request gets a copy, and vLLM makes another one; these are shallow where nothing in them is a request's own.

    Args:
        params: SamplingParams, PoolingParams, or None for the model's own.
    """
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import RequestOutputKind

    if isinstance(params, PoolingParams):
        return params
    params = (default_params(engine) if params is None else params).clone()
    params.output_kind = RequestOutputKind.FINAL_ONLY
    params.skip_clone = params.extra_args is None and params.structured_outputs is None
    return params


async def _pool(
    engine: Any, prompt: Any, params: Any, request_id: str, data_parallel_rank: int | None, lora_request: Any
) -> AsyncIterator[Any]:
    # AsyncLLM.encode does this too, but cannot pin.
    queue = await engine.add_request(
        request_id, prompt, params, data_parallel_rank=data_parallel_rank, lora_request=lora_request
    )
    output = None
    try:
        output = await queue.get()
    finally:
        if output is None:
            await engine.abort(queue.request_id, internal=True)
    yield output


def default_params(engine: Any) -> Any:
    """The model's own sampling parameters (its generation_config.json), as `vllm.LLM` uses them."""
    from vllm import SamplingParams

    return SamplingParams(**engine.model_config.get_diff_sampling_param())


def model_name(engine: Any) -> str:
    """The model as vLLM was told it: a name, with its revision, or a directory's path without links."""
    name, revision = str(engine.model_config.model), engine.model_config.revision
    if os.path.exists(name):
        return os.path.realpath(name)
    return f"{name}@{revision}" if revision else name


def delta_params(engine: Any, params: Any) -> Any:
    """The parameters for a stream: each output carries only what is new."""
    from vllm.sampling_params import RequestOutputKind

    params = (default_params(engine) if params is None else params).clone()
    params.output_kind = RequestOutputKind.DELTA
    return params


async def _render_chat(engine: Any, messages: list[Any]) -> Any:
    from vllm.renderers import ChatParams

    renderer = engine.renderer
    params = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
    tokens = renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
    _, inputs = await renderer.render_chat_async([messages], params, tokens)
    return inputs[0]
