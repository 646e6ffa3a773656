"""Trains a small model on a CPU and evaluates it after each phase, with its current weights, on every rank.

    python -m examples.train_eval_loop                   # 300 steps; less than a minute on two cores
    python -m examples.train_eval_loop --kill-a-rank     # the same scores, with a rank lost amid an evaluation
    python -m examples.train_eval_loop --backend ray

The model, a Llama of two layers, learns to write six digits backwards: "483920=" is to be followed by "029384". It is
trained with transformers and torch in this process; the ranks get its weights with `group.update_weights`.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dplaunch

DIGITS = 6
BATCH = 64
CHARACTERS = "0123456789="
END = "<end>"
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20

ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 32,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 32 * 2**20,
    "gpu_memory_utilization": 0.3,  # The trainer's share of a device is the larger one.
    "max_num_seqs": 16,  # Few at a time, so that an evaluation has a middle in which a rank can be killed.
}


@dataclass(frozen=True)
class Row:
    """A line of the table: what is known after so many steps.

    Args:
        step: training steps so far.
        loss: mean loss of the phase; not a number before the first.
        score: share of the problems whose answer is right to the last digit.
        weights: what the weights are called that gave these answers.
        train_s: seconds of training; `update_s` and `eval_s` likewise.
    """

    step: int
    loss: float
    score: float
    weights: str
    train_s: float
    update_s: float
    eval_s: float

    def __str__(self) -> str:
        seconds = f"{self.train_s:8.1f} {self.update_s:8.1f} {self.eval_s:8.1f}"
        loss = "-" if math.isnan(self.loss) else f"{self.loss:.3f}"
        return f"{self.step:5} {loss:>8} {self.score:7.3f} {self.weights:>8} {seconds}"


HEADER = f"{'step':>5} {'loss':>8} {'score':>7} {'weights':>8} {'train s':>8} {'update s':>8} {'eval s':>8}"


class Trainer:
    """A model, its tokenizer and its training.

    Args:
        seed: of the first weights and of the training data.
    """

    def __init__(self, seed: int) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        self.tokenizer = make_tokenizer()
        # In so small a model a second thread would mostly wait, and it would wait for a core that a rank may have.
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=32,  # vLLM's attention on a CPU takes no less.
                max_position_embeddings=64,
                bos_token_id=None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        )
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self._warmup = torch.optim.lr_scheduler.LinearLR(self._optimizer, 1 / WARMUP_STEPS, total_iters=WARMUP_STEPS)
        self._random = torch.Generator().manual_seed(seed)

    def save(self, directory: Path) -> None:
        """What the ranks are started with: config, tokenizer and the first weights."""
        from transformers.utils import logging

        logging.disable_progress_bar()  # one file, there at once
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def train(self, steps: int) -> float:
        """So many steps; their mean loss."""
        self.model.train()
        return sum(self._step() for _ in range(steps)) / steps

    def lessons(self, count: int) -> list[dict[str, list[int]]]:
        """Problems with their answers, as the model takes them."""
        lessons = []
        for problem in problems_of(self._random, count):
            ids = self.tokenizer(problem + answer(problem) + END).input_ids
            # The question is given: only the answer is learnt.
            lessons.append({"input_ids": ids, "labels": [-100] * len(problem) + ids[len(problem) :]})
        return lessons

    def _step(self) -> float:
        import torch

        lessons = self.lessons(BATCH)
        batch = {name: torch.tensor([lesson[name] for lesson in lessons]) for name in lessons[0]}
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._warmup.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


def make_tokenizer() -> Any:
    """A token for each character, and one for the end."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([END, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def problems_of(random: Any, count: int) -> list[str]:
    """Questions: six digits and the sign that asks for them backwards."""
    import torch

    digits = torch.randint(0, 10, (count, DIGITS), generator=random).tolist()
    return ["".join(map(str, row)) + "=" for row in digits]


def answer(problem: str) -> str:
    """What should follow."""
    return problem[-2::-1]


def evaluate(group: dplaunch.Group, problems: Sequence[str], victim: int | None = None) -> float:
    """The share of right answers.

    Args:
        victim: a rank to be killed when the first answer comes.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=DIGITS + 1)
    pid = None if victim is None else group.call("dplaunch_report", rank=victim)[0]["pid"]
    right = 0
    for index, output in group.generate_iter(list(problems), params, progress=False):
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            print(f"      rank {victim} was killed with {len(problems) - 1} answers to come", flush=True)
            pid = None
        right += output.outputs[0].text == answer(problems[index])
    return right / len(problems)


def run(options: argparse.Namespace) -> list[Row]:
    """Trains and evaluates in turn; prints the table and returns it."""
    import torch

    trainer = Trainer(options.seed)
    problems = problems_of(torch.Generator().manual_seed(options.seed + 1), options.problems)
    with tempfile.TemporaryDirectory() as directory:
        trainer.save(Path(directory))
        with dplaunch.launch(directory, dp=options.dp, backend=options.backend, **ENGINE_ARGS) as group:
            print(HEADER, flush=True)
            return [phase(trainer, group, problems, number, options) for number in range(options.phases + 1)]


def phase(
    trainer: Trainer, group: dplaunch.Group, problems: Sequence[str], number: int, options: argparse.Namespace
) -> Row:
    """Some steps, their weights to all ranks, and what these answer then. Phase 0 trains nothing."""
    steps = options.steps // options.phases
    started = time.monotonic()
    loss = trainer.train(steps) if number else float("nan")
    trained = time.monotonic()
    if number:
        group.update_weights(trainer.model, version=number * steps)
    updated = time.monotonic()
    in_the_middle = options.kill_a_rank and number == (options.phases + 1) // 2
    score = evaluate(group, problems, victim=options.dp - 1 if in_the_middle else None)
    row = Row(
        step=number * steps,
        loss=loss,
        score=score,
        weights=group.weight_version,
        train_s=trained - started,
        update_s=updated - trained,
        eval_s=time.monotonic() - updated,
    )
    print(row, flush=True)
    return row


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What to do, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="mp", help="mp (default) or ray")
    parser.add_argument("--dp", type=int, default=2, help="data-parallel ranks (default: 2)")
    parser.add_argument("--steps", type=int, default=300, help="training steps in all (default: 300)")
    parser.add_argument("--phases", type=int, default=6, help="evaluations among them (default: 6)")
    parser.add_argument("--problems", type=int, default=200, help="problems of an evaluation (default: 200)")
    parser.add_argument("--kill-a-rank", action="store_true", help="SIGKILL one in the middle of an evaluation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 1 <= options.phases <= options.steps:
        parser.error(f"{options.steps} steps cannot be {options.phases} phases: each has a step at least")
    return options


if __name__ == "__main__":
    run(parse())
