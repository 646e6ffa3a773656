"""Writes the built-in models: the body of the child process that `dplaunch.demo` starts.

`python -m dplaunch.demo_convert DIRECTORY [GGUF]` writes SmolLM2 from the GGUF file, or else random weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_HIDDEN, _INTERMEDIATE, _LAYERS = 128, 256, 2

_RANDOM_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INTERMEDIATE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,  # vLLM's CPU attention takes no less
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "dtype": "float32",
}

_SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_smollm2(gguf: Path, directory: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a Hugging Face directory (bfloat16)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = str(gguf.parent)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    # A model read from GGUF refuses to be saved; its weights in a model that was never quantized do not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(directory)


def write_random(directory: Path) -> None:
    """Writes a two-layer Llama with seeded random weights (float32, 2 MB) and a byte-level tokenizer."""
    import safetensors.numpy

    vocabulary = _write_tokenizer(directory)
    config = _RANDOM_CONFIG | {"vocab_size": vocabulary}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    weights = _random_weights(vocabulary)
    safetensors.numpy.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(directory: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    start, end = _SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "chat_template": _CHAT_TEMPLATE,
        "model_max_length": _RANDOM_CONFIG["max_position_embeddings"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return len(words)


def _random_weights(vocabulary: int) -> dict[str, Any]:
    import numpy

    random = numpy.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Any:
        # Wide enough that the most likely token is never a near tie, which batching could turn over.
        return random.normal(0.0, 0.3, (rows, columns)).astype(numpy.float32)

    ones = numpy.ones(_HIDDEN, numpy.float32)
    weights = {
        "model.embed_tokens.weight": matrix(vocabulary, _HIDDEN),
        "lm_head.weight": matrix(vocabulary, _HIDDEN),
        "model.norm.weight": ones.copy(),
    }
    for layer in range(_LAYERS):
        at = f"model.layers.{layer}"
        weights |= {f"{at}.self_attn.{name}_proj.weight": matrix(_HIDDEN, _HIDDEN) for name in "qkvo"}
        weights |= {f"{at}.mlp.{name}_proj.weight": matrix(_INTERMEDIATE, _HIDDEN) for name in ("gate", "up")}
        weights[f"{at}.mlp.down_proj.weight"] = matrix(_HIDDEN, _INTERMEDIATE)
        weights[f"{at}.input_layernorm.weight"] = ones.copy()
        weights[f"{at}.post_attention_layernorm.weight"] = ones.copy()
    return weights


def _main(arguments: list[str]) -> None:
    directory = Path(arguments[0])
    if len(arguments) > 1:
        write_smollm2(Path(arguments[1]), directory)
    else:
        write_random(directory)


if __name__ == "__main__":
    _main(sys.argv[1:])
