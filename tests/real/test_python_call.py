"""The Python call over two real ranks."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import dplaunch
from dplaunch.errors import RequestError, UsageError
from tests.real.conftest import ENGINE_ARGS

CAPITAL: Any = [{"role": "user", "content": "What is the capital of France?"}]


def sampling(**options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **options})


def text(output: Any) -> str:
    result: str = output.outputs[0].text
    return result


def test_chat_messages_go_through_the_chat_template(group: dplaunch.Group) -> None:
    assert "Paris" in text(group.generate([CAPITAL], sampling())[0])


def test_one_conversation_is_one_prompt(group: dplaunch.Group) -> None:
    assert len(group.generate(CAPITAL, sampling())) == 1


def test_results_are_in_the_order_of_the_prompts(group: dplaunch.Group) -> None:
    prompts = [f"{n} plus {n} is" for n in range(40)]
    lengths = [4 + (n * 7) % 24 for n in range(40)]
    outputs = group.generate(prompts, [sampling(max_tokens=n, ignore_eos=True) for n in lengths])
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths


def test_token_ids_and_strings_mean_the_same(group: dplaunch.Group) -> None:
    from_text = group.generate("The sky is", sampling())[0]
    from_ids = group.generate(list(from_text.prompt_token_ids), sampling())[0]
    assert text(from_ids) == text(from_text)


def test_both_ranks_give_the_same_greedy_answer(group: dplaunch.Group) -> None:
    answers = [text(group.generate("Once upon a time", sampling(), data_parallel_rank=rank)[0]) for rank in (0, 1)]
    assert answers[0] == answers[1] != ""


def test_a_bad_prompt_fails_alone_and_by_index(group: dplaunch.Group) -> None:
    prompts: list[Any] = ["Hello", [1] * 2000, "World"]
    outputs = group.generate(prompts, sampling(), on_error="return")
    assert isinstance(outputs[1], RequestError)
    assert outputs[1].index == 1
    assert "prompt 1" in str(outputs[1])
    assert text(outputs[0])
    assert text(outputs[2])
    with pytest.raises(RequestError, match="prompt 1"):
        group.generate(prompts, sampling())


def test_params_must_match_the_prompts_in_number(group: dplaunch.Group) -> None:
    with pytest.raises(UsageError, match="3 prompts"):
        group.generate(["a", "b", "c"], [sampling(), sampling()])


def test_a_stream_gives_the_same_text_in_pieces(group: dplaunch.Group) -> None:
    whole = text(group.generate("The sky is", sampling())[0])
    pieces = list(group.stream("The sky is", sampling()))
    assert len(pieces) > 1
    assert "".join(pieces) == whole


def test_a_stream_that_is_left_early_aborts_its_request(group: dplaunch.Group) -> None:
    for _ in group.stream("Once", sampling(max_tokens=900, ignore_eos=True)):
        break
    assert group.generate("Hello", sampling())


def test_answers_come_as_they_finish_and_leaving_early_aborts_the_rest(group: dplaunch.Group) -> None:
    params = [sampling(max_tokens=n, ignore_eos=True) for n in (900, 2, 900)]
    for index, output in group.generate_iter(["Once"] * 3, params):
        assert (index, len(output.outputs[0].token_ids)) == (1, 2)
        break
    assert group._group.client.unfinished == 0


def test_a_resumed_answer_is_the_one_that_was_given(group: dplaunch.Group, tmp_path: Path) -> None:
    path, prompts = tmp_path / "run.jsonl", ["The sky is", "Grass is"]
    params = sampling(max_tokens=6, logprobs=2, prompt_logprobs=1, n=2, temperature=0.8)
    first = group.generate(prompts, params, resume=path)
    again = group.generate(prompts, params, resume=path)
    for old, new in zip(first, again, strict=True):
        # Drawn by chance: they are equal only if they are the same.
        assert [choice.text for choice in new.outputs] == [choice.text for choice in old.outputs]
        assert [list(choice.token_ids) for choice in new.outputs] == [list(choice.token_ids) for choice in old.outputs]
        assert [list(choice.logprobs) for choice in new.outputs] == [list(choice.logprobs) for choice in old.outputs]
        assert list(new.prompt_logprobs) == list(old.prompt_logprobs)
        assert (new.prompt, new.prompt_token_ids) == (old.prompt, old.prompt_token_ids)
    assert len(path.read_text().splitlines()) == 3


def test_ctrl_c_aborts_a_batch_and_leaves_the_group_usable(group: dplaunch.Group) -> None:
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        group.generate(["Tell me everything."] * 64, sampling(max_tokens=900, ignore_eos=True))
    timer.join()
    assert text(group.generate("Hello", sampling())[0])


def test_each_rank_tells_who_it_is(group: dplaunch.Group) -> None:
    reports = group.call("dplaunch_report")
    base = group.plan.base_id
    assert [report["instance_id"] for report in reports] == [f"{base}_dp0", f"{base}_dp1"]
    assert [report["data_parallel_index"] for report in reports] == [0, 1]
    assert [report["executor"] for report in reports] == ["UniProcExecutor"] * 2
    assert {report["dtype"] for report in reports} == {"float32"}


def test_ranks_do_not_share_cores_where_there_are_enough(group: dplaunch.Group) -> None:
    cores = [set(report["cpus"]) for report in group.call("dplaunch_report")]
    if len(os.sched_getaffinity(0)) >= 2:
        assert not cores[0] & cores[1]


def test_a_utility_call_is_acknowledged_by_every_rank(group: dplaunch.Group) -> None:
    assert group.call("reset_prefix_cache") == [True, True]


def test_two_groups_live_in_one_process_and_take_nothing_over(group: dplaunch.Group, smollm: str) -> None:
    environ = dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    root = (logging.getLogger().level, list(logging.getLogger().handlers))
    start_method = multiprocessing.get_start_method(allow_none=True)
    with dplaunch.launch(model=smollm, dp=1, name="second", **ENGINE_ARGS) as second:
        assert text(second.generate("The sky is", sampling())[0]) == text(group.generate("The sky is", sampling())[0])
        assert second.call("dplaunch_report")[0]["instance_id"] == "second"
    assert dict(os.environ) == environ
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == handlers
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == root
    assert multiprocessing.get_start_method(allow_none=True) == start_method


async def test_the_async_group_works_inside_a_running_loop_and_gives_an_asyncllm(smollm: str) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    async with dplaunch.launch_async(model=smollm, dp=2, **ENGINE_ARGS) as group:
        outputs = await group.generate(["The sky is", CAPITAL], sampling())
        assert "Paris" in text(outputs[1])
        engine = group.engine
        assert isinstance(engine, AsyncLLM)
        last = None
        async for output in engine.generate("The sky is", sampling(), "by-hand"):
            last = output
        assert text(last) == text(outputs[0])
        await _tokenizes_short_prompts_at_once(engine)
    with pytest.raises(dplaunch.GroupClosedError):
        _ = group.engine


async def _tokenizes_short_prompts_at_once(engine: Any) -> None:
    """A long one goes to vLLM's thread, and both are what vLLM makes of them."""
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    renderer = engine.renderer
    params = renderer.default_cmpl_tok_params
    for prompt, calls in (("The sky is", 1), ("a" + 4000 * " ", 0)):
        parsed = [parse_model_prompt(engine.model_config, prompt)]
        with patch.object(renderer, "_tokenize_prompt", wraps=renderer._tokenize_prompt) as tokenize:
            (rendered,) = await renderer.render_cmpl_async(parsed, params)
        assert tokenize.call_count == calls
        assert rendered["prompt_token_ids"] == renderer.render_cmpl(parsed, params)[0]["prompt_token_ids"]
