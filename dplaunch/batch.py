"""A batch of prompts over the ranks: just as many in flight as they can run, the rest as they free up."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

from dplaunch.errors import DplaunchError, RequestError, UsageError
from dplaunch.progress import BatchProgress
from dplaunch.seam import prompts as seam_prompts

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A string, token ids, chat messages, or one of vLLM's prompt dicts."""

OnError = Literal["raise", "return"]

HEADROOM = 1.25
"""How many requests a rank gets for each sequence that it can run: the next one is there when one ends."""


async def run_batch(
    engine: Any,
    prompts: Prompt | Sequence[Prompt],
    params: Any,
    *,
    slots: int,
    data_parallel_rank: int | None,
    lora_request: Any,
    on_error: OnError,
    progress: bool | None,
) -> list[Any]:
    """See `AsyncGroup.generate`. `slots` is the number of sequences that all ranks together run at a time."""
    batch = _as_batch(prompts)
    all_params = _one_each("params", params, len(batch))
    loras = _one_each("lora_request", lora_request, len(batch))
    results: list[Any] = [None] * len(batch)
    todo = iter(range(len(batch)))
    prefix = uuid.uuid4().hex[:8]

    async def work(bar: BatchProgress) -> None:
        for index in todo:
            results[index] = await _one(
                engine,
                batch[index],
                all_params[index],
                request_id=f"{prefix}-{index}",
                index=index,
                data_parallel_rank=data_parallel_rank,
                lora_request=loras[index],
            )
            bar.advance(_tokens(results[index]))

    workers = min(len(batch), max(1, int(slots * HEADROOM)))
    with BatchProgress(len(batch), progress) as bar:
        # A task group: when this task is cancelled (Ctrl-C), every worker is, and AsyncLLM aborts its request.
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(work(bar))
    if on_error == "raise":
        for result in results:
            if isinstance(result, RequestError):
                # What ended the group ended every prompt: it is no fault of this one.
                raise result.__cause__ if isinstance(result.__cause__, DplaunchError) else result
    return results


async def stream_one(
    engine: Any, prompt: Prompt, params: Any, *, data_parallel_rank: int | None, lora_request: Any
) -> AsyncGenerator[str, None]:
    """See `AsyncGroup.stream`."""
    outputs = engine.generate(
        await seam_prompts.render(engine, prompt),
        seam_prompts.delta_params(engine, params),
        f"stream-{uuid.uuid4().hex[:8]}",
        data_parallel_rank=data_parallel_rank,
        lora_request=lora_request,
    )
    async for output in outputs:
        _check(output, None)
        if output.outputs[0].text:
            yield output.outputs[0].text


async def _one(
    engine: Any,
    prompt: Prompt,
    params: Any,
    *,
    request_id: str,
    index: int,
    data_parallel_rank: int | None,
    lora_request: Any,
) -> Any:
    """One prompt's final output, or the RequestError that it ended with: a bad prompt fails alone."""
    try:
        rendered = await seam_prompts.render(engine, prompt)
        outputs = seam_prompts.submit(
            engine,
            rendered,
            params,
            request_id,
            data_parallel_rank=data_parallel_rank,
            lora_request=lora_request,
        )
        last = None
        async for output in outputs:
            last = output
        return _check(last, index)
    except RequestError as error:
        return error
    except Exception as error:
        cause = error if isinstance(error, DplaunchError) else error.__cause__ or error
        words = cause.message if isinstance(cause, DplaunchError) else str(cause) or type(cause).__name__
        failure = RequestError(f"prompt {index} failed: {words}", index=index)
        failure.__cause__ = cause
        return failure


def _check(output: Any, index: int | None) -> Any:
    if output is None or any(part.finish_reason == "error" for part in _choices(output)) or _is_empty_vector(output):
        name = "the request" if index is None else f"prompt {index}"
        raise RequestError(
            f"{name} was lost when its rank died; send it again",
            index=index,
            retryable=True,
        )
    return output


def _is_empty_vector(output: Any) -> bool:
    vector = getattr(output.outputs, "data", None)
    return vector is not None and len(vector) == 0


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    batch: list[Any] = list(prompts)
    if batch and (isinstance(batch[0], int) or seam_prompts.is_chat(batch)):
        return [batch]
    return batch


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, Sequence):
        return list(itertools.repeat(value, count))
    if len(value) != count:
        raise UsageError(f"{name} has {len(value)} entries for {count} prompts", hint="Give one, or one for each.")
    return list(value)


def _tokens(result: Any) -> int:
    return sum(len(part.token_ids) for part in _choices(result))


def _choices(result: Any) -> Sequence[Any]:
    # A pooling output has `outputs` too, but one that is no list.
    choices = getattr(result, "outputs", None)
    return choices if isinstance(choices, list) else ()
