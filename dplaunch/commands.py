"""The commands for groups that run already: status, logs, stop, scale, restart. Each asks over the control socket."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from dplaunch.errors import NoGroupError, UsageError

WATCH_S = 1.0
"""Seconds between two looks of `--watch`."""

ENDS_S = 60.0
"""Seconds for a launcher to end once its ranks have: it has sockets to close, and Ray to leave."""

Command = Callable[..., Any]

_group = click.option("--group", "name", metavar="NAME", help="The group that is meant, where several run.")


def _drain(default: str) -> Callable[[Command], Command]:
    help_text = f"Time for the requests in flight to end where they are; without it, {default}."
    return click.option("--drain", type=click.FloatRange(min=0), metavar="SECONDS", help=help_text)


_drain_change = _drain("30 s")


def register(cli: click.Group) -> None:
    """Adds the commands to the root."""
    for command in (status, logs, stop, scale, restart, lm_eval):
        cli.add_command(command)


@click.command()
@_group
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of groups, with everything that is known.")
@click.option("--watch", is_flag=True, help="Look again each second, until Ctrl-C.")
def status(name: str | None, as_json: bool, watch: bool) -> None:
    """Show the groups that run here, and their ranks."""
    if watch and not as_json:
        from dplaunch.status_view import watch as draw

        draw(lambda: _statuses(name), WATCH_S)
        return
    show = _print_json if as_json else _print_table
    show(_statuses(name))
    while watch:
        time.sleep(WATCH_S)
        show(_statuses(name))


@click.command()
@_group
@click.option("--rank", type=int, metavar="R", help="This rank's only.")
@click.option("-f", "--follow", is_flag=True, help="Go on showing what is new, until Ctrl-C or the group's end.")
@click.option("--lines", type=click.IntRange(min=0), default=20, show_default=True, help="Lines of each rank so far.")
def logs(name: str | None, rank: int | None, follow: bool, lines: int) -> None:
    """Show the ranks' logs, also those of the newest group that has ended."""
    from dplaunch.logs_view import show

    show(name, rank=rank, follow=follow, lines=lines)


@click.command()
@_group
@_drain("what --shutdown-timeout said at the launch")
def stop(name: str | None, drain: float | None) -> None:
    """End a group, in order."""
    result = _do(name, "stop", {"drain": drain})
    if result["ends_process"]:
        _await_end(result["pid"])
    click.echo("stopped")


@click.command()
@_group
@click.option("--dp", type=int, required=True, metavar="N", help="Data-parallel ranks from now on.")
@_drain_change
def scale(name: str | None, dp: int, drain: float | None) -> None:
    """Change the number of ranks while the group serves."""
    result = _do(name, "scale", {"dp": dp, "drain": drain})
    click.echo(f"{result['ready']} of {result['dp']} ranks ready")


@click.command()
@_group
@click.option("--rank", "ranks", type=int, multiple=True, metavar="R", help="This rank; may be repeated.")
@click.option("--all", "every", is_flag=True, help="All ranks.")
@click.option("--rolling", is_flag=True, help="One after the other, so that the group serves on.")
@_drain_change
def restart(name: str | None, ranks: tuple[int, ...], every: bool, rolling: bool, drain: float | None) -> None:
    """Replace ranks by fresh ones while the group serves."""
    if every == bool(ranks):
        raise UsageError("which ranks?", hint="Use --rank R (may be repeated) or --all.")
    result = _do(name, "restart", {"ranks": None if every else list(ranks), "rolling": rolling, "drain": drain})
    click.echo(f"{result['ready']} of {result['dp']} ranks ready")


@click.command("lm-eval", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness's own command, with `--model dplaunch`."""
    from dplaunch.integrations.lm_eval import main

    main(arguments)


def _statuses(name: str | None) -> list[dict[str, Any]]:
    """The status of each group; one that does not answer is left out with a warning, unless it is the only one."""
    from dplaunch import control_client

    groups = control_client.choose(name, one=False)
    found = []
    for group in groups:
        try:
            found.append(control_client.ask(group, "status"))
        except NoGroupError as error:
            if len(groups) == 1:
                raise
            click.echo(f"dplaunch: {error.message}", err=True)
    return found


def _do(name: str | None, verb: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Asks for a change, shows what happens, and returns the result."""
    from dplaunch import control_client

    (group,) = control_client.choose(name, one=True)
    # A change may take minutes without a word; whether the group listens at all is known at once.
    control_client.ask(group, "status")
    given = {key: value for key, value in arguments.items() if value is not None}
    result: dict[str, Any] = {}
    for line in control_client.stream(group, verb, given):
        if line["type"] == "result":
            result = line["result"]
        elif not line["event"]["phase"]:
            click.echo(line["event"]["message"])
    return result


def _await_end(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        if not poller.poll(ENDS_S * 1000):
            click.echo(f"the ranks have ended, but process {pid} has not yet", err=True)
    finally:
        os.close(descriptor)


def _print_json(groups: list[dict[str, Any]]) -> None:
    click.echo(json.dumps(groups, indent=2))
    sys.stdout.flush()


def _print_table(groups: list[dict[str, Any]]) -> None:
    from dplaunch.status_view import as_text

    click.echo(as_text(groups))
