"""A mixture of experts over ranks that step together, each with a part of the experts: vLLM's own engines, on CPUs."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import dplaunch
from tests.conftest import shared_pids
from tests.leaks import Snapshot, left_of_a_shared_group
from tests.ray_for_tests import RayForTests
from tests.real.conftest import ENGINE_ARGS
from tests.real.families import kill_and_await

pytestmark = [
    pytest.mark.leaves("ranks of its groups are replaced; what is left of each group is looked for at its end"),
    pytest.mark.usefixtures("vllm_is_imported"),
]

SMALL = {**ENGINE_ARGS, "max_model_len": 256, "kv_cache_memory_bytes": 32 * 2**20, "skip_tokenizer_init": True}
TOGETHER = {**SMALL, "enable_expert_parallel": True, "worker_extension_cls": "tests.real.cpu_experts.OnCpu"}

PROMPTS = [{"prompt_token_ids": [5 + n, 7, 9, n % 3]} for n in range(9)]
LENGTHS = [3 + 7 * n for n in range(9)]
"""Tokens of each answer: no two ranks are through at the same step."""


@pytest.fixture(scope="module")
def experts() -> Any:
    """A mixture of eight experts whose weights are made up, as transformers has it."""
    kernels = pytest.importorskip("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
    if "topk_ids" not in inspect.signature(kernels.CPUUnquantizedExperts.apply).parameters:
        pytest.skip("experts on CPUs choose tokens by themselves before vLLM 0.30, and cannot be told which are theirs")
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(11)
    config = Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_hidden_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        vocab_size=512,
        initializer_range=0.4,
        dtype="float32",
    )
    return Qwen3MoeForCausalLM(config)


@pytest.fixture(scope="module")
def checkpoint(experts: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("experts")
    experts.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def together(checkpoint: str, alone: list[list[int]]) -> Iterator[dplaunch.Group]:
    """Two ranks with four experts each; the zygote that they are forked from is there before them."""
    before = Snapshot.take()
    with dplaunch.launch(checkpoint, dp=2, progress=False, **TOGETHER) as group:
        assert group.plan.mode.value == "lockstep"
        yield group
    assert left_of_a_shared_group(before, shared_pids) == []


@pytest.fixture(scope="module")
def alone(checkpoint: str) -> list[list[int]]:
    """What one rank with all the experts answers."""
    with dplaunch.launch(checkpoint, dp=1, progress=False, **SMALL) as group:
        return answers(group)


def answers(
    group: dplaunch.Group, lengths: Sequence[int] = LENGTHS, prompts: Sequence[Any] = PROMPTS, **options: Any
) -> list[list[int]]:
    """The tokens of each answer."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    outputs = group.generate(prompts, params, progress=False, **options)
    return [list(output.outputs[0].token_ids) for output in outputs]


def pids(group: dplaunch.Group) -> list[int]:
    """The ranks' processes, as they are now."""
    return [report["pid"] for report in group.call("dplaunch_report")]


def names(group: dplaunch.Group) -> list[str]:
    """The ranks' names without the group's."""
    found = group.call("dplaunch_report")
    return [report["instance_id"].removeprefix(group.plan.base_id) for report in found]


def test_uneven_batches_end_with_the_answers_of_one_rank_that_has_all_experts(
    together: dplaunch.Group, alone: list[list[int]]
) -> None:
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)
    for _ in range(3):
        assert answers(together) == alone


def test_one_request_for_one_rank_is_answered_by_a_group_that_stood_still(
    together: dplaunch.Group, alone: list[list[int]]
) -> None:
    for rank in (1, 0, 1):
        assert answers(together, LENGTHS[4:5], PROMPTS[4:5], data_parallel_rank=rank) == alone[4:5]


def test_ranks_know_their_place(together: dplaunch.Group) -> None:
    assert names(together) == ["_dp0", "_dp1"]
    assert [report["data_parallel_index"] for report in together.call("dplaunch_report")] == [0, 1]


def test_a_death_restarts_the_group_once_and_every_request_is_answered(together: dplaunch.Group) -> None:
    calm = answers(together, [160] * 9)
    before = pids(together)
    threading.Timer(0.3, os.kill, (before[1], signal.SIGKILL)).start()
    assert answers(together, [160] * 9) == calm
    assert not set(pids(together)) & set(before)
    assert names(together) == ["-r1_dp0", "-r1_dp1"]


def test_a_group_that_was_paused_goes_on(together: dplaunch.Group, alone: list[list[int]]) -> None:
    for _ in range(2):
        together.pause()
        together.resume()
        assert answers(together) == alone


def test_a_group_that_died_while_it_was_paused_goes_on_when_it_is_resumed(
    together: dplaunch.Group, alone: list[list[int]]
) -> None:
    together.pause()
    kill_and_await(together, 1)
    together.resume()
    assert answers(together) == alone


def test_new_weights_reach_the_experts_of_every_rank_and_outlive_a_death(
    together: dplaunch.Group, experts: Any, alone: list[list[int]], tmp_path: Path
) -> None:
    import torch

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    experts.save_pretrained(tmp_path)
    together.update_weights(tmp_path, version="five")
    updated = answers(together)
    assert updated != alone
    with dplaunch.launch(str(tmp_path), dp=1, progress=False, **SMALL) as fresh:
        assert answers(fresh) == updated
    kill_and_await(together, 0)
    assert names(together)[0].startswith("-r3")
    assert answers(together) == updated
    assert together.weight_version == "five"


def test_the_same_on_ray(checkpoint: str, alone: list[list[int]], ray_cluster: RayForTests) -> None:
    with dplaunch.launch(checkpoint, dp=2, backend="ray", progress=False, **TOGETHER) as group:
        assert answers(group) == alone
        os.kill(pids(group)[1], signal.SIGKILL)
        assert answers(group) == alone
        assert names(group) == ["-r1_dp0", "-r1_dp1"]
