"""How the command's options become a spec.

The command line comes before `DPLAUNCH_*` variables, these before the config file, and that before the defaults.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dplaunch.argv import nearest_word, python_name, refuse_data_parallel, split_model
from dplaunch.errors import UsageError
from dplaunch.options import OPTIONS
from dplaunch.spec import (
    ClusterOptions,
    ExecutorKind,
    LaunchSpec,
    Mode,
    ProbePolicy,
    RequestPolicy,
    RestartPolicy,
    StartMethod,
)
from dplaunch.ui import UiOptions

VLLM_TABLE = "vllm"

_OPTION_NAMES = tuple(option.name for option in OPTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a config file says.

    Args:
        options: dplaunch's own options, as click's default_map takes them.
        vllm_argv: the `[vllm]` table as flags.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    vllm_argv: tuple[str, ...] = ()


def read_config(path: Path) -> Config:
    """Reads a TOML file: dplaunch's options at the top, vLLM's flags in the table `[vllm]`.

    Raises:
        UsageError: when it cannot be read, or holds what nobody knows.
    """
    try:
        content = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"config file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        hint = "A dplaunch config file is TOML; vLLM's own YAML goes into its table [vllm], key by key."
        raise UsageError(f"config file {path} is not TOML: {error}", hint=hint) from error
    table = content.pop(VLLM_TABLE, {})
    if not isinstance(table, dict):
        raise UsageError(f"{VLLM_TABLE} in {path} must be a table", hint="Write [vllm] on a line of its own.")
    options = {key.replace("-", "_"): value for key, value in content.items()}
    for key in options:
        _check_key(key, path)
    return Config(
        options={key: _plain_value(key, value, path) for key, value in options.items()},
        vllm_argv=_table_argv(table, path),
    )


def build_spec(options: Mapping[str, Any], vllm_argv: Sequence[str]) -> LaunchSpec:
    """The spec from the options' values and what is left for vLLM.

    Args:
        options: a value for each of `OPTIONS`, by name.
        vllm_argv: vLLM's flags, and the model where it was given as a bare word.

    Raises:
        UsageError: when a value cannot be.
    """
    refuse_data_parallel(vllm_argv)
    model, rest = options["model"], tuple(vllm_argv)
    if model is None:
        model, rest = split_model(vllm_argv)
    return LaunchSpec(
        model=model,
        dp=options["dp"],
        backend=options["backend"],
        vllm_argv=rest,
        devices=parse_devices(options["devices"]),
        executor=ExecutorKind(options["executor"]),
        mode=Mode(options["mode"]),
        start_method=StartMethod(options["start_method"]),
        start_timeout_s=options["start_timeout"],
        restart=RestartPolicy(
            limit=0 if options["restart"] == "never" else options["max_restarts"],
            window_s=options["restart_window"],
        ),
        probe=ProbePolicy(timeout_s=options["probe_timeout"], busy_timeout_s=options["probe_busy_timeout"]),
        requests=RequestPolicy(
            max_failures=options["max_request_failures"],
            max_queue=options["max_queue"],
            poison_file=None if options["poison_file"] is None else Path(options["poison_file"]),
        ),
        min_ranks=options["min_ranks"],
        log_dir=None if options["log_dir"] is None else Path(options["log_dir"]),
        base_id=options["name"],
        env=parse_env(options["env"]),
        cluster=ClusterOptions(
            address=options["ray_address"],
            nodes=parse_nodes(options["nodes"]),
            num_gpus=options["num_gpus"],
        ),
        any_vllm=options["any_vllm"],
    )


def build_ui(options: Mapping[str, Any], server_argv: Sequence[str]) -> UiOptions:
    """What the command shows and where it listens."""
    names = ("host", "port", "tee", "quiet", "json_logs")
    return UiOptions(**{name: options[name] for name in names}, server_argv=tuple(server_argv))


def parse_devices(text: str | None) -> tuple[tuple[str, ...], ...] | None:
    """The devices of each rank from "0,1;2,3"."""
    if text is None:
        return None
    groups = text.strip().strip(";").split(";")
    return tuple(tuple(name.strip() for name in group.split(",") if name.strip()) for group in groups)


def parse_nodes(text: str | None) -> tuple[str, ...]:
    """The machines in "A,B"; none for None.

    Raises:
        UsageError: when it names none.
    """
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    if text is not None and not names:
        raise UsageError(f"--nodes names no machine: {text!r}", hint="Leave it out to use all.")
    return names


def parse_env(pairs: Sequence[str]) -> dict[str, str]:
    """Variables from "KEY=VALUE".

    Raises:
        UsageError: when one has no name or no "=".
    """
    env = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"--env takes KEY=VALUE, not {pair!r}")
        env[key] = value
    return env


def _check_key(key: str, path: Path) -> None:
    if key in _OPTION_NAMES:
        return
    near = nearest_word(key, _OPTION_NAMES)
    hint = f"Did you mean {near}?" if near else "Flags of vLLM go into the table [vllm]."
    raise UsageError(f"unknown option {key!r} in {path}", hint=hint)


def _plain_value(key: str, value: Any, path: Path) -> Any:
    """A value in the form that the command line has it in."""
    if key == "devices" and isinstance(value, list) and all(isinstance(group, list) for group in value):
        return ";".join(",".join(map(str, group)) for group in value)
    if key == "nodes" and isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value)
    if key == "env" and isinstance(value, dict):
        return [f"{name}={text}" for name, text in value.items()]
    if isinstance(value, dict | list) or key == "env":
        raise UsageError(f"{key} in {path} cannot be {value!r}")
    return value


def _table_argv(table: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    argv: list[str] = []
    for key, value in table.items():
        name = python_name(key)
        if name in _OPTION_NAMES:
            raise UsageError(f"{key} in [vllm] of {path} is dplaunch's own", hint="Move it above the table [vllm].")
        argv += _flag_argv(name.replace("_", "-"), value)
    return tuple(argv)


def _flag_argv(name: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{name}"]
    if value is False:
        return [f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
