"""A batch of prompts over the ranks: just as many in flight as they can run, the rest as they free up."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

from dplaunch.batch_progress import BatchProgress, Progress
from dplaunch.errors import DplaunchError, RequestError, UsageError
from dplaunch.lengths import AnswerLengths
from dplaunch.resume_keys import Keys
from dplaunch.saved_batch import Resume, SavedBatch
from dplaunch.seam import prompts as seam_prompts
from dplaunch.side_by_side import SideBySide

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A string, token ids, chat messages, or one of vLLM's prompt dicts."""

OnError = Literal["raise", "return"]

HEADROOM = 1.5
"""How many requests a rank gets for each sequence that it can run: the next ones are there when many end at once."""


async def run_batch(engine: Any, prompts: Prompt | Sequence[Prompt], params: Any, **options: Any) -> list[Any]:
    """See `AsyncGroup.generate`; the options are those of `iter_batch`."""
    results: list[Any] = [None] * len(_as_batch(prompts))
    async with contextlib.aclosing(iter_batch(engine, prompts, params, **options)) as outputs:
        async for index, output in outputs:
            results[index] = output
    return results


async def iter_batch(
    engine: Any,
    prompts: Prompt | Sequence[Prompt],
    params: Any,
    *,
    slots: Callable[[], int],
    data_parallel_rank: int | None = None,
    lora_request: Any = None,
    on_error: OnError = "raise",
    progress: Progress = None,
    resume: Resume = None,
    key: Keys | None = None,
    weights: str | None = None,
    rank_tokens: Callable[[], Mapping[int, int]] = dict,
    lengths: AnswerLengths | None = None,
) -> AsyncGenerator[tuple[int, Any], None]:
    """See `AsyncGroup.generate_iter`.

    Args:
        slots: how many sequences all ranks together run at a time, by now.
        weights: the version of the weights that answer; answers of others are not taken from a results file.
        rank_tokens: the tokens that each rank has answered so far.
        lengths: how long answers were before. A batch that is pinned to a rank is begun in the order of its prompts.
    """
    batch = _Batch(engine, prompts, params, lora_request, data_parallel_rank)
    numbers = range(len(batch.prompts))
    failed: dict[int, RequestError] = {}
    with contextlib.ExitStack() as stack:
        kept = SavedBatch(engine, batch.prompts, batch.params, batch.loras, resume=resume, key=key, weights=weights)
        saved = stack.enter_context(kept)
        there = [index for index in numbers if saved.has(index)]
        todo = [index for index in numbers if not saved.has(index)]
        if lengths is not None and data_parallel_rank is None and len(todo) > slots():
            todo = lengths.longest_first(batch.prompts, todo)
        counted = BatchProgress(len(numbers), progress, resumed=len(there), rank_tokens=rank_tokens)
        bar = stack.enter_context(counted)

        async def answer(index: int) -> Any:
            result = await batch.answer(index)
            await saved.keep(index, result)
            tokens = _tokens(result)
            if lengths is not None and tokens:
                lengths.note(batch.prompts[index], tokens)
            bar.advance(tokens)
            return result

        # The ranks have work already while the reader gets what is there.
        async with SideBySide(todo, lambda: max(1, int(slots() * HEADROOM)), answer) as finished:
            for index in there:
                yield index, saved.output(index)
            async for index, result in finished:
                if isinstance(result, RequestError) and on_error == "raise":
                    failed[index] = result
                else:
                    yield index, result
    if failed:
        _raise_first(failed)


def _raise_first(failed: Mapping[int, RequestError]) -> NoReturn:
    error = failed[min(failed)]
    # What ended the group ended every prompt: it is no fault of this one.
    cause = error.__cause__
    raise cause if isinstance(cause, DplaunchError) and not isinstance(cause, RequestError) else error


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


class _Batch:
    """Prompts with what belongs to each, and how one is answered."""

    def __init__(
        self, engine: Any, prompts: Prompt | Sequence[Prompt], params: Any, lora_request: Any, rank: int | None
    ) -> None:
        self.prompts = _as_batch(prompts)
        self.params = _one_each("params", params, len(self.prompts))
        final = {key: seam_prompts.final_params(engine, each) for key, each in {id(p): p for p in self.params}.items()}
        self._final = [final[id(each)] for each in self.params]
        self.loras = _one_each("lora_request", lora_request, len(self.prompts))
        self._engine = engine
        self._rank = rank
        self._prefix = f"batch-{uuid.uuid4().hex[:8]}"

    async def answer(self, index: int) -> Any:
        """One prompt's final output, or the RequestError that it ended with: a bad prompt fails alone."""
        try:
            rendered = await seam_prompts.render(self._engine, self.prompts[index])
            outputs = seam_prompts.submit(
                self._engine,
                rendered,
                self._final[index],
                f"{self._prefix}-{index}",
                data_parallel_rank=self._rank,
                lora_request=self.loras[index],
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
