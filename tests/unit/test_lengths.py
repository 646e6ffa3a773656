"""What was long is begun first: what is remembered of a prompt, and the order that a batch makes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from dplaunch import lengths as lengths_module
from dplaunch.batch import run_batch
from dplaunch.lengths import AnswerLengths
from dplaunch.seam import frontend


def test_without_a_memory_prompts_keep_their_order() -> None:
    assert AnswerLengths().longest_first(["a", "b", "c"], [2, 0]) == [2, 0]


def test_unknown_prompts_go_first_in_their_order_then_the_longest() -> None:
    lengths = AnswerLengths()
    for prompt, tokens in {"short": 3, "long": 90, "middle": 20}.items():
        lengths.note(prompt, tokens)
    assert lengths.longest_first(["short", "new", "middle", "long", "also new"], range(5)) == [1, 4, 3, 2, 0]


def test_the_newest_answer_of_a_prompt_counts_half() -> None:
    lengths = AnswerLengths()
    lengths.note("a", 100)
    lengths.note("a", 10)  # 55
    lengths.note("b", 60)
    assert lengths.longest_first(["a", "b"], [0, 1]) == [1, 0]


@pytest.mark.parametrize(
    "prompt",
    [
        "text",
        [1, 2, 3],
        [{"role": "user", "content": "hello"}],
        {"prompt_token_ids": (4, 5)},
    ],
)
def test_every_kind_of_prompt_is_found_again_by_its_content(prompt: Any) -> None:
    lengths = AnswerLengths()
    lengths.note(prompt, 5)
    lengths.note("another", 9)
    again = type(prompt)(prompt)
    assert lengths.longest_first([again, "another"], [0, 1]) == [1, 0]


def test_a_prompt_with_an_object_in_it_is_not_remembered_and_goes_first() -> None:
    lengths = AnswerLengths()
    image = {"prompt": "look", "multi_modal_data": {"image": object()}}
    lengths.note(image, 5)
    assert len(lengths) == 0
    lengths.note("text", 5)
    assert lengths.longest_first(["text", image], [0, 1]) == [1, 0]


def test_no_more_prompts_are_remembered_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "MOST", 2)
    lengths = AnswerLengths()
    for prompt in ("a", "b", "a", "c"):
        lengths.note(prompt, 5)
    assert len(lengths) == 2
    assert lengths.longest_first(["a", "b", "c"], range(3)) == [1, 0, 2], "b was not asked for longest"


class TellingEngine:
    """Answers each prompt with as many tokens as the prompt says, at once, and notes in which order they came."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.model_config = SimpleNamespace(is_encoder_decoder=False, get_diff_sampling_param=dict)
        self.renderer = SimpleNamespace(default_cmpl_tok_params=None, render_cmpl=self._render)

    def _render(self, prompts: list[Any], params: None) -> list[Any]:
        return prompts

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        text = prompt.get("prompt", prompt)
        self.started.append(text)
        part = SimpleNamespace(text="", token_ids=[1] * int(text), finish_reason="stop")
        yield SimpleNamespace(outputs=[part])


PROMPTS = ["4", "40", "1", "9", "30"]


@pytest.mark.parametrize(
    ("options", "second"),
    [
        ({}, ["40", "30", "9", "4", "1"]),
        ({"data_parallel_rank": 1}, PROMPTS),  # placed by the user: left as it is
        ({"slots": lambda: 5}, PROMPTS),  # all begin at once
    ],
)
async def test_a_batch_that_is_asked_again_begins_with_its_longest_answers(
    options: dict[str, Any], second: list[str]
) -> None:
    frontend.import_vllm(quiet=True)
    engine, lengths = TellingEngine(), AnswerLengths()
    arguments = {"slots": lambda: 1, "progress": False, "lengths": lengths, **options}
    for expected in (PROMPTS, second):
        engine.started.clear()
        outputs = await run_batch(engine, PROMPTS, None, **arguments)
        assert engine.started == expected
        assert [len(output.outputs[0].token_ids) for output in outputs] == [int(text) for text in PROMPTS]
