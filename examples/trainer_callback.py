"""transformers' Trainer with an evaluation every so many steps, by two ranks that have the weights of that step.

    python -m examples.trainer_callback

The model and what it learns are those of train_eval_loop.py. The metric is in the trainer's own log.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dplaunch
from examples import train_eval_loop as example


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains; prints the trainer's log and returns it."""
    import torch
    from transformers import Trainer, TrainingArguments

    from dplaunch.integrations.transformers import EvalCallback

    start = example.Trainer(options.seed)
    problems = example.problems_of(torch.Generator().manual_seed(options.seed + 1), options.problems)

    def evaluate(group: dplaunch.Group) -> dict[str, float]:
        return {"score": example.evaluate(group, problems)}

    with tempfile.TemporaryDirectory() as directory:
        start.save(Path(directory) / "model")
        arguments = TrainingArguments(
            output_dir=directory,
            max_steps=options.steps,
            per_device_train_batch_size=example.BATCH,
            learning_rate=example.LEARNING_RATE,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=example.WARMUP_STEPS,
            logging_steps=options.every,
            seed=options.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        lessons = start.lessons(options.steps * example.BATCH)
        trainer = Trainer(model=start.model, args=arguments, train_dataset=lessons)
        with dplaunch.launch(str(Path(directory) / "model"), dp=options.dp, **example.ENGINE_ARGS) as group:
            trainer.add_callback(EvalCallback(trainer, group, evaluate, every=options.every))
            trainer.train()
    history: list[dict[str, Any]] = trainer.state.log_history
    return history


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What to do, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dp", type=int, default=2, help="data-parallel ranks (default: 2)")
    parser.add_argument("--steps", type=int, default=300, help="training steps in all (default: 300)")
    parser.add_argument("--every", type=int, default=50, help="steps between two evaluations (default: 50)")
    parser.add_argument("--problems", type=int, default=200, help="problems of an evaluation (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(parse())
