"""Batches that are read as they finish, and batches that go on from a file, over an engine that is played."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dplaunch.batch import HEADROOM, iter_batch
from dplaunch.batch_progress import BatchState
from dplaunch.errors import RequestError, ResultsFileError, UsageError
from dplaunch.seam import frontend
from dplaunch.testing import poll_until_async
from tests.unit.test_batch import BAD, FakeEngine, run, texts


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """Imported with os.environ left as it was."""
    frontend.import_vllm(quiet=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


class Engine(FakeEngine):
    """Answers with vLLM's own outputs."""

    def __init__(self, *, open_gate: bool = True, model: str = "played") -> None:
        super().__init__(open_gate=open_gate)
        self.model_config = SimpleNamespace(
            model=model, revision=None, is_encoder_decoder=False, get_diff_sampling_param=dict
        )

    def answer(self, text: str) -> Any:
        from vllm.outputs import CompletionOutput, RequestOutput

        choice = CompletionOutput(0, text, [len(text)], None, None, finish_reason=self.finish_reason)
        return RequestOutput("r", text.lower(), [1], None, [choice], True)


def iterate(engine: Any, prompts: Any, **options: Any) -> AsyncIterator[tuple[int, Any]]:
    return iter_batch(engine, prompts, None, **{"slots": lambda: 4, "progress": False, **options})


# As they finish.


async def test_answers_are_yielded_as_they_finish_with_their_index() -> None:
    engine = Engine(open_gate=False)
    outputs = iterate(engine, ["a", "b", "c"])
    first = asyncio.ensure_future(anext(outputs))
    await poll_until_async(lambda: len(engine.running) == 3)
    gates = list(engine.running.values())
    gates[2].set()
    index, output = await first
    assert (index, texts([output])) == (2, ["C"])
    gates[0].set()
    assert (await anext(outputs))[0] == 0
    gates[1].set()
    assert (await anext(outputs))[0] == 1
    with pytest.raises(StopAsyncIteration):
        await anext(outputs)


async def test_the_ranks_do_not_wait_for_the_reader() -> None:
    engine = Engine()
    async with contextlib.aclosing(iterate(engine, [f"p{n}" for n in range(50)])) as outputs:  # type: ignore[type-var]
        await anext(outputs)
        await poll_until_async(lambda: len(engine.started) == 50 and not engine.running)


async def test_leaving_early_aborts_what_is_in_flight_and_starts_no_more() -> None:
    engine = Engine(open_gate=False)
    full = int(4 * HEADROOM)
    async with contextlib.aclosing(iterate(engine, [f"p{n}" for n in range(20)])) as outputs:  # type: ignore[type-var]
        first = asyncio.ensure_future(anext(outputs))
        await poll_until_async(lambda: len(engine.running) == full)
        engine.let_go(1)
        await first
        await poll_until_async(lambda: len(engine.running) == full)
    assert engine.running == {}
    assert (len(engine.aborted), len(engine.started)) == (full, full + 1)


async def test_failed_prompts_are_left_out_and_the_first_ones_error_is_raised_at_the_end() -> None:
    found: list[int] = []

    async def read() -> None:
        async for index, _ in iterate(Engine(), ["a", BAD, "c", BAD]):
            found.append(index)

    with pytest.raises(RequestError, match="prompt 1 failed"):
        await read()
    assert sorted(found) == [0, 2]


async def test_failed_prompts_are_yielded_where_that_is_asked() -> None:
    found = {index: output async for index, output in iterate(Engine(), ["a", BAD], on_error="return")}
    assert isinstance(found[1], RequestError)


# From a file.


async def test_what_is_in_the_file_is_not_asked_again_and_the_order_is_that_of_the_prompts(path: Path) -> None:
    first, second = Engine(), Engine()
    await run(first, ["b", "d"], resume=path)
    assert texts(await run(second, ["a", "b", "c", "d"], resume=path)) == ["A", "B", "C", "D"]
    assert sorted(second.started) == ["a", "c"]


async def test_a_batch_that_is_all_there_asks_nothing(path: Path) -> None:
    await run(Engine(), ["a", "a", "b"], resume=path)
    again = Engine()
    assert texts(await run(again, ["a", "b", "a"], resume=path)) == ["A", "B", "A"]
    assert again.started == []


async def test_a_copy_too_many_is_asked(path: Path) -> None:
    await run(Engine(), ["a", "a"], resume=path)
    again = Engine()
    assert texts(await run(again, ["a"] * 3, resume=path)) == ["A"] * 3
    assert again.started == ["a"]


async def test_what_is_in_the_file_comes_first_and_the_rest_is_under_way_meanwhile(path: Path) -> None:
    await run(Engine(), ["a", "c"], resume=path)
    engine = Engine(open_gate=False)
    outputs = iterate(engine, ["a", "b", "c"], resume=path)
    assert [(await anext(outputs))[0]] == [0]
    await poll_until_async(lambda: len(engine.running) == 1)
    assert [(await anext(outputs))[0]] == [2]
    engine.let_go(1)
    assert [index async for index, _ in outputs] == [1]


async def test_an_error_is_not_written_so_the_next_call_tries_again(path: Path) -> None:
    outputs = await run(Engine(), ["a", BAD], resume=path, on_error="return")
    assert isinstance(outputs[1], RequestError)
    again = Engine()
    again.errors = {}
    assert texts(await run(again, ["a", BAD], resume=path)) == ["A", "BAD"]
    assert again.started == [BAD]


async def test_with_errors_raised_what_was_answered_is_in_the_file(path: Path) -> None:
    with pytest.raises(RequestError):
        await run(Engine(), ["a", BAD, "c"], resume=path)
    assert len(path.read_text().splitlines()) == 3


async def test_an_answer_that_was_broken_off_is_not_written(path: Path) -> None:
    engine = Engine()
    engine.finish_reason = "abort"
    await run(engine, ["a"], resume=path)
    assert len(path.read_text().splitlines()) == 1


async def test_an_interrupted_batch_keeps_what_was_answered_and_lets_the_file_go(path: Path) -> None:
    engine = Engine(open_gate=False)
    batch = asyncio.create_task(run(engine, ["a", "b", "c"], resume=path))
    await poll_until_async(lambda: len(engine.running) == 3)
    engine.let_go(1)
    await poll_until_async(lambda: len(path.read_text().splitlines()) == 2)
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    again = Engine()
    assert texts(await run(again, ["a", "b", "c"], resume=path)) == ["A", "B", "C"]
    assert again.started == ["b", "c"]


async def test_the_models_own_params_are_the_same_as_if_they_had_been_given(path: Path) -> None:
    from vllm import SamplingParams

    await run(Engine(), ["a"], resume=path)
    again = Engine()
    await run(again, ["a"], SamplingParams(), resume=path)
    assert again.started == []
    await run(again, ["a"], SamplingParams(max_tokens=3), resume=path)
    assert again.started == ["a"]


async def test_answers_of_other_weights_are_asked_again(path: Path) -> None:
    engine = Engine()
    for weights, asked in (("v1", 1), ("v2", 2), ("v1", 2)):
        await run(engine, ["a"], resume=path, weights=weights)
        assert len(engine.started) == asked


async def test_a_file_of_another_model_is_refused_before_anything_is_asked(path: Path, tmp_path: Path) -> None:
    await run(Engine(), ["a"], resume=path)
    other = Engine(model=str(tmp_path))
    with pytest.raises(ResultsFileError, match=f"holds results of 'played', and this group's model is '{tmp_path}'"):
        await run(other, ["a"], resume=path)
    assert other.started == []


async def test_a_disk_that_fills_up_ends_the_batch_with_that_and_aborts_the_rest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(open_gate=False)
    batch = asyncio.create_task(run(engine, ["a", "b"], resume=path))
    await poll_until_async(lambda: len(engine.running) == 2)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    engine.let_go(1)
    with pytest.raises(ResultsFileError, match="takes no more: No space left on device"):
        await batch
    assert len(engine.aborted) == 1


async def test_a_saved_answer_that_was_changed_by_hand_is_named(path: Path) -> None:
    await run(Engine(), ["a"], resume=path)
    header, line = path.read_text().splitlines()
    record = json.loads(line)
    del record["output"]["outputs"][0]["text"]
    path.write_text(f"{header}\n{json.dumps(record)}\n")
    with pytest.raises(ResultsFileError, match="holds no whole result for prompt 0: KeyError"):
        await run(Engine(), ["a"], resume=path)


async def test_params_that_no_key_can_be_made_of_are_refused(path: Path) -> None:
    from vllm import SamplingParams

    params = SamplingParams(extra_args={"what": object()})
    with pytest.raises(UsageError, match="no key can be made of the params of prompt 0"):
        await run(Engine(), ["a"], params, resume=path)
    assert not path.exists()


async def test_a_key_without_a_file_is_refused() -> None:
    with pytest.raises(UsageError, match="key is given without resume"):
        await run(Engine(), ["a"], key=str)


async def test_a_function_that_watches_is_told_what_came_from_the_file_and_how_ranks_share(path: Path) -> None:
    await run(Engine(), ["a"], resume=path)
    told: list[BatchState] = []
    counted = {0: 5, 1: 5}
    engine = Engine(open_gate=False)
    batch = asyncio.create_task(run(engine, ["a", "b"], resume=path, progress=told.append, rank_tokens=lambda: counted))
    await poll_until_async(lambda: len(engine.running) == 1)
    counted |= {0: 8, 1: 6}
    engine.let_go(1)
    await batch
    assert [(state.done, state.total, state.resumed, state.shares) for state in told] == [(2, 2, 1, {0: 0.75, 1: 0.25})]


async def test_what_a_function_that_watches_raises_ends_the_batch() -> None:
    def stop(state: BatchState) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run(Engine(), ["a"], progress=stop)
