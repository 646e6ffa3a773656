"""The light reading of vLLM's flags."""

from __future__ import annotations

import pytest

from dplaunch.argv import nearest_flag, refuse_data_parallel, scan, split_model
from dplaunch.errors import UsageError


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("--max-model-len 2048", {"max_model_len": "2048"}),
        ("--max_model_len=2048", {"max_model_len": "2048"}),
        ("-tp 2 -pp 3", {"tensor_parallel_size": "2", "pipeline_parallel_size": "3"}),
        ("-tp=2", {"tensor_parallel_size": "2"}),
        ("--enforce-eager --seed 1", {"enforce_eager": True, "seed": "1"}),
        ("--no-enforce-eager", {"enforce_eager": False}),
        ("-ep", {"enable_expert_parallel": True}),
        ("--trust-remote-code", {"trust_remote_code": True}),
        ("--seed -1", {"seed": "-1"}),
        ('--compilation-config {"mode":3}', {"compilation_config": '{"mode":3}'}),
        ("--hf-overrides=a=b", {"hf_overrides": "a=b"}),
        ("--device-memory-utilization .5", {"gpu_memory_utilization": ".5"}),
        ("--served-model-name a b --seed 1", {"served_model_name": "a b", "seed": "1"}),
        ("--seed 1 --seed 2", {"seed": "2"}),
        ("", {}),
    ],
)
def test_flags_are_read_by_their_python_names(typed: str, read: dict[str, str | bool]) -> None:
    assert scan(typed.split()) == read


@pytest.mark.parametrize(
    ("typed", "model", "rest"),
    [
        ("M --seed 1", "M", "--seed 1"),
        ("--seed 1 M", "M", "--seed 1"),
        ("--enforce-eager M", "M", "--enforce-eager"),
        ("--seed=1 M", "M", "--seed=1"),
        ("--seed 1", None, "--seed 1"),
        ("--served-model-name a b", None, "--served-model-name a b"),
        ("", None, ""),
    ],
)
def test_a_bare_word_is_the_model(typed: str, model: str | None, rest: str) -> None:
    assert split_model(typed.split()) == (model, tuple(rest.split()))


def test_two_bare_words_are_refused() -> None:
    with pytest.raises(UsageError, match="not 'A' and 'B'"):
        split_model(["A", "B"])


@pytest.mark.parametrize(
    ("typed", "instead"),
    [
        ("--data-parallel-size 2", "--dp"),
        ("--data_parallel_size=2", "--dp"),
        ("-dp 2", "--dp"),
        ("-dp=2", "--dp"),
        ("--data-parallel-backend ray", "--backend"),
        ("-dpb ray", "--backend"),
        ("--seed 1 -dpn 3", "places the ranks itself"),
        ("--data-parallel-external-lb", "places the ranks itself"),
        ("--data-parallel-size-local 1", "--dp"),
    ],
)
def test_data_parallel_flags_are_refused_with_what_to_use_instead(typed: str, instead: str) -> None:
    flag = next(token.partition("=")[0] for token in typed.split() if "d" in token and token.startswith("-"))
    with pytest.raises(UsageError) as caught:
        refuse_data_parallel(typed.split())
    assert instead in caught.value.hint
    if "seed" not in typed:
        assert caught.value.message.startswith(flag)


@pytest.mark.parametrize("typed", ["--api-server-count 2", "--api_server_count=4", "-asc 2"])
def test_more_than_one_frontend_is_refused(typed: str) -> None:
    with pytest.raises(UsageError, match="one frontend"):
        refuse_data_parallel(typed.split())


@pytest.mark.parametrize("typed", ["--api-server-count 1", "-tp 2", "M --dtype float32", "--dp-sync-interval 4"])
def test_other_flags_pass(typed: str) -> None:
    refuse_data_parallel(typed.split())


@pytest.mark.parametrize(
    ("unknown", "near"),
    [
        ("--max-modle-len", "--max-model-len"),
        ("--max_model_lenn=3", "--max-model-len"),
        ("--tensor-paralel-size", "--tensor-parallel-size"),
        ("--zzz", None),
    ],
)
def test_the_nearest_flag_is_named_only_when_one_is_near(unknown: str, near: str | None) -> None:
    assert nearest_flag(unknown, ["--max-model-len", "--tensor-parallel-size", "--seed"]) == near
