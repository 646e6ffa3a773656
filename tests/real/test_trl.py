"""TRL's own client and GRPOTrainer on dplaunch servers of two ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dplaunch.seam import frontend
from examples.grpo_trl import PROMPTS, small_model
from tests.real.conftest import START_S, Server, serving

pytest.importorskip("trl")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "grpo_trl.py"
TOKENS = 8
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def _trl_is_imported() -> None:
    """It imports vLLM, which sets variables that later tests look for."""
    with frontend.preserved_environ():
        import trl.generation.vllm_client  # noqa: F401


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained_on(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two ranks of a tiny model, with the endpoints that a trainer needs."""
    flags = ["--model", str(tiny), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    flags += ["--kv-cache-memory-bytes", str(64 * 2**20), "--logprobs-mode", "processed_logprobs"]
    with serving(tmp_path_factory.mktemp("logs"), *flags, env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        yield server


def of_transformers(directory: Path, tokenizer: Path) -> list[list[int]]:
    """The greedy answers of a stock model with the weights that are saved there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    asked = AutoTokenizer.from_pretrained(tokenizer)
    answers = []
    for prompt in PROMPTS:
        ids = asked(prompt, return_tensors="pt")
        told = model.generate(**ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        answers.append(told[0][ids.input_ids.shape[1] :].tolist())
    return answers


def of_rank(server: Server, rank: int) -> tuple[list[list[int]], list[list[float]]]:
    """What a rank answers, and how sure it is."""
    body = {"prompt": PROMPTS, "max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0, "logprobs": 0}
    pinned = {"X-data-parallel-rank": str(rank)}
    response = server.http.post("/v1/completions", json={**body, "return_token_ids": True}, headers=pinned)
    response.raise_for_status()
    choices: list[dict[str, Any]] = response.json()["choices"]
    return [each["token_ids"] for each in choices], [each["logprobs"]["token_logprobs"] for each in choices]


def test_trls_client_generates_and_chats_with_both_ranks(server: Server) -> None:
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient(base_url=server.address)
    before = server.served_by_rank()
    several = client.generate(["The capital of France is"] * 4, n=2, max_tokens=4, temperature=0.7)
    assert len(several["prompt_ids"]) == 4
    assert len(several["completion_ids"]) == len(several["logprobs"]) == 8
    assert all(
        len(ids) == len(sure) <= 4 for ids, sure in zip(several["completion_ids"], several["logprobs"], strict=True)
    )
    told = client.generate(["The capital of France is", "One, two,"], max_tokens=4, temperature=0.0)
    # Token ids in, as GRPOTrainer sends them.
    again = client.generate(told["prompt_ids"], max_tokens=4, temperature=0.0)
    assert again["completion_ids"] == told["completion_ids"]
    chat = client.chat([[{"role": "user", "content": "Hello"}]], max_tokens=4)
    assert len(chat["completion_ids"][0]) <= 4
    client.session.close()
    after = server.served_by_rank()
    assert all(after[rank] > before.get(rank, 0.0) for rank in (0, 1))


def test_grpo_trains_and_both_ranks_have_the_trainers_weights(trained_on: Server, tiny: Path, tmp_path: Path) -> None:
    world = trained_on.http.get("/get_world_size").json()["world_size"]
    assert world == 2
    first = of_rank(trained_on, 0)
    assert first[0] == of_transformers(tiny, tiny)
    command = [sys.executable, str(EXAMPLE), "--steps", str(STEPS), "--server", trained_on.address]
    command += ["--model", str(tiny), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reward, step by step" in done.stdout

    # One update before each step, and one after the last.
    assert trained_on.http.get("/weight_info").json() == {"weight_version": str(STEPS + 1)}
    wanted = of_transformers(tmp_path, tiny)
    assert wanted != first[0]
    zero, one = of_rank(trained_on, 0), of_rank(trained_on, 1)
    assert zero[0] == one[0] == wanted
    assert zero[1] != first[1]


def test_a_route_that_would_change_weights_answers_with_the_groups_words(trained_on: Server) -> None:
    answer = trained_on.http.post("/finish_weight_update", json={})
    assert answer.status_code == 400
    assert "no update of the weights is under way" in answer.text
    trained_on.http.post("/start_weight_update").raise_for_status()
    told = {"update_info": {"dplaunch_bucket": {"path": "/etc/passwd", "entries": []}}}
    answer = trained_on.http.post("/update_weights", json=told)
    assert answer.status_code == 400
    assert "nothing else" in answer.text
    trained_on.http.post("/update_weights", json={"update_info": {"dplaunch_give_up": "a test"}}).raise_for_status()
    trained_on.http.post("/pause", params={"mode": "keep"}).raise_for_status()
    assert trained_on.http.get("/ready").json()["stance"] == "paused"
    trained_on.http.post("/resume").raise_for_status()
    assert trained_on.http.get("/ready").json()["stance"] == "serving"
    assert trained_on.http.post("/reset_prefix_cache").json() == {"success": True}
    trained_on.http.post("/sleep", params={"level": 1}).raise_for_status()
    assert trained_on.http.get("/ready").json()["stance"] == "asleep"
    # What the route says is not the same in all versions of vLLM.
    trained_on.http.post("/wake_up").raise_for_status()
    assert trained_on.http.get("/ready").json()["stance"] == "serving"
