"""LoRA adapters that are made up."""

from __future__ import annotations

import json
from pathlib import Path

RANK = 8


def write_adapter(directory: Path, model: Path, *, seed: int) -> Path:
    """An adapter for the attention of a Llama or Qwen3 in that directory, strong enough to turn its answers over."""
    import numpy
    import safetensors.numpy

    targets = ("q_proj", "o_proj")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    queries = heads * (config.get("head_dim") or hidden // heads)
    random = numpy.random.default_rng(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, into, out in (("q_proj", hidden, queries), ("o_proj", queries, hidden)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = random.normal(0, 0.5, (RANK, into)).astype(numpy.float32)
            weights[f"{at}.lora_B.weight"] = random.normal(0, 0.5, (out, RANK)).astype(numpy.float32)
    safetensors.numpy.save_file(weights, directory / "adapter_model.safetensors")
    return directory
