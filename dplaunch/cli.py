"""The `dplaunch` command. Imports click and nothing heavier: `--help` answers at once."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dplaunch import commands
from dplaunch._version import __version__
from dplaunch.boundary import run_at_boundary
from dplaunch.errors import ExitCode, UsageError
from dplaunch.options import ENV_PREFIX, OPTIONS, Option
from dplaunch.settings import Config, build_spec, build_ui, read_config
from dplaunch.spec import LaunchSpec

if TYPE_CHECKING:
    from dplaunch.plan import LaunchPlan

DEBUG_VARIABLE = ENV_PREFIX + "DEBUG"
_CONFIG_KEY = "dplaunch.config"

_DESCRIPTION = """Data-parallel vLLM: one engine core a rank, each replaceable.

Without a command it serves. Every flag of `vllm serve` works too and means what it means there; only
`--data-parallel-*` is dplaunch's work: use --dp and --backend. An option may also be a variable (DPLAUNCH_DP=2)
or a line of the file that --config names (dp = 2; vLLM's flags in its table [vllm]); the command line comes first,
then variables, then the file.
"""

_EXAMPLES = """\b
Examples:
  dplaunch --dp 2
  dplaunch --dp 8 --model Qwen/Qwen3-8B --max-model-len 8192 --api-key KEY
  dplaunch plan --dp 4 -tp 2 --model ./my-model
  dplaunch status --watch
"""


def _exit_codes() -> str:
    named = {
        ExitCode.OK: "stopped as asked",
        ExitCode.INTERNAL: "a bug in dplaunch",
        ExitCode.USAGE: "a flag or value that cannot be",
        ExitCode.MODEL: "no such model",
        ExitCode.RESOURCES: "too few devices or too little memory",
        ExitCode.ADDRESS: "the address cannot be bound",
        ExitCode.VLLM: "vLLM is missing or not a supported version",
        ExitCode.LOG_DIR: "logs cannot be written",
        ExitCode.RANK_FAILED: "a rank died while starting",
        ExitCode.START_TIMEOUT: "a rank was not ready in time",
        ExitCode.GROUP_DEAD: "too many ranks were lost",
        ExitCode.BACKEND: "the backend is unknown or not installed",
        ExitCode.NO_GROUP: "no such group is running, or it does not answer",
        ExitCode.INTERRUPTED: "Ctrl-C",
        ExitCode.TERMINATED: "SIGTERM",
    }
    return "\n".join(["\b", "Exit codes:", *(f"  {code.value:<4}{text}" for code, text in named.items())])


_EPILOG = f"{_EXAMPLES}\n{_exit_codes()}"


class _Root(click.Group):
    """`serve` is what happens without a command, and its options are in the top help text."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["-h"]:
            args = ["--help"]
        if not args or args[0] not in (*self.commands, "--help", "--version"):
            args = ["serve", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        self.commands["serve"].format_options(ctx, formatter)


def _load_config(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    config = read_config(Path(value)) if value else Config()
    ctx.meta[_CONFIG_KEY] = config
    ctx.default_map = {**(ctx.default_map or {}), **config.options}


def _click_option(option: Option) -> Callable[[Any], Any]:
    details: dict[str, Any] = {"help": option.help, "envvar": option.variable, "default": option.default}
    if option.switch:
        return click.option(f"{option.flag}/--no-{option.flag[2:]}", **(details | {"default": False}))
    if option.metavar:
        details["metavar"] = option.metavar
    return click.option(
        option.flag,
        option.name,
        type=option.type,
        multiple=option.multiple,
        show_default=option.default is not None,
        **details,
    )


def _launch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All options of a launch, and whatever else is there for vLLM."""
    command = click.argument("vllm_argv", nargs=-1, type=click.UNPROCESSED, metavar="[M] [VLLM FLAGS]")(command)
    command = _debug_option(command)
    command = click.option(
        "--config",
        metavar="FILE",
        envvar=ENV_PREFIX + "CONFIG",
        is_eager=True,
        expose_value=False,
        callback=_load_config,
        help="A TOML file with any of these options.",
    )(command)
    for option in reversed(OPTIONS):
        command = _click_option(option)(command)
    return command


def _debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        help=f"Show the traceback of an unexpected error ({DEBUG_VARIABLE}=1).",
    )(command)


@click.group(cls=_Root, help=_DESCRIPTION, epilog=_EPILOG, subcommand_metavar="[COMMAND] [OPTIONS]", options_metavar="")
@click.version_option(__version__, prog_name="dplaunch", message="%(prog)s %(version)s")
def cli() -> None:
    """The root; its commands do the work."""


_PASS_ON = {"ignore_unknown_options": True}


@cli.command(context_settings=_PASS_ON, epilog=_EPILOG)
@_launch_options
@click.pass_context
def serve(ctx: click.Context, /, vllm_argv: tuple[str, ...], **options: Any) -> None:
    """Serve a model over HTTP (what happens without a command)."""
    spec = _spec(ctx, options, vllm_argv)
    ui = build_ui(options, spec.vllm_argv)
    from dplaunch.serve import serve as run

    ctx.exit(int(run(spec, ui)))


@cli.command(context_settings=_PASS_ON, epilog=_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--show-env", "show_env", is_flag=True, help="Print each rank's environment too.")
@_launch_options
@click.pass_context
def plan(ctx: click.Context, /, vllm_argv: tuple[str, ...], as_json: bool, show_env: bool, **options: Any) -> None:
    """Print what serve would do, and start nothing."""
    spec = _spec(ctx, options, vllm_argv)
    import asyncio

    from dplaunch import plan_view

    made = asyncio.run(_plan_only(spec))
    show = plan_view.as_json if as_json else plan_view.as_text
    click.echo(show(made, launcher_env=dict(os.environ) if show_env else None))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_debug_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine has, and what would go wrong."""
    from dplaunch.doctor import run

    ctx.exit(int(run(json=as_json)))


commands.register(cli)


async def _plan_only(spec: LaunchSpec) -> LaunchPlan:
    from dplaunch.backend import load_backend
    from dplaunch.planner import plan_launch

    backend = load_backend(spec.backend)
    try:
        return await plan_launch(spec, backend, make_model=False)
    finally:
        # To look at a cluster is to be connected to it.
        await backend.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Args:
        argv: the arguments after the command's name; None for the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    return run_at_boundary(lambda: _run(arguments), debug=debug)


def entry() -> NoReturn:
    """The `dplaunch` program: runs the command and ends the process."""
    code = main()
    # Whoever is impatient now could only spoil the last lines.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # All that we started is closed by now. What the interpreter would still do is take vLLM's libraries apart, which
    # takes a second and prints complaints of theirs (nanobind's "leaked" lines) after our last word.
    atexit._run_exitfuncs()
    # The reader of a pipe may have left; the code says so.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _run(arguments: list[str]) -> None:
    # Not cli.main(): that one has answers of its own to Ctrl-C and to a closed pipe.
    with cli.make_context("dplaunch", arguments) as ctx:
        cli.invoke(ctx)


def _spec(ctx: click.Context, options: dict[str, Any], vllm_argv: tuple[str, ...]) -> LaunchSpec:
    config: Config = ctx.meta[_CONFIG_KEY]
    # The command line comes after the file's flags: of a flag given twice, vLLM's parser takes the later.
    spec = build_spec(options, [*config.vllm_argv, *vllm_argv])
    if options["model"] is None and spec.model in cli.commands:
        raise UsageError(
            f"the command {spec.model} must come first: dplaunch {spec.model} ...",
            hint=f"For a model of that name use --model {spec.model}.",
        )
    return spec
