"""What is known about a model before anything is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dplaunch.errors import ExitCode, ModelError
from dplaunch.model_info import ModelKind, read_model, read_model_of
from dplaunch.spec import LaunchSpec

DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def make_model(path: Path, config: Any, weights: int = 0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "config.json").write_text(text)
    if weights:
        (path / "model.safetensors").write_bytes(b"\0" * weights)
    return path


def test_a_directory_is_read(tmp_path: Path) -> None:
    info = read_model(str(make_model(tmp_path / "m", DENSE, weights=1000)))
    assert info.kind is ModelKind.DIRECTORY
    assert info.is_moe is False
    assert (info.weight_bytes, info.max_len, info.dtype) == (1000, 2048, "bfloat16")


def test_weights_in_two_formats_count_once(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", DENSE, weights=1000)
    (path / "pytorch_model.bin").write_bytes(b"\0" * 900)
    assert read_model(str(path)).weight_bytes == 1000


@pytest.mark.parametrize(
    ("more", "is_moe"),
    [
        ({}, False),
        ({"num_experts": 128}, True),
        ({"num_experts": 1}, False),
        ({"num_experts": None}, False),
        ({"n_routed_experts": 256}, True),
        ({"num_local_experts": 8}, True),
        ({"moe_num_experts": [64, 64]}, True),
        ({"text_config": {"num_experts": 16, "max_position_embeddings": 4096}}, True),
        ({"ffn_config": {"moe_num_experts": 16}}, True),
        ({"thinker_config": {"text_config": {"num_experts": 16}}}, True),
    ],
)
def test_experts_are_found_wherever_the_config_keeps_them(tmp_path: Path, more: dict[str, Any], is_moe: bool) -> None:
    assert read_model(str(make_model(tmp_path / "m", DENSE | more))).is_moe is is_moe


def test_mistrals_own_format_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"dim": 4096, "moe": {"num_experts": 8}}')
    assert read_model(str(tmp_path)).is_moe is True


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{not json", "cannot be read as JSON"),
        ("[1, 2]", "no JSON object"),
        ({"name": "something else"}, "neither `architectures` nor `model_type`"),
    ],
)
def test_a_config_that_is_no_models_is_refused(tmp_path: Path, config: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        read_model(str(make_model(tmp_path / "m", config)))
    assert str(tmp_path / "m" / "config.json") in caught.value.message
    assert caught.value.exit_code is ExitCode.MODEL


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        read_model(str(tmp_path))


def test_a_config_elsewhere_is_the_users_own_business(tmp_path: Path) -> None:
    spec = LaunchSpec(model=str(tmp_path), vllm_argv=("--hf-config-path", "/elsewhere"))
    info = read_model_of(spec)
    assert info is not None
    assert info.is_moe is None


def test_an_adapter_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        read_model(str(tmp_path))
    assert "--enable-lora" in caught.value.hint


def test_a_missing_path_names_the_nearest_sibling(tmp_path: Path) -> None:
    make_model(tmp_path / "llama-7b", DENSE)
    with pytest.raises(ModelError, match="does not exist") as caught:
        read_model(str(tmp_path / "lama-7b"))
    assert caught.value.hint == f"Did you mean {tmp_path / 'llama-7b'}?"


def test_a_missing_path_names_the_part_that_exists(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_model(str(tmp_path / "zzz" / "model"))
    assert caught.value.hint == f"{tmp_path} exists, but holds no 'zzz'."


def test_three_parts_can_only_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        read_model("models/llama/7b")


def test_a_relative_path_that_exists_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "owner" / "name", DENSE)
    monkeypatch.chdir(tmp_path)
    assert read_model("owner/name").kind is ModelKind.DIRECTORY


def test_the_home_directory_is_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_model(tmp_path / "m", DENSE)
    assert read_model("~/m").model == str(tmp_path / "m")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        read_model(str(file))


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    info = read_model(str(file))
    assert (info.kind, info.is_moe, info.weight_bytes) == (ModelKind.FILE, None, 4)


def test_a_hub_model_that_is_not_here_is_unknown(tmp_path: Path) -> None:
    info = read_model("owner/name", cache_dir=str(tmp_path))
    assert (info.kind, info.config, info.is_moe) == (ModelKind.HUB, None, None)


def test_a_hub_model_in_the_cache_is_read(tmp_path: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--owner--name"
    make_model(repository / "snapshots" / commit, DENSE | {"num_experts": 8}, weights=10)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    info = read_model("owner/name", cache_dir=str(tmp_path))
    assert (info.kind, info.is_moe, info.weight_bytes) == (ModelKind.HUB_CACHE, True, 10)
    assert info.model == "owner/name"


def test_a_name_that_no_hub_could_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a path that exists nor a hub name"):
        read_model("no such model", cache_dir=str(tmp_path))


def test_the_hub_cache_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert read_model("owner/name").kind is ModelKind.HUB


def test_an_object_store_is_left_to_vllm() -> None:
    assert read_model("s3://bucket/a/b/c").kind is ModelKind.HUB


def test_the_built_in_model_is_not_looked_for() -> None:
    assert read_model_of(LaunchSpec()) is None
