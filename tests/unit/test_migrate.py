"""How a request moves when its rank has died: every row of docs/migration.md, and what the decision hangs on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dplaunch.migrate import SAFE, EngineTraits, Move, decide
from dplaunch.seam import frontend
from dplaunch.seam.requests import continued, departures

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """Imported with os.environ left as it was."""
    frontend.import_vllm(quiet=True)


def sampling(**fields: Any) -> Any:
    from vllm import SamplingParams

    private = {name: fields.pop(name) for name in list(fields) if name.startswith("_")}
    params = SamplingParams(**{"temperature": 0.7, "max_tokens": 64, **fields})
    for name, value in private.items():
        setattr(params, name, value)
    return params


def request(params: Any, **fields: Any) -> Any:
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        mm_features=fields.pop("mm_features", None),
        sampling_params=params,
        pooling_params=fields.pop("pooling_params", None),
        arrival_time=0.0,
        lora_request=fields.pop("lora_request", None),
        cache_salt=None,
        data_parallel_rank=fields.pop("data_parallel_rank", None),
        **fields,
    )


def structured() -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(regex="a+")


def repetition() -> Any:
    from vllm.sampling_params import RepetitionDetectionParams

    return RepetitionDetectionParams(max_pattern_size=3, min_count=2)


def pooling() -> Any:
    from vllm import PoolingParams

    return PoolingParams(task="embed")


def lora() -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("a", 1, "/adapters/a")


PULLED = {"kv_transfer_params": {"do_remote_prefill": True, "remote_engine_id": "p"}}
PUSHED = {"kv_transfer_params": {"do_remote_decode": True}}

Case = tuple[Callable[[], Any], Move, Move]


def plain(**fields: Any) -> Callable[[], Any]:
    return lambda: request(sampling(**fields))


CASES: Mapping[str, Case] = {
    # the table's first column: the request, what becomes of it before its first output, and after
    "greedy (`temperature=0`)": (plain(temperature=0, seed=5), Move.REPLAY, Move.CONTINUE),
    "sampling: `temperature`, `top_p`, `top_k`, `min_p`": (
        plain(top_p=0.9, top_k=7, min_p=0.1),
        Move.REPLAY,
        Move.CONTINUE,
    ),
    "`repetition_penalty`": (plain(repetition_penalty=1.2), Move.REPLAY, Move.CONTINUE),
    "`logit_bias`, `allowed_token_ids`": (
        plain(logit_bias={5: 1.0}, allowed_token_ids=[5, 6]),
        Move.REPLAY,
        Move.CONTINUE,
    ),
    "`max_tokens`, `min_tokens`, `ignore_eos`": (plain(min_tokens=9, ignore_eos=True), Move.REPLAY, Move.CONTINUE),
    "`stop`, `stop_token_ids`": (plain(stop=["x", "yy"], stop_token_ids=[4]), Move.REPLAY, Move.CONTINUE),
    "`logprobs`, `prompt_logprobs`": (plain(logprobs=2, prompt_logprobs=1), Move.REPLAY, Move.CONTINUE),
    "`n` > 1": (plain(n=1), Move.REPLAY, Move.CONTINUE),
    "LoRA": (lambda: request(sampling(), lora_request=lora()), Move.REPLAY, Move.CONTINUE),
    "images, sounds": (
        lambda: request(sampling(), mm_features=[SimpleNamespace(data={"pixels": 1})]),
        Move.REPLAY,
        Move.CONTINUE,
    ),
    "pinned to a rank": (lambda: request(sampling(), data_parallel_rank=1), Move.REPLAY, Move.CONTINUE),
    "`seed`": (plain(seed=5), Move.REPLAY, Move.VERIFY),
    "`presence_penalty`, `frequency_penalty`, greedy or with a seed": (
        plain(temperature=0, presence_penalty=0.5, frequency_penalty=0.5),
        Move.REPLAY,
        Move.VERIFY,
    ),
    "`presence_penalty`, `frequency_penalty`, without a seed": (plain(frequency_penalty=0.5), Move.REPLAY, Move.FAIL),
    "`bad_words` of one token": (
        plain(bad_words=["x"], _bad_words_token_ids=[[5]]),
        Move.REPLAY,
        Move.CONTINUE,
    ),
    "`bad_words` of several tokens, greedy or with a seed": (
        plain(seed=5, bad_words=["x y"], _bad_words_token_ids=[[5, 6]]),
        Move.REPLAY,
        Move.VERIFY,
    ),
    "guided decoding, greedy or with a seed": (
        lambda: request(sampling(temperature=0, structured_outputs=structured())),
        Move.REPLAY,
        Move.VERIFY,
    ),
    "guided decoding, without a seed": (
        lambda: request(sampling(structured_outputs=structured())),
        Move.REPLAY,
        Move.FAIL,
    ),
    "`thinking_token_budget`, greedy or with a seed": (
        plain(temperature=0, thinking_token_budget=9),
        Move.REPLAY,
        Move.VERIFY,
    ),
    "`repetition_detection`, greedy or with a seed": (
        lambda: request(sampling(seed=1, repetition_detection=repetition())),
        Move.REPLAY,
        Move.VERIFY,
    ),
    "`extra_args` of a plugin, greedy or with a seed": (
        plain(temperature=0, extra_args={"plugin": 1}),
        Move.REPLAY,
        Move.VERIFY,
    ),
    "a prompt of embeddings, greedy or with a seed": (
        lambda: request(sampling(temperature=0), prompt_embeds=np.zeros(3)),
        Move.REPLAY,
        Move.VERIFY,
    ),
    "KV transfer, the decoding side (`do_remote_prefill`)": (plain(extra_args=PULLED), Move.FAIL, Move.FAIL),
    "KV transfer, the prefilling side (`do_remote_decode`)": (
        plain(temperature=0, extra_args=PUSHED),
        Move.REPLAY,
        Move.VERIFY,
    ),
    "encoder outputs handed over (`ec_transfer_params`)": (
        plain(extra_args={"ec_transfer_params": {"a": 1}}),
        Move.FAIL,
        Move.FAIL,
    ),
    "images or sounds that were only in the dead rank's cache": (
        lambda: request(sampling(), mm_features=[SimpleNamespace(data=None)]),
        Move.FAIL,
        Move.FAIL,
    ),
    "a session whose input comes in parts": (lambda: request(sampling(), resumable=True), Move.REPLAY, Move.FAIL),
    "pooling": (lambda: request(None, pooling_params=pooling()), Move.REPLAY, Move.FAIL),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shown", [False, True], ids=["nothing shown", "shown"])
def test_a_request_moves_as_the_table_says(name: str, shown: bool) -> None:
    make, before, after = CASES[name]
    decision = decide([make()], shown=shown, tokens=3)
    assert decision.move is (after if shown else before), decision.reason
    assert decision.reason


def test_the_table_in_the_docs_is_this_one() -> None:
    text = (ROOT / "docs/migration.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)[2:]
    documented = {feature: (before, after) for feature, before, after, why in rows if why}
    assert documented == {name: (before.value, after.value) for name, (_, before, after) in CASES.items()}


# Whole engines.


def test_an_engine_that_may_remember_has_its_requests_repeated_and_those_without_a_seed_fail() -> None:
    traits = EngineTraits(no_continue="the engine has logits processors of its own")
    assert decide([plain(temperature=0)()], shown=True, tokens=3, traits=traits).move is Move.VERIFY
    failed = decide([plain()()], shown=True, tokens=3, traits=traits)
    assert failed.move is Move.FAIL
    assert "logits processors of its own" in failed.reason


def test_where_two_answers_cannot_be_put_together_nothing_that_has_begun_moves() -> None:
    traits = EngineTraits(no_repeat="its experts are asked for")
    assert decide([plain(temperature=0)()], shown=True, tokens=3, traits=traits).reason == "its experts are asked for"
    assert decide([plain()()], shown=False, tokens=0, traits=traits).move is Move.REPLAY


# What is not known is not safe.


UNSAFE = {
    *("presence_penalty", "frequency_penalty", "seed", "structured_outputs", "extra_args", "bad_words"),
    *("_bad_words_token_ids", "thinking_token_budget", "repetition_detection", "routed_experts_prompt_start"),
    "trace_decode_token_ids",
}

LATER = {
    *("stream_interval", "trace_decode_token_ids", "watermarking", "_watermarking_skipped"),
    *("prompt_logprob_start", "prompt_logprob_token_ids"),
}
"""What vLLM 0.26 has not; 0.32 has them all."""


def test_every_field_of_vllms_sampling_params_is_known_to_be_safe_or_keeps_a_request_from_being_continued() -> None:
    from vllm import SamplingParams

    theirs = set(SamplingParams.__struct_fields__)
    assert theirs - SAFE <= UNSAFE
    assert (SAFE | UNSAFE) - theirs <= LATER


def test_the_reason_names_what_keeps_a_request_from_moving() -> None:
    params = sampling(presence_penalty=1.0, frequency_penalty=1.0, structured_outputs=structured())
    reason = decide([request(params)], shown=True, tokens=3).reason
    assert reason.startswith("it has a penalty over its own output and a grammar, so it cannot be continued exactly")


# The request that goes on.


def test_a_request_that_goes_on_wants_what_is_left_and_leaves_the_first_one_as_it_was() -> None:
    first = request(sampling(min_tokens=5, prompt_logprobs=2, logprobs=1, stop=["x"]), priority=3)
    rest = continued(first, [7, 8])
    assert rest.prompt_token_ids == [1, 2, 3, 7, 8]
    assert (rest.sampling_params.max_tokens, rest.sampling_params.min_tokens) == (62, 3)
    assert (rest.sampling_params.prompt_logprobs, rest.sampling_params.logprobs) == (None, 1)
    assert (rest.request_id, rest.priority, rest.sampling_params.stop) == ("r", 3, ["x"])
    assert first.prompt_token_ids == [1, 2, 3]
    assert (first.sampling_params.max_tokens, first.sampling_params.prompt_logprobs) == (64, 2)


def test_what_is_left_of_the_minimum_never_falls_below_nothing() -> None:
    assert continued(request(sampling(min_tokens=1)), [7, 8]).sampling_params.min_tokens == 0


def test_a_request_that_goes_on_can_go_on_again_from_the_first() -> None:
    first = request(sampling())
    assert continued(first, [7, 8, 9]).sampling_params.max_tokens == 61


def test_departures_are_the_fields_that_are_not_as_by_default() -> None:
    params = sampling(temperature=1.0, max_tokens=16, seed=3)
    # An array, as `prompt_logprob_token_ids` is, which older vLLMs have not.
    params.logprob_token_ids = np.array([[1, 2]])
    assert departures(params) - {"skip_reading_prefix_cache"} == {"logprob_token_ids", "seed"}
