"""Batches over an engine that is played: order, how much is in flight, what becomes of a bad prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from dplaunch.batch import HEADROOM, run_batch, stream_one
from dplaunch.errors import GroupDeadError, RequestError, UsageError
from dplaunch.seam import frontend, prompts
from dplaunch.seam.prompts import SHORT, tokenize_short_ones_at_once
from dplaunch.testing import poll_until_async

BAD = "bad"


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """Imported with os.environ left as it was."""
    frontend.import_vllm(quiet=True)


class FakeRenderer:
    """Renders a prompt into itself."""

    default_cmpl_tok_params = None

    def __init__(self) -> None:
        self.elsewhere = 0
        """How many prompts were rendered while the event loop went on."""

    def render_cmpl(self, prompts: list[Any], params: None) -> list[Any]:
        return prompts

    async def render_cmpl_async(self, prompts: list[Any], params: None) -> list[Any]:
        self.elsewhere += len(prompts)
        return prompts


class FakeEngine:
    """Holds every request until it is let go, and answers with the prompt in capitals."""

    def __init__(self, *, open_gate: bool = True) -> None:
        self.running: dict[str, asyncio.Event] = {}
        self.started: list[Any] = []
        self.most = 0
        self.aborted: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.params: list[Any] = []
        self.finish_reason = "length"
        self.errors: dict[str, Exception] = {BAD: ValueError("the prompt is too long")}
        self.model_config = SimpleNamespace(
            is_encoder_decoder=False, get_diff_sampling_param=lambda: {"temperature": 0.25}
        )
        self.renderer = FakeRenderer()
        self._open = open_gate

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        prompt = prompt.get("prompt", prompt)
        self.started.append(prompt)
        self.params.append(params)
        self.options.append(options)
        gate = self.running[request_id] = asyncio.Event()
        self.most = max(self.most, len(self.running))
        try:
            await (asyncio.sleep(0) if self._open else gate.wait())
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise
        finally:
            del self.running[request_id]
        if isinstance(prompt, str) and prompt in self.errors:
            raise self.errors[prompt]
        yield self.answer("first part")
        yield self.answer(str(prompt).upper())

    def answer(self, text: str) -> Any:
        """One output."""
        part = SimpleNamespace(text=text, token_ids=[1], finish_reason=self.finish_reason)
        return SimpleNamespace(outputs=[part])

    def let_go(self, count: int) -> None:
        """Lets the requests that have run longest end."""
        for gate in list(self.running.values())[:count]:
            gate.set()


Run = Callable[..., Any]


async def run(engine: Any, prompts: Any, params: Any = None, **options: Any) -> list[Any]:
    """run_batch with defaults."""
    defaults = {"slots": 4, "data_parallel_rank": None, "lora_request": None, "on_error": "raise", "progress": False}
    arguments: dict[str, Any] = defaults | options
    slots = arguments.pop("slots")
    return await run_batch(engine, prompts, params, slots=slots if callable(slots) else lambda: slots, **arguments)


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


# Order and fullness.


async def test_answers_come_in_the_order_of_the_prompts_whatever_ends_first() -> None:
    engine = FakeEngine(open_gate=False)
    batch = asyncio.create_task(run(engine, ["a", "b", "c"]))
    await poll_until_async(lambda: len(engine.running) == 3)
    for gate in reversed(list(engine.running.values())):
        gate.set()
        await asyncio.sleep(0)
    assert texts(await batch) == ["A", "B", "C"]


async def test_ranks_are_kept_just_full_and_the_rest_is_handed_out_as_they_free_up() -> None:
    engine = FakeEngine(open_gate=False)
    full = int(8 * HEADROOM)
    batch = asyncio.create_task(run(engine, [f"p{n}" for n in range(40)], slots=8))
    await poll_until_async(lambda: len(engine.running) == full)
    for started in range(full, 40):
        assert len(engine.started) == started
        engine.let_go(1)
        await poll_until_async(lambda started=started: len(engine.started) == started + 1)  # type: ignore[misc]
    while engine.running:
        engine.let_go(full)
        await asyncio.sleep(0)
    assert texts(await batch) == [f"P{n}" for n in range(40)]
    assert engine.most == full
    assert engine.started == [f"p{n}" for n in range(40)]


async def test_a_long_answer_does_not_hold_up_the_rest() -> None:
    engine = FakeEngine(open_gate=False)
    batch = asyncio.create_task(run(engine, [f"p{n}" for n in range(20)], slots=2))
    await poll_until_async(lambda: len(engine.running) == 2 * HEADROOM)
    (slowest, *_) = engine.running.values()
    while len(engine.started) < 20 or len(engine.running) > 1:
        for gate in [gate for gate in engine.running.values() if gate is not slowest]:
            gate.set()
        await asyncio.sleep(0)
    assert not batch.done()
    slowest.set()
    assert len(await batch) == 20


async def test_one_set_of_parameters_is_made_ready_once_for_a_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    made = Mock(wraps=prompts.final_params)
    monkeypatch.setattr(prompts, "final_params", made)
    one, other = SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)
    engine = FakeEngine()
    await run(engine, ["a", "b", "c"], one)
    assert made.call_count == 1
    await run(engine, ["a", "b", "c"], [one, other, one])
    assert made.call_count == 3
    assert [params.max_tokens for params in engine.params] == [1, 1, 1, 1, 2, 1]


async def test_an_empty_batch_has_no_answers() -> None:
    assert await run(FakeEngine(), []) == []


# Kinds of prompts, and what belongs to each.


@pytest.mark.parametrize(
    ("prompts", "seen"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([1, 2, 3], [{"prompt_token_ids": [1, 2, 3]}]),
        ([[1, 2], [3]], [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]),
        ({"prompt": "x"}, ["x"]),
        ({"type": "token", "prompt_token_ids": [1]}, [{"type": "token", "prompt_token_ids": [1]}]),
        (("a", "b"), ["a", "b"]),
    ],
    ids=["a string", "strings", "token ids", "lists of token ids", "a prompt dict", "a rendered prompt", "a tuple"],
)
async def test_prompts_come_in_several_kinds(prompts: Any, seen: list[Any]) -> None:
    engine = FakeEngine()
    assert len(await run(engine, prompts)) == len(seen)
    assert engine.started == seen


async def test_a_short_prompt_is_tokenized_at_once_and_a_long_one_while_the_event_loop_goes_on() -> None:
    engine = FakeEngine()
    await run(engine, ["a" * SHORT, "b" * (SHORT + 1), {"prompt": "c"}])
    assert engine.renderer.elsewhere == 2


async def test_vllms_renderer_gets_a_short_prompt_tokenized_at_once_and_leaves_all_else_to_its_thread() -> None:
    class Renderer:
        def _tokenize_prompt(self, prompt: dict[str, Any], params: None) -> str:
            return "at once"

        async def _tokenize_prompt_async(self, prompt: dict[str, Any], params: None) -> str:
            return "in its thread"

    renderer = Renderer()
    tokenize_short_ones_at_once(renderer)
    for prompt, where in (
        ({"prompt": "a" * SHORT}, "at once"),
        ({"prompt": "a" * (SHORT + 1)}, "in its thread"),
        ({"prompt": None}, "in its thread"),
        ({}, "in its thread"),
    ):
        assert await renderer._tokenize_prompt_async(prompt, None) == where


async def test_what_is_a_requests_own_in_its_params_is_copied_for_each() -> None:
    from vllm import SamplingParams

    engine = FakeEngine()
    await run(engine, ["a", "b"], SamplingParams(extra_args={"plugin": [1]}))
    first, second = engine.params
    assert first.extra_args == second.extra_args
    assert first.extra_args is not second.extra_args
    assert first.extra_args["plugin"] is not second.extra_args["plugin"]


async def test_one_sampling_params_serves_all_and_stays_as_it_was() -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, params = FakeEngine(), SamplingParams(max_tokens=7)
    before = params.output_kind
    await run(engine, ["a", "b"], params)
    assert [p.max_tokens for p in engine.params] == [7, 7]
    assert {p.output_kind for p in engine.params} == {RequestOutputKind.FINAL_ONLY}
    assert params.output_kind is before


async def test_each_prompt_may_have_its_own_params_and_adapter() -> None:
    from vllm import SamplingParams

    engine = FakeEngine()
    own = [SamplingParams(max_tokens=n) for n in (3, 4)]
    await run(engine, ["a", "b"], own, lora_request=["adapter", None], data_parallel_rank=1)
    assert [p.max_tokens for p in engine.params] == [3, 4]
    assert [o["lora_request"] for o in engine.options] == ["adapter", None]
    assert [o["data_parallel_rank"] for o in engine.options] == [1, 1]


async def test_without_params_the_models_own_are_used() -> None:
    engine = FakeEngine()
    await run(engine, ["a"])
    assert engine.params[0].temperature == 0.25


@pytest.mark.parametrize("name", ["params", "lora_request"])
async def test_what_does_not_match_the_prompts_in_number_is_refused_before_anything_starts(name: str) -> None:
    engine = FakeEngine()
    with pytest.raises(UsageError, match=f"{name} has 2 entries for 3 prompts"):
        await run(engine, ["a", "b", "c"], **{name: [None, None]})
    assert engine.started == []


# Errors.


async def test_a_bad_prompt_fails_alone_by_index_and_the_others_finish() -> None:
    engine = FakeEngine()
    outputs = await run(engine, ["a", BAD, "c"], on_error="return")
    error = outputs[1]
    assert isinstance(error, RequestError)
    assert (error.index, error.retryable) == (1, False)
    assert error.message == "prompt 1 failed: the prompt is too long"
    assert isinstance(error.__cause__, ValueError)
    assert texts([outputs[0], outputs[2]]) == ["A", "C"]


async def test_the_first_bad_prompts_error_is_raised_after_the_others_have_finished() -> None:
    engine = FakeEngine()
    with pytest.raises(RequestError, match="prompt 1 failed"):
        await run(engine, ["a", BAD, "c", BAD], slots=1)
    assert len(engine.started) == 4


async def test_a_prompt_of_no_known_kind_is_a_bad_prompt() -> None:
    outputs = await run(FakeEngine(), ["a", 3.5], on_error="return")
    assert "prompt 1 failed: a prompt is a string, token ids or chat messages, not float" in str(outputs[1])


async def test_a_request_that_was_lost_is_named_by_index_and_says_whether_to_send_it_again() -> None:
    engine = FakeEngine()
    engine.errors["b"] = RequestError("it was on 2 ranks that died")
    with pytest.raises(RequestError, match="prompt 1: it was on 2 ranks that died") as caught:
        await run(engine, ["a", "b"])
    assert (caught.value.index, caught.value.retryable) == (1, False)


async def test_a_request_that_its_engine_could_not_serve_may_be_sent_again() -> None:
    engine = FakeEngine()
    engine.finish_reason = "error"
    (error,) = await run(engine, ["a"], on_error="return")
    assert isinstance(error, RequestError)
    assert (error.index, error.retryable) == (0, True)


async def test_the_groups_own_death_is_raised_as_itself_with_its_root_cause() -> None:
    engine = FakeEngine()
    death = GroupDeadError("1 of 2 ranks are left, 2 are needed", hint="Restarts are off", detail="the log")
    wrapped = RuntimeError("see above")
    wrapped.__cause__ = death
    engine.errors = {"a": wrapped, "b": death}
    with pytest.raises(GroupDeadError) as caught:
        await run(engine, ["a", "b"])
    assert caught.value is death
    returned = await run(engine, ["a", "b"], on_error="return")
    assert [error.message for error in returned] == [
        f"prompt {n} failed: 1 of 2 ranks are left, 2 are needed" for n in (0, 1)
    ]


async def test_an_interrupted_batch_aborts_all_that_is_in_flight_and_starts_no_more() -> None:
    engine = FakeEngine(open_gate=False)
    batch = asyncio.create_task(run(engine, [f"p{n}" for n in range(20)], slots=4))
    full = int(4 * HEADROOM)
    await poll_until_async(lambda: len(engine.running) == full)
    batch.cancel()
    await asyncio.gather(batch, return_exceptions=True)
    assert batch.cancelled()
    assert len(engine.aborted) == len(engine.started) == full
    assert engine.running == {}


# Pooling.


class FakePool:
    """An engine's queue of one request, held until it is let go."""

    def __init__(self) -> None:
        self.request_id = "internal"
        self.added: dict[str, Any] = {}
        self.model_config = SimpleNamespace(is_encoder_decoder=False)
        self.renderer = FakeRenderer()
        self.aborted: list[tuple[str, bool]] = []
        self.gate = asyncio.Event()
        self.vector = [1.0]
        self.error: Exception | None = None

    async def add_request(self, request_id: str, prompt: Any, params: Any, **options: Any) -> FakePool:
        self.added = {"prompt": prompt, **options}
        return self

    async def get(self) -> Any:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return SimpleNamespace(outputs=SimpleNamespace(data=self.vector), finished=True)

    async def abort(self, request_id: str, *, internal: bool) -> None:
        self.aborted.append((request_id, internal))


async def test_a_pooling_request_may_be_pinned_too() -> None:
    from vllm import PoolingParams

    engine = FakePool()
    engine.gate.set()
    (output,) = await run(engine, ["a"], PoolingParams(task="embed"), data_parallel_rank=1)
    assert output.outputs.data == [1.0]
    assert engine.added == {"prompt": {"prompt": "a"}, "data_parallel_rank": 1, "lora_request": None}
    assert engine.aborted == []


async def test_a_pooling_request_that_was_lost_says_why() -> None:
    from vllm import PoolingParams

    engine = FakePool()
    engine.gate.set()
    engine.error = RequestError("the request was lost: no rank took it", retryable=True)
    with pytest.raises(RequestError, match="prompt 0: the request was lost: no rank took it") as caught:
        await run(engine, ["a"], PoolingParams(task="embed"))
    assert (caught.value.index, caught.value.retryable) == (0, True)


async def test_an_interrupted_pooling_request_is_aborted() -> None:
    from vllm import PoolingParams

    engine = FakePool()
    batch = asyncio.create_task(run(engine, ["a"], PoolingParams(task="embed")))
    await poll_until_async(lambda: engine.added)
    batch.cancel()
    await asyncio.gather(batch, return_exceptions=True)
    assert engine.aborted == [("internal", True)]


# Streams.


async def test_a_stream_yields_the_pieces_of_one_answer() -> None:
    engine = FakeEngine()
    pieces = stream_one(engine, "hello", None, data_parallel_rank=1, lora_request=None)
    assert [piece async for piece in pieces] == ["first part", "HELLO"]
    assert engine.options == [{"data_parallel_rank": 1, "lora_request": None}]


async def test_a_stream_that_its_engine_could_not_serve_says_so() -> None:
    engine = FakeEngine()
    engine.finish_reason = "error"
    with pytest.raises(RequestError, match="could not answer it") as caught:
        async for _ in stream_one(engine, "hello", None, data_parallel_rank=None, lora_request=None):
            pass
    assert caught.value.retryable
