"""Models that need no hub: config.json and a tokenizer, and for one of them random weights too.

What vLLM loads with `load_format="dummy"` needs no weights. The others are there to have answers compared.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "head_dim": 128,
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def _dense(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    size = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return _QWEN3 | size | more


def _moe(hidden: int, layers: int, heads: int, experts: int, of_each: int, **more: Any) -> dict[str, Any]:
    routed = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": of_each,
        "norm_topk_prob": True,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    return _dense(hidden, 4 * hidden, layers, heads, **(routed | more))


CONFIGS: dict[str, dict[str, Any]] = {
    # The sizes of Qwen3-0.6B and Qwen3-8B.
    "small": _dense(1024, 3072, 28, 16, tie_word_embeddings=True),
    "large": _dense(4096, 12288, 36, 32),
    "moe": _moe(1024, 8, 16, 16, 512, num_key_value_heads=4, vocab_size=32000),
    # Random weights of 380 MB, wide enough that the most likely token is no near tie.
    "check": _dense(1024, 3072, 8, 16, vocab_size=32000),
    "tiny": _dense(128, 256, 2, 4, head_dim=32, num_key_value_heads=2, vocab_size=1024, torch_dtype="float32"),
    "tiny-moe": _moe(128, 2, 4, 4, 64, head_dim=32, num_key_value_heads=2, vocab_size=1024, torch_dtype="float32"),
}
"""By name: what config.json says."""

DEVIATION = 0.05
"""Of random weights."""


def model(name: str, *, weights: bool = False) -> Path:
    """The directory of a model; made on the first call.

    The path is the same in every process of a machine, since vLLM's compile cache goes by it.

    Args:
        name: of `CONFIGS`.
        weights: whether there are random weights too, always the same.
    """
    directory = Path(tempfile.gettempdir()) / f"dplaunch-gpu-{os.getuid()}" / (f"{name}-random" if weights else name)
    if not (directory / "config.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        config = CONFIGS[name]
        write_tokenizer(directory, int(config["vocab_size"]))
        if weights:
            _write_weights(directory, name)
        # Last, for it says that all is there.
        (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def write_tokenizer(directory: Path, size: int) -> None:
    """A tokenizer of bytes, filled up with words that no text has, so that every token has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġ{number:x}" for number in range(size - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[1],
        "pad_token": special[1],
        "model_max_length": 40960,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The parameters of a dense model, by their names in a checkpoint."""
    config = CONFIGS[name]
    hidden, head, vocabulary = config["hidden_size"], config["head_dim"], config["vocab_size"]
    queries, pairs = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    found: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    found["model.embed_tokens.weight"] = (vocabulary, hidden)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        of_layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (pairs, hidden),
            "self_attn.v_proj": (pairs, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "mlp.gate_proj": (config["intermediate_size"], hidden),
            "mlp.up_proj": (config["intermediate_size"], hidden),
            "mlp.down_proj": (hidden, config["intermediate_size"]),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found |= {f"model.layers.{layer}.{each}.weight": shape for each, shape in of_layer.items()}
    return found


def _write_weights(directory: Path, name: str) -> None:
    import safetensors.torch
    import torch

    dtype = getattr(torch, CONFIGS[name]["torch_dtype"])
    chance = torch.Generator().manual_seed(0)

    def weight(shape: tuple[int, ...]) -> Any:
        whole = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=chance) * DEVIATION
        return whole.to(dtype)

    tensors = {each: weight(shape) for each, shape in shapes(name).items()}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
