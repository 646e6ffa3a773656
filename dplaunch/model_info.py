"""What a model is, read from its config.json without importing torch, transformers or vLLM."""

from __future__ import annotations

import difflib
import enum
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dplaunch.asked import Asked
from dplaunch.errors import ModelError
from dplaunch.spec import LaunchSpec

_EXPERT_KEYS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
    "num_moe_experts",
    "num_routed_experts",
)
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


class ModelKind(enum.StrEnum):
    """Where a model is."""

    DIRECTORY = "directory"  # a local directory
    FILE = "file"  # one local GGUF file
    HUB_CACHE = "hub cache"  # a hub model whose config is on this machine
    HUB = "hub"  # a hub model, or one in an object store, that is not on this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is known about a model before anything is loaded.

    Args:
        model: what vLLM is to be given: a path with `~` expanded, or the name as asked.
        kind: where it is.
        path: where its files are on this machine; None when they are not.
        config: its config.json; None when not on this machine.
        is_moe: whether it has experts; None when not known.
        weight_bytes: the size of its weight files; None when not known.
        max_len: the longest sequence that it was made for, tokens; None when not known.
        dtype: what its weights are stored in; None when not known.
    """

    model: str
    kind: ModelKind
    path: Path | None = None
    config: Mapping[str, Any] | None = None
    is_moe: bool | None = None
    weight_bytes: int | None = None
    max_len: int | None = None
    dtype: str | None = None


def read_model_of(spec: LaunchSpec) -> ModelInfo | None:
    """The model of a launch; None for the built-in one.

    Raises:
        ModelError: when it is unknown or no model.
    """
    if spec.model is None:
        return None
    asked = Asked(spec)
    return read_model(
        spec.model,
        revision=asked.text("revision"),
        cache_dir=asked.text("download_dir"),
        config_elsewhere="hf_config_path" in asked,
    )


def read_model(
    model: str, *, revision: str | None = None, cache_dir: str | None = None, config_elsewhere: bool = False
) -> ModelInfo:
    """What is known about a model: a local path is read, a hub name looked up in the hub's cache.

    Args:
        model: a path or a hub name.
        revision: the hub revision; None for the main one.
        cache_dir: the hub's cache; None for its default.
        config_elsewhere: whether vLLM was told to take config.json from another place.

    Raises:
        ModelError: when a path does not exist, or when what is there is no model.
    """
    if "://" in model:
        return ModelInfo(model=model, kind=ModelKind.HUB)
    path = Path(model).expanduser()
    if path.is_dir():
        return _read_directory(path, config_elsewhere)
    if path.exists():
        if path.suffix == ".gguf":
            size = path.stat().st_size
            return ModelInfo(model=str(path), kind=ModelKind.FILE, path=path, weight_bytes=size)
        raise ModelError(f"{path} is a file, not a model", hint="Name the directory that holds config.json.")
    # A hub name is "name" or "owner/name": anything longer can only have been meant as a path.
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ModelError(f"model path {model} does not exist", hint=_nearest(path.absolute()))
    return _read_hub_cache(model, revision, cache_dir)


def _read_directory(path: Path, config_elsewhere: bool) -> ModelInfo:
    weights = _weight_bytes(path)
    # Mistral's own format has params.json in its place.
    files = [path / name for name in ("config.json", "params.json") if (path / name).is_file()]
    if not files:
        if config_elsewhere:
            return ModelInfo(model=str(path), kind=ModelKind.DIRECTORY, path=path, weight_bytes=weights)
        hint = "A model directory holds config.json, its tokenizer and its weights."
        if (path / "adapter_config.json").is_file():
            hint = "It is a LoRA adapter: serve its base model with --enable-lora --lora-modules NAME=PATH."
        raise ModelError(f"{path} holds no config.json", hint=hint)
    config = _read_config(files[0])
    if files[0].name == "config.json" and not ("architectures" in config or "model_type" in config):
        raise ModelError(
            f"{files[0]} is no model's: it has neither `architectures` nor `model_type`",
            hint="Name a directory as `save_pretrained` or the hub makes it.",
        )
    return _describe(str(path), ModelKind.DIRECTORY, path, config)


def _read_hub_cache(model: str, revision: str | None, cache_dir: str | None) -> ModelInfo:
    unknown = ModelInfo(model=model, kind=ModelKind.HUB)
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return unknown
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision, cache_dir=cache_dir)
    except HFValidationError as error:
        raise ModelError(
            f"{model!r} is neither a path that exists nor a hub name",
            hint="A hub name looks like owner/name; a local path begins with / . or ~",
        ) from error
    # Besides a path it returns None, or a marker for "the hub is known to have no such file".
    if not isinstance(found, str):
        return unknown
    file = Path(found)
    return _describe(model, ModelKind.HUB_CACHE, file.parent, _read_config(file))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}", hint="Copy or download the model anew.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is no model's: it holds no JSON object")
    return config


def _describe(model: str, kind: ModelKind, path: Path, config: dict[str, Any]) -> ModelInfo:
    levels = list(_levels(config))
    lengths = [level[key] for level in levels for key in _LENGTH_KEYS if isinstance(level.get(key), int)]
    dtypes = [level[key] for level in levels for key in _DTYPE_KEYS if isinstance(level.get(key), str)]
    return ModelInfo(
        model=model,
        kind=kind,
        path=path,
        config=config,
        is_moe=any(_has_several(level.get(key)) for level in levels for key in _EXPERT_KEYS),
        weight_bytes=_weight_bytes(path),
        max_len=lengths[0] if lengths else None,
        dtype=dtypes[0] if dtypes else None,
    )


def _levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and every object within it: multimodal models keep the language model's in `text_config`."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _levels(value)


def _has_several(count: object) -> bool:
    if isinstance(count, list):
        return any(_has_several(entry) for entry in count)
    return isinstance(count, int) and count > 1


def _weight_bytes(path: Path) -> int | None:
    """The size of the weights in the first format that is there: the same ones may be there in several."""
    for suffix in _WEIGHT_SUFFIXES:
        size = sum(file.stat().st_size for file in path.glob(f"*{suffix}") if file.exists())
        if size:
            return size
    return None


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir())
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"Did you mean {parent / near[0]}?"
    return f"{parent} exists, but holds no {path.name!r}."
