"""GRPO with TRL, on any machine: a small model learns to use one letter, and two dplaunch ranks answer for it.

    python examples/grpo_trl.py --steps 20

It starts `dplaunch --dp 2` by itself; `--server URL --model DIR` takes one that runs (with VLLM_SERVER_DEV_MODE=1).
The one line that differs from TRL's own documentation is `with use():`. Needs `pip install 'dplaunch[trl,demo]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPTS = ["Once upon a time", "The sea is", "My favourite word is", "Listen:"]
LETTER = "e"


def small_model(directory: Path) -> Path:
    """A random model with the built-in model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from dplaunch import demo

    tokenizer = AutoTokenizer.from_pretrained(demo.demo_model().path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@contextlib.contextmanager
def a_server(model: Path) -> Iterator[str]:
    """Two ranks of the model on a free port; gives the address."""
    command = [sys.executable, "-m", "dplaunch", "--dp", "2", "--model", str(model), "--port", "0"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(64 * 2**20), "--logprobs-mode", "processed_logprobs"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            told = ""
            while not (found := re.search(r"http://[\d.]+:\d+", told)):
                if not (line := server.stdout.readline() if server.stdout else ""):
                    raise SystemExit(f"the server did not start:\n{told}")
                told += line
            yield found[0]
        finally:
            server.terminate()
            server.wait()


def share_of_the_letter(completions: list[str], **_: Any) -> list[float]:
    """The reward: how much of a completion is one letter."""
    return [text.count(LETTER) / max(1, len(text)) for text in completions]


def train(model: Path, server: str, steps: int, output: Path | None) -> None:
    """Trains, and shows what the ranks answer before and after."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from dplaunch.integrations.trl import use

    with tempfile.TemporaryDirectory() as scratch, use():
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(model),
            reward_funcs=share_of_the_letter,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            args=GRPOConfig(
                output_dir=scratch,
                use_vllm=True,
                vllm_mode="server",
                vllm_server_base_url=server,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                max_steps=steps,
                learning_rate=2e-3,
                lr_scheduler_type="constant",
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=12,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        client = trainer.vllm_generation.vllm_client
        decode = trainer.processing_class.decode

        def answers() -> list[str]:
            told = client.generate(PROMPTS, temperature=0.0, max_tokens=12)
            return [decode(ids) for ids in told["completion_ids"]]

        before = answers()
        trainer.train()
        # TRL sends weights before it generates: those of the last step are still to be sent.
        trainer.vllm_generation.sync_weights()
        after = answers()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print("reward, step by step:", " ".join(f"{reward:.3f}" for reward in rewards))
    for prompt, first, last in zip(PROMPTS, before, after, strict=True):
        print(f"{prompt!r}: {first!r} -> {last!r}")
    if output is not None:
        trainer.model.save_pretrained(output)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="GRPO steps")
    parser.add_argument("--model", type=Path, help="a model's directory; without, a random small one")
    parser.add_argument("--server", help="the address of a dplaunch server of that model; without, one is started")
    parser.add_argument("--output", type=Path, help="where the trained model is saved")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        model = args.model or small_model(Path(directory))
        server = args.server or stack.enter_context(a_server(model))
        train(model, server, args.steps, args.output)


if __name__ == "__main__":
    main()
