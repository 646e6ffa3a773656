"""Beside plain answers, over two ranks: adapters, pooling, KV connectors, worker processes, grammars."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import dplaunch
from dplaunch import demo_convert
from tests.lora import write_adapter
from tests.real.conftest import ENGINE_ARGS, serving
from tests.real.families import kill_and_await, wait_gone

ARGS: dict[str, Any] = {**ENGINE_ARGS, "max_model_len": 256, "kv_cache_memory_bytes": 32 * 2**20}


def greedy(**options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **options})


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama: two layers, 2 MB."""
    directory = tmp_path_factory.mktemp("tiny")
    demo_convert.write_random(directory)
    return directory


# Adapters.


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of rank 8 for the tiny model that turns its answers over."""
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny, seed=1)


@pytest.fixture(scope="module")
def other_adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that turns them over in another way."""
    return write_adapter(tmp_path_factory.mktemp("other"), tiny, seed=2)


def of_each(group: dplaunch.Group, *loras: Any) -> list[list[list[int]]]:
    """What each rank answers to the same prompt with each adapter (None: without), all in one batch."""
    return [
        [
            tokens(output)
            for output in group.generate(
                ["Hello"] * len(loras), greedy(), data_parallel_rank=rank, lora_request=list(loras), progress=False
            )
        ]
        for rank in (0, 1)
    ]


def loads_below_adapters() -> bool:
    """Whether vLLM can load weights into a model with adapters: 0.26 does not find its layers, and 0.28 does."""
    from vllm.lora.layers.base import BaseLayerWithLoRA

    return "load_weights" in vars(BaseLayerWithLoRA)


def test_adapters_answer_on_both_ranks_through_new_weights_a_death_a_swap_and_a_removal(
    tiny: Path, adapter: Path, other_adapter: Path
) -> None:
    from transformers import AutoModelForCausalLM

    with dplaunch.launch(model=str(tiny), dp=2, enable_lora=True, max_lora_rank=8, **ARGS) as group:
        plain, plain_1 = (answers[0] for answers in of_each(group, None))
        style = group.load_lora("style", adapter)
        styled, styled_1 = (answers[0] for answers in of_each(group, style))
        assert plain == plain_1 != styled == styled_1

        # In one batch, in the one slot that there is by default.
        mixed = [styled, plain, styled, plain]
        assert of_each(group, style, None, style, None) == [mixed, mixed]

        # One that the group knows outlives new weights of the model, which vLLM's workers forget adapters with.
        sources = (tiny, AutoModelForCausalLM.from_pretrained(tiny, dtype="float32"))
        for source in sources if loads_below_adapters() else ():
            group.update_weights(source)
            assert of_each(group, style, None) == [[styled, plain]] * 2

        # A rank that comes back has it.
        kill_and_await(group, 1)
        assert [set(loras) for loras in group.call("list_loras")] == [{style.lora_int_id}] * 2
        assert of_each(group, None, style) == [[plain, styled]] * 2

        # Another under the same name, which takes the other's place.
        swapped = group.load_lora("style", other_adapter)
        ((other, also_plain), second_rank) = of_each(group, swapped, None)
        assert also_plain == plain
        assert other not in (plain, styled)
        assert second_rank == [other, plain]
        group.unload_lora("style")
        assert group.loras == {}
        assert [set(loras) for loras in group.call("list_loras")] == [set(), set()]
        assert of_each(group, None, None) == [[plain, plain]] * 2


# Pooling.


def test_a_pooling_model_gives_the_same_vectors_on_both_ranks(tiny: Path) -> None:
    from vllm import PoolingParams

    params = PoolingParams(task="embed")
    with dplaunch.launch(model=str(tiny), dp=2, runner="pooling", **ARGS) as group:
        prompts = ["the sky", "is", "a long way up there"]
        vectors = [
            [output.outputs.data.tolist() for output in group.generate(prompts, params, data_parallel_rank=rank)]
            for rank in (0, 1)
        ]
        many = group.generate(prompts * 8, params)
        # Ranks batch as requests come, and with torch 2.11 the last digits go with the batch.
        assert vectors[0] == [pytest.approx(vector, abs=1e-5) for vector in vectors[1]]
        assert len({tuple(vector) for vector in vectors[0]}) == 3
        assert all(len(vector) == 128 for vector in vectors[0])
        for index, output in enumerate(many):
            assert output.outputs.data.tolist() == pytest.approx(vectors[0][index % 3], abs=1e-5)


def test_embeddings_are_served_over_http(tiny: Path, tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ARGS.items() if value is not True]
    with serving(tmp_path / "logs", "--model", str(tiny), "--runner", "pooling", "--enforce-eager", *flags) as server:
        body = {"model": str(tiny), "input": ["the sky", "the sea", "the sky", "the sky"]}
        response = server.http.post("/v1/embeddings", json=body)
        response.raise_for_status()
        vectors = [entry["embedding"] for entry in response.json()["data"]]
        assert [len(vector) for vector in vectors] == [128] * 4
        assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
        assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)


# A KV connector, and ranks with worker processes.


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the connector keeps what it stores."""
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def connected(tiny: Path, store: Path) -> Iterator[dplaunch.Group]:
    """Two ranks with a worker process each and a connector that writes its blocks to files."""
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "engine_id": "peers-know-me-as",
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
    }
    with dplaunch.launch(model=str(tiny), dp=2, executor="mp", kv_transfer_config=connector, **ARGS) as group:
        yield group


def test_each_rank_registers_under_its_own_name_seen_from_inside(connected: dplaunch.Group) -> None:
    reports = connected.call("dplaunch_report")
    assert [report["engine_id"] for report in reports] == ["peers-know-me-as_dp0", "peers-know-me-as_dp1"]
    base = connected.plan.base_id
    assert [report["instance_id"] for report in reports] == [f"{base}_dp0", f"{base}_dp1"]


def test_what_one_rank_stored_the_other_loads(connected: dplaunch.Group, store: Path) -> None:
    prompt = "A prompt that is longer than a block of the cache, so that there is something to store. " * 2
    first, second = (connected.generate(prompt, greedy(), data_parallel_rank=rank)[0] for rank in (0, 1))
    assert list(store.rglob("*.safetensors"))
    assert (first.num_cached_tokens, second.num_cached_tokens > 0) == (0, True)
    assert tokens(first) == tokens(second)


def test_a_rank_with_worker_processes_answers_and_they_end_with_it(connected: dplaunch.Group) -> None:
    reports = connected.call("dplaunch_report")
    assert [report["executor"] for report in reports] == ["MultiprocExecutor"] * 2
    ranks = [psutil.Process(report["pid"]) for report in reports]
    workers = [worker for rank in ranks for worker in rank.children()]
    assert len(workers) >= 2
    assert tokens(connected.generate("Hello", greedy())[0])
    cores = [set(os.sched_getaffinity(rank.pid)) for rank in ranks]
    assert [set(os.sched_getaffinity(rank.children()[0].pid)) for rank in ranks] == cores
    connected.close()
    wait_gone([*ranks, *workers])


# Grammars.


def test_a_grammar_binds_answers_of_the_python_call(group: dplaunch.Group) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
    }
    chat = [{"role": "user", "content": "Name the capital of France as JSON."}]
    structured = greedy(max_tokens=32, ignore_eos=False, structured_outputs=StructuredOutputsParams(json=schema))
    choice = greedy(max_tokens=8, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]), ignore_eos=False)
    for rank in (0, 1):
        prompts: list[Any] = [chat, "Is it? "]
        outputs = group.generate(prompts, [structured, choice], data_parallel_rank=rank)
        assert json.loads(outputs[0].outputs[0].text)["city"] in ("Paris", "Rome")
        assert outputs[1].outputs[0].text in ("yes", "no")
