"""Answers that are seen at their end: the frontend gets their tokens in larger pieces, and none is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest

from dplaunch.kept import PIECE
from dplaunch.seam import frontend
from dplaunch.seam.requests import has_tokens_alone
from dplaunch.spec import RequestPolicy
from tests.unit.test_client import Rig, request

NAME = "batch-1234-0"


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    frontend.import_vllm(quiet=True)


def of_batch(name: str = NAME, **params: Any) -> Any:
    """What a batch asks of an engine, and others too: the end alone is to be seen."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    made = request(f"{name}-f00d")
    made.external_req_id = name
    made.sampling_params = SamplingParams(
        **{"temperature": 0.0, "max_tokens": 16, "output_kind": RequestOutputKind.FINAL_ONLY} | params
    )
    return made


def tokens(*ids: int, ends: bool = False, name: str = NAME, **fields: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    return EngineCoreOutput(f"{name}-f00d", list(ids), finish_reason=FinishReason.STOP if ends else None, **fields)


def told(rig: Rig) -> list[list[int]]:
    """The tokens of each output that the frontend gets now."""
    return [part.new_token_ids for outcome in rig.outcomes() for part in outcome.outputs]


def gathering(ranks: int = 1) -> Rig:
    return Rig(ranks, gathers=True)


def test_the_frontend_gets_a_short_answer_with_its_end() -> None:
    rig = gathering()
    rig.client.add(of_batch())
    for token in (5, 6, 7):
        rig.answer(0, tokens(token))
    assert rig.outcomes() == []
    rig.answer(0, tokens(8, 9, ends=True))
    (outcome,) = rig.outcomes()
    (part,) = outcome.outputs
    assert part.new_token_ids == [5, 6, 7, 8, 9]
    assert part.finished
    assert outcome.engine_index == 0
    assert rig.client.unfinished == 0


@pytest.mark.parametrize("most", [None, 1000])
def test_a_long_answer_comes_in_pieces_and_each_token_once(most: int | None) -> None:
    rig = gathering()
    rig.client.add(of_batch(max_tokens=most))
    for token in range(150):
        rig.answer(0, tokens(token))
    rig.answer(0, tokens(150, ends=True))
    pieces = told(rig)
    assert [token for piece in pieces for token in piece] == list(range(151))
    assert [len(piece) for piece in pieces] == [PIECE, PIECE, 151 - 2 * PIECE]


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(128, [64, 32, 16, 8, 4, 4]), (100, [50, 25, 12, 6, 4, 3]), (9, [4, 4, 1]), (5, [4, 1]), (4, [4]), (1, [1])],
)
def test_a_piece_is_no_longer_than_what_is_left_so_that_little_is_to_be_done_at_the_end(
    most: int, sizes: list[int]
) -> None:
    rig = gathering()
    rig.client.add(of_batch(max_tokens=most))
    for token in range(most):
        rig.answer(0, tokens(token, ends=token == most - 1))
    assert [len(piece) for piece in told(rig)] == sizes


def test_answers_that_begin_together_do_not_all_fill_a_piece_at_once() -> None:
    rig = gathering()
    for number in range(PIECE):
        rig.client.add(of_batch(f"batch-{number}", max_tokens=1000))
    pieces = []
    for _ in range(PIECE):
        rig.answer(0, *(tokens(5, name=f"batch-{number}") for number in range(PIECE)))
        pieces.append(len(told(rig)))
    assert pieces == [1 for _ in range(PIECE)]


def test_tokens_that_are_kept_are_counted_as_they_come() -> None:
    rig = gathering()
    rig.client.add(of_batch())
    rig.answer(0, tokens(5))
    rig.answer(0, tokens(6, 7))
    assert rig.client.rank_counters[0].tokens == 3


def test_what_says_more_than_tokens_is_handed_on_at_once_with_those_before_it() -> None:
    rig = gathering()
    rig.client.add(of_batch())
    rig.answer(0, tokens(5))
    rig.answer(0, tokens(6, kv_transfer_params={"a": 1}))
    rig.answer(0, tokens(7))
    rig.answer(0, tokens(ends=True))
    assert told(rig) == [[5, 6], [7]]


def test_an_answer_that_ends_without_a_further_token_still_has_all() -> None:
    rig = gathering()
    rig.client.add(of_batch())
    rig.answer(0, tokens(5))
    rig.answer(0, tokens(ends=True))
    assert told(rig) == [[5]]


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(lambda: of_batch(stop=["."]), id="a text that ends it"),
        pytest.param(lambda: of_batch(logprobs=1), id="logprobs"),
        pytest.param(lambda: _streamed(), id="each output is wanted"),
    ],
)
def test_whoever_looks_at_each_token_gets_it_as_it_comes(asked: Any) -> None:
    rig, made = gathering(), asked()
    rig.client.add(made)
    rig.answer(0, tokens(5, name=made.external_req_id))
    rig.answer(0, tokens(6, name=made.external_req_id))
    assert told(rig) == [[5], [6]]


def _streamed(name: str = NAME) -> Any:
    from vllm.sampling_params import RequestOutputKind

    return of_batch(name, output_kind=RequestOutputKind.DELTA)


def test_what_came_of_an_answer_can_be_read_before_the_frontend_has_it() -> None:
    rig = gathering()
    rig.client.add(of_batch())
    rig.client.add(_streamed("stream-1"))
    rig.answer(0, tokens(5), tokens(15, name="stream-1"))
    rig.answer(0, tokens(6, 7), tokens(16, name="stream-1"))
    assert rig.client.gathered(f"{NAME}-f00d") == ([5, 6, 7], None)
    assert rig.client.gathered("stream-1-f00d") == ((), None)
    assert rig.client.gathered("never seen") == ((), None)


def test_where_metrics_are_collected_each_token_is_handed_on() -> None:
    rig = Rig(1)
    rig.client.add(of_batch())
    rig.answer(0, tokens(5))
    assert told(rig) == [[5]]


def test_two_answers_are_kept_apart() -> None:
    rig = gathering()
    rig.client.add(of_batch("batch-1"))
    rig.client.add(of_batch("batch-2"))
    rig.answer(0, tokens(5, name="batch-1"), tokens(15, name="batch-2"))
    rig.answer(0, tokens(6, name="batch-1", ends=True), tokens(16, name="batch-2"))
    rig.answer(0, tokens(17, name="batch-2", ends=True))
    assert told(rig) == [[5, 6], [15, 16, 17]]


def test_a_request_that_moves_brings_the_tokens_that_were_kept() -> None:
    rig = gathering(2)
    rig.client.add(of_batch())
    (first,) = (rank for rank, link in rig.links.items() if link.added)
    rig.answer(first, tokens(5))
    rig.answer(first, tokens(6))
    rig.down(first)
    (other,) = rig.links
    ((_, sent_again),) = rig.links[other].sent
    assert sent_again.prompt_token_ids == [1, 2, 3, 5, 6]
    rig.answer(other, tokens(7))
    rig.answer(other, tokens(8, ends=True))
    assert told(rig) == [[5, 6, 7, 8]]


def test_an_answer_that_is_repeated_elsewhere_is_told_once() -> None:
    rig = gathering(2)
    rig.client.add(of_batch(presence_penalty=0.5))
    (first,) = (rank for rank, link in rig.links.items() if link.added)
    rig.answer(first, tokens(5, 6))
    rig.down(first)
    (other,) = rig.links
    for token in (5, 6, 7):
        rig.answer(other, tokens(token))
    rig.answer(other, tokens(8, ends=True))
    assert told(rig) == [[5, 6, 7, 8]]


def test_an_aborted_request_leaves_nothing_that_the_next_one_of_its_name_would_get() -> None:
    rig = gathering()
    rig.client.add(of_batch())
    rig.answer(0, tokens(5))
    rig.client.abort([f"{NAME}-f00d"])
    rig.client.add(of_batch())
    rig.answer(0, tokens(6, ends=True))
    assert told(rig) == [[6]]


def test_a_request_that_is_lost_ends_with_its_error_alone() -> None:
    rig = Rig(2, gathers=True, policy=RequestPolicy(max_failures=1))
    rig.client.add(of_batch())
    (first,) = (rank for rank, link in rig.links.items() if link.added)
    rig.answer(first, tokens(5))
    rig.down(first)
    assert rig.failed() == [f"{NAME}-f00d"]


def test_tokens_of_other_weights_are_told_apart() -> None:
    from vllm.v1.engine import EngineCoreOutputs

    if "weight_version" not in EngineCoreOutputs.__struct_fields__:
        pytest.skip("this vLLM does not say whose tokens they are")
    rig = gathering()
    rig.client.add(of_batch())
    rig.answer(0, tokens(5), weight_version="1")
    rig.answer(0, tokens(6), weight_version="1")
    rig.answer(0, tokens(7), weight_version="2")
    rig.answer(0, tokens(8, ends=True), weight_version="2")
    outcomes = rig.outcomes()
    assert [(each.weight_version, each.outputs[0].new_token_ids) for each in outcomes] == [("1", [5, 6]), ("2", [7, 8])]


def test_an_output_with_an_array_says_more_than_tokens() -> None:
    import numpy as np

    assert has_tokens_alone(tokens(5))
    assert not has_tokens_alone(tokens(5, routed_experts=np.zeros((2, 2))))
    assert not has_tokens_alone(tokens(5, ends=True))
