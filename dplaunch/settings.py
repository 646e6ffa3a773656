"""The command's options, declared once, and how they become a spec.

The command line comes before `DPLAUNCH_*` variables, these before the config file, and that before the defaults.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from dplaunch.argv import nearest_word, python_name, refuse_data_parallel, split_model
from dplaunch.errors import UsageError
from dplaunch.spec import ClusterOptions, ExecutorKind, LaunchSpec, Mode, RestartPolicy, StartMethod
from dplaunch.ui import UiOptions

ENV_PREFIX = "DPLAUNCH_"
VLLM_TABLE = "vllm"

_SPEC = LaunchSpec()
_UI = UiOptions()


def rank_count(value: Any) -> Any:
    """A number of ranks as an int. Anything else is left as it is for `LaunchSpec` to refuse in its words."""
    try:
        return int(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of `serve` and `plan`, on the command line, as a variable and in the file.

    Args:
        name: as in the config file: "log_dir".
        help: what it does.
        type: how click reads it.
        default: what holds when nobody sets it; None is not shown.
        metavar: what stands for the value in the help text; "" for the type's own.
        switch: True for an option without a value.
        multiple: True for one that may be given several times; it has no variable.
    """

    name: str
    help: str
    type: Any = str
    default: Any = None
    metavar: str = ""
    switch: bool = False
    multiple: bool = False

    @property
    def flag(self) -> str:
        """As typed: "--log-dir"."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str | None:
        """The environment variable: "DPLAUNCH_LOG_DIR"."""
        return None if self.multiple else ENV_PREFIX + self.name.upper()


def _choice(values: Any) -> click.Choice[str]:
    return click.Choice([str(value) for value in values])


OPTIONS = (
    Option(name="model", help="Path or hub name. Without it, a built-in model is served.", metavar="M"),
    Option(name="dp", help="Data-parallel ranks.", type=rank_count, default=_SPEC.dp, metavar="N"),
    Option(
        name="backend",
        help="What runs the ranks: mp for processes of this machine, ray for actors of a Ray cluster.",
        default=_SPEC.backend,
    ),
    Option(name="host", help="HTTP address to bind.", default=_UI.host),
    Option(name="port", help="HTTP port; 0 for a free one.", type=click.IntRange(0, 65535), default=_UI.port),
    Option(
        name="devices",
        help="Devices of each rank, ranks apart by semicolons; cores where there is no accelerator.",
        metavar='"0,1;2,3"',
    ),
    Option(
        name="executor",
        help="How a rank drives its devices.",
        type=_choice(ExecutorKind),
        default=_SPEC.executor.value,
    ),
    Option(
        name="mode",
        help="Whether ranks are replaced one by one (independent) or share one fate (lockstep).",
        type=_choice(Mode),
        default=_SPEC.mode.value,
    ),
    Option(
        name="start_method",
        help="Fork ranks from a process that has imported vLLM, or spawn them.",
        type=_choice(StartMethod),
        default=_SPEC.start_method.value,
    ),
    Option(
        name="start_timeout",
        help="Seconds until a rank that is not ready fails the launch.",
        type=float,
        default=_SPEC.start_timeout_s,
        metavar="SECONDS",
    ),
    Option(
        name="max_restarts",
        help=f"Restarts of one rank within {_SPEC.restart.window_s:g} seconds; 0 for never.",
        type=click.IntRange(min=0),
        default=_SPEC.restart.limit,
    ),
    Option(name="min_ranks", help="Stop when fewer ranks than this are left.", type=int, default=_SPEC.min_ranks),
    Option(
        name="ray_address",
        help="Ray cluster to attach to: auto, or HOST:PORT. By default RAY_ADDRESS, else a local one for this launch.",
    ),
    Option(name="nodes", help="Machines of the Ray cluster to use, by name or address; by default all.", metavar="A,B"),
    Option(
        name="num_gpus",
        help="Share of a device that each worker holds on Ray; below 1 leaves room for others.",
        type=float,
        default=_SPEC.cluster.num_gpus,
    ),
    Option(name="env", help="A variable for every rank; may be repeated.", metavar="KEY=VALUE", multiple=True),
    Option(name="name", help="The group's id, the stem of every rank's names. A fresh one if left out."),
    Option(name="log_dir", help="Where each rank's log goes; by default under the user's state directory."),
    Option(name="tee", help="Show the ranks' output too, with the rank in front.", switch=True),
    Option(name="quiet", help="Show the address, warnings and errors only.", switch=True),
    Option(name="json_logs", help="Write events as one JSON object a line.", switch=True),
)
"""Every option but `--config` and `--debug`."""

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
        restart=RestartPolicy(limit=options["max_restarts"]),
        min_ranks=options["min_ranks"],
        log_dir=None if options["log_dir"] is None else Path(options["log_dir"]),
        base_id=options["name"],
        env=parse_env(options["env"]),
        cluster=ClusterOptions(
            address=options["ray_address"],
            nodes=parse_nodes(options["nodes"]),
            num_gpus=options["num_gpus"],
        ),
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
