"""New weights in real engines: the answers of stock models with those weights, from every rank, and never stale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dplaunch
from dplaunch.testing import poll_until
from tests.conftest import shared_pids
from tests.leaks import Snapshot, left_of_a_shared_group
from tests.real.conftest import ENGINE_ARGS, START_S
from tests.real.families import kill_and_await

pytestmark = pytest.mark.leaves(
    "the ranks of its group are replaced; what is left of the group is looked for at its end"
)

PROMPTS = ["The capital of France is", "Seven sheep went to", "def add(a, b):"]
TOKENS = 8


@pytest.fixture(scope="module")
def tuned(smollm: str) -> Any:
    """The model as transformers has it, to be changed by the tests."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)


@pytest.fixture(scope="module")
def own_group(smollm: str) -> Iterator[dplaunch.Group]:
    before = Snapshot.take()
    with dplaunch.launch(model=smollm, dp=2, progress=False, **ENGINE_ARGS) as group:
        yield group
    assert left_of_a_shared_group(before, shared_pids) == []


def shift(model: Any, seed: int) -> None:
    """Changes every weight a little: enough for other answers."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.004)


def of_transformers(model: Any, path: str) -> list[list[int]]:
    """What transformers answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    answers = []
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt")
        told = model.generate(**asked, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        answers.append(told[0][asked.input_ids.shape[1] :].tolist())
    return answers


def of_ranks(group: dplaunch.Group) -> list[list[list[int]]]:
    """What each rank answers."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return [
        [
            list(output.outputs[0].token_ids)
            for output in group.generate(PROMPTS, params, data_parallel_rank=rank, progress=False)
        ]
        for rank in group.ranks_up
    ]


def test_every_kind_of_source_gives_the_answers_of_a_stock_model_with_those_weights(
    own_group: dplaunch.Group, tuned: Any, smollm: str, tmp_path: Path
) -> None:
    group = own_group
    first = of_ranks(group)
    seen = [first[0]]
    for kind in ("module", "pairs", "checkpoint"):
        shift(tuned, len(seen))
        wanted = of_transformers(tuned, smollm)
        assert wanted not in seen
        if kind == "checkpoint":
            tuned.save_pretrained(tmp_path)
        sources = {"module": tuned, "pairs": tuned.named_parameters(), "checkpoint": tmp_path}
        done = group.update_weights(sources[kind], kind)
        assert (done.ranks, done.version, group.weight_version) == ((0, 1), kind, kind)
        assert of_ranks(group) == [wanted, wanted]
        seen.append(wanted)
        sums = group.weight_checksums()
        assert sums[0] == sums[1] == done.checksum

    # A rank that dies between updates comes back with what the others have.
    kill_and_await(group, 1)
    assert group.weight_checksums() == sums
    assert of_ranks(group) == [wanted, wanted]

    # The first weights again, through the module that still has the others: a whole circle.
    group.update_weights(smollm)
    assert of_ranks(group) == first


def test_a_module_is_given_to_a_rank_that_comes_back_and_a_sleep_changes_nothing(
    own_group: dplaunch.Group, tuned: Any, smollm: str
) -> None:
    group = own_group
    shift(tuned, 9)
    group.update_weights(tuned)
    wanted = of_transformers(tuned, smollm)
    kill_and_await(group, 0)
    assert of_ranks(group) == [wanted, wanted]
    group.sleep(2)
    assert group.call("is_sleeping") == [True, True]
    with group.awake():
        assert of_ranks(group) == [wanted, wanted]
    group.wake_up()
    assert of_ranks(group) == [wanted, wanted]


def test_weights_without_some_of_the_parameters_are_refused_and_the_ranks_keep_theirs(
    own_group: dplaunch.Group, tuned: Any
) -> None:
    group = own_group
    before = of_ranks(group)
    sums = group.weight_checksums()
    with pytest.raises(dplaunch.WeightsError, match=r"of .* parameters were not in the weights: model\.embed_tokens"):
        group.update_weights(list(tuned.named_parameters())[1:])
    poll_until(lambda: group.ranks_up == [0, 1], START_S, "both ranks")
    assert group.weight_checksums() == sums
    assert of_ranks(group) == before
