"""`dplaunch logs`: the ranks' logs of a running group, or of the newest one that has ended."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path

import click

from dplaunch import control_client
from dplaunch.control_client import GroupAddress
from dplaunch.errors import NoGroupError, UsageError
from dplaunch.logs import newest
from dplaunch.tee import Tee

LOOK_S = 1.0
"""Seconds between two looks at whether the group is still there, and has new ranks."""

_RANK_LOG = re.compile(r"rank(\d+)\.log")


def show(name: str | None, *, rank: int | None, follow: bool, lines: int) -> None:
    """Writes the logs to standard output, each line with its rank in front.

    Args:
        name: the group; None for the one that runs, or ended last.
        rank: None for all.
        follow: whether to go on with what is new, until Ctrl-C or the group's end.
        lines: of each rank, of what is there already.

    Raises:
        NoGroupError: when there is no such group, or there are several.
        UsageError: when it has no such rank.
    """
    group, files = _find(name)
    if rank is not None:
        if rank not in files:
            raise UsageError(f"there is no log of rank {rank}", hint=f"Ranks with a log: {sorted(files)}.")
        files = {rank: files[rank]}
    tee = Tee(files, sys.stdout, history=lines)
    with tee:
        if follow and group is not None:
            _follow(group, tee, files, every=rank is None)


def _follow(group: GroupAddress, tee: Tee, files: dict[int, Path], *, every: bool) -> None:
    """Returns when the group has ended, or at Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        while group in control_client.find_groups():
            if every:
                # One that answers late is still there; its new ranks are seen at the next look.
                with contextlib.suppress(NoGroupError):
                    for number, path in _files_of(group).items():
                        if number not in files:
                            files[number] = path
                            tee.add(number, path)
            time.sleep(LOOK_S)
        click.echo(f"dplaunch: group {group.name} has ended", err=True)


def _find(name: str | None) -> tuple[GroupAddress | None, dict[int, Path]]:
    """The running group, or None, and the logs."""
    running = [group for group in control_client.find_groups() if name in (None, group.name)]
    if running:
        (group,) = control_client.choose(name, one=True)
        return group, _files_of(group)
    directory = _ended(name)
    logs = {int(match[1]): path for path in directory.iterdir() if (match := _RANK_LOG.fullmatch(path.name))}
    click.echo(f"dplaunch: no group is running; these are the logs of {directory.name}, which has ended", err=True)
    return None, logs


def _ended(name: str | None) -> Path:
    import platformdirs

    parent = platformdirs.user_state_path("dplaunch") / "logs"
    directory = newest(parent) if name is None else parent / Path(name).name
    if directory is None or not directory.is_dir():
        what = "no group is running, and none has left logs" if name is None else f"there is no group {name}"
        raise NoGroupError(f"{what} in {parent}", hint="Logs of a launch with --log-dir are where that says.")
    return directory


def _files_of(group: GroupAddress) -> dict[int, Path]:
    status = control_client.ask(group, "status")
    return {rank["rank"]: Path(rank["log_file"]) for rank in status["ranks"]}
