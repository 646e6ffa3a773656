"""Token for token what stock vLLM answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import dplaunch
from tests.real.conftest import ENGINE_ARGS

TOKENS = 32

_SUBJECTS = ("the sea", "a lost key", "seven sheep", "the last train", "winter in Oslo")
_FORMS = (
    "Write about {}.",
    "{} is",
    "Q: What do you know about {}?\nA:",
    "def describe():\n    # {}\n    return",
    "Once upon a time there was {}, and",
    "List three facts about {}:\n1.",
    "Übersetze ins Deutsche: {} ->",
    "{0}, {0}, {0},",
    "The opposite of {} is",
    "In the year 1742, long before anybody had heard of {}, a clockmaker in a small town by the river wrote that",
)
PROMPTS = [form.format(subject) for form in _FORMS for subject in _SUBJECTS]

_STOCK = """
import json, sys
from vllm import LLM, SamplingParams
asked = json.load(sys.stdin)
llm = LLM(**asked["args"])
params = SamplingParams(temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True)
outputs = llm.generate(asked["prompts"], params, use_tqdm=False)
with open(asked["answer"], "w") as file:
    json.dump([list(output.outputs[0].token_ids) for output in outputs], file)
"""


def stock_answers(model: str, directory: Any) -> list[list[int]]:
    """The token ids of `vllm.LLM` on one rank, in a process of its own."""
    asked = {
        "args": {"model": model, **ENGINE_ARGS},
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "answer": str(directory / "stock.json"),
    }
    done = subprocess.run(
        [sys.executable, "-c", _STOCK],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    answers: list[list[int]] = json.loads((directory / "stock.json").read_text())
    return answers


def test_fifty_greedy_answers_of_two_ranks_equal_those_of_stock_vllm(
    group: dplaunch.Group, smollm: str, tmp_path: Any
) -> None:
    from vllm import SamplingParams

    assert len(set(PROMPTS)) == 50
    outputs = group.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True))
    ours = [list(output.outputs[0].token_ids) for output in outputs]
    stock = stock_answers(smollm, tmp_path)
    different = {prompt: (a, b) for prompt, a, b in zip(PROMPTS, ours, stock, strict=True) if a != b}
    assert different == {}
    assert {len(answer) for answer in ours} == {TOKENS}
