"""A batch of prompts over the ranks: just as many in flight as they can run, the rest as they free up."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
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
    slots: Callable[[], int],
    data_parallel_rank: int | None,
    lora_request: Any,
    on_error: OnError,
    progress: bool | None,
) -> list[Any]:
    """See `AsyncGroup.generate`. `slots` says how many sequences all ranks together run at a time, by now."""
    batch = _as_batch(prompts)
    all_params = _one_each("params", params, len(batch))
    loras = _one_each("lora_request", lora_request, len(batch))
    results: list[Any] = [None] * len(batch)
    prefix = uuid.uuid4().hex[:8]

    with BatchProgress(len(batch), progress) as bar:

        async def answer(index: int) -> None:
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

        await _side_by_side(len(batch), lambda: max(1, int(slots() * HEADROOM)), answer)
    if on_error == "raise":
        for result in results:
            if isinstance(result, RequestError):
                # What ended the group ended every prompt: it is no fault of this one.
                cause = result.__cause__
                raise cause if isinstance(cause, DplaunchError) and not isinstance(cause, RequestError) else result
    return results


async def _side_by_side(count: int, room: Callable[[], int], do: Callable[[int], Awaitable[None]]) -> None:
    """Does so many things in their order, `room()` of them at a time, which may grow meanwhile."""
    todo, workers = iter(range(count)), 0

    async def work() -> None:
        for index in todo:
            fill()  # ranks may have joined
            await do(index)

    def fill() -> None:
        nonlocal workers
        while workers < min(count, room()):
            workers += 1
            group.create_task(work())

    # A task group: when this task is cancelled (Ctrl-C), every worker is, and AsyncLLM aborts its request.
    async with asyncio.TaskGroup() as group:
        fill()


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
        _check(output)
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
        return _check(last)
    except RequestError as error:
        failure = RequestError(f"prompt {index}: {error.message}", index=index, retryable=error.retryable)
        failure.__cause__ = error.__cause__
        return failure
    except Exception as error:
        cause = error if isinstance(error, DplaunchError) else error.__cause__ or error
        words = cause.message if isinstance(cause, DplaunchError) else str(cause) or type(cause).__name__
        failure = RequestError(f"prompt {index} failed: {words}", index=index)
        failure.__cause__ = cause
        return failure


def _check(output: Any) -> Any:
    # What a rank dies of comes as an exception; this is an engine that could not serve the request.
    if output is None or any(part.finish_reason == "error" for part in _choices(output)):
        raise RequestError("the engine could not answer it; send it again", retryable=True)
    return output


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
