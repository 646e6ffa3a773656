"""The options, and the config file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dplaunch.errors import UsageError
from dplaunch.options import OPTIONS
from dplaunch.settings import build_spec, build_ui, parse_devices, parse_env, parse_nodes, read_config
from dplaunch.spec import ClusterOptions, ExecutorKind, LaunchSpec, StartMethod
from dplaunch.ui import UiOptions

DEFAULTS: dict[str, Any] = {
    option.name: False if option.switch else () if option.multiple else option.default for option in OPTIONS
}


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "dplaunch.toml"
    path.write_text(text)
    return path


def test_the_options_defaults_are_those_of_the_spec() -> None:
    assert build_spec(DEFAULTS, []) == LaunchSpec()
    assert build_ui(DEFAULTS, []) == UiOptions()


def test_every_option_reaches_the_spec() -> None:
    options = DEFAULTS | {
        "model": "M",
        "dp": 2,
        "devices": "0,1;2,3",
        "executor": "mp",
        "start_method": "spawn",
        "start_timeout": 60.0,
        "max_restarts": 0,
        "min_ranks": 2,
        "env": ("A=1", "B=x=y"),
        "name": "g",
        "log_dir": "/logs",
        "ray_address": "auto",
        "nodes": "10.0.0.7, b",
        "num_gpus": 0.5,
    }
    spec = build_spec(options, ["--seed", "1"])
    assert spec.devices == (("0", "1"), ("2", "3"))
    assert (spec.executor, spec.start_method) == (ExecutorKind.MP, StartMethod.SPAWN)
    assert (spec.start_timeout_s, spec.restart.limit, spec.min_ranks) == (60.0, 0, 2)
    assert spec.env == {"A": "1", "B": "x=y"}
    assert (spec.base_id, spec.log_dir) == ("g", Path("/logs"))
    assert spec.cluster == ClusterOptions(address="auto", nodes=("10.0.0.7", "b"), num_gpus=0.5)
    assert spec.vllm_argv == ("--seed", "1")


def test_a_bare_word_is_the_model_unless_one_was_named() -> None:
    assert build_spec(DEFAULTS, ["M", "--seed", "1"]).model == "M"
    named = build_spec(DEFAULTS | {"model": "N"}, ["--new-flag", "a", "b"])
    assert (named.model, named.vllm_argv) == ("N", ("--new-flag", "a", "b"))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        (None, None),
        ("0", (("0",),)),
        ("0,1;2,3", (("0", "1"), ("2", "3"))),
        (" 0 ; GPU-a ", (("0",), ("GPU-a",))),
        ("0;1;", (("0",), ("1",))),
    ],
)
def test_devices_are_grouped_by_rank(text: str | None, groups: object) -> None:
    assert parse_devices(text) == groups


@pytest.mark.parametrize(("text", "names"), [(None, ()), ("a", ("a",)), (" a , b,", ("a", "b"))])
def test_machines_are_apart_by_commas(text: str | None, names: tuple[str, ...]) -> None:
    assert parse_nodes(text) == names


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_a_list_of_no_machine_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--nodes names no machine"):
        parse_nodes(text)


@pytest.mark.parametrize("pair", ["A", "=1", ""])
def test_a_variable_without_a_name_or_value_is_refused(pair: str) -> None:
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_env([pair])


def test_a_config_file_holds_options_and_flags_of_vllm(tmp_path: Path) -> None:
    text = """
    dp = 2
    start-timeout = 60
    devices = [[0, 1], [2, 3]]
    tee = true
    env = { A = "1", B = 2 }

    [vllm]
    max-model-len = 2048
    enforce_eager = true
    enable_prefix_caching = false
    served-model-name = ["a", "b"]
    compilation_config = { mode = 3 }
    """
    read = read_config(config(tmp_path, text))
    assert read.options == {
        "dp": 2,
        "start_timeout": 60,
        "devices": "0,1;2,3",
        "tee": True,
        "env": ["A=1", "B=2"],
    }
    assert read.vllm_argv == (
        "--max-model-len=2048",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--served-model-name",
        "a",
        "b",
        '--compilation-config={"mode": 3}',
    )


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("bakend = 'mp'", "unknown option 'bakend'", "Did you mean backend?"),
        ("max_model_len = 5", "unknown option 'max_model_len'", "[vllm]"),
        ("dp = ", "is not TOML", "[vllm]"),
        ("vllm = 3", "must be a table", "[vllm]"),
        ("[vllm]\nport = 1", "dplaunch's own", "above"),
        ("devices = [0, 1]", "devices in", ""),
        ("dp = [2]", "dp in", ""),
        ("env = 'A=1'", "env in", ""),
        ("nodes = [1]", "nodes in", ""),
        ("nodes = { a = 1 }", "nodes in", ""),
        ("ray-adress = 'auto'", "unknown option 'ray_adress'", "Did you mean ray_address?"),
    ],
)
def test_a_config_file_that_cannot_be_is_refused(tmp_path: Path, text: str, words: str, hint: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read_config(config(tmp_path, text))
    assert hint in caught.value.hint
    assert "dplaunch.toml" in caught.value.message


def test_a_config_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml cannot be read: No such file"):
        read_config(tmp_path / "nowhere.toml")
