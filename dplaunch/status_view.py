"""A group's status for people: a heading and a table that fits the terminal."""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

MIN_WIDTH = 40
"""Columns of a terminal below which nothing is left out any more: the lines wrap."""

MIN_COLUMNS = 3
"""Columns of the table that are always there."""

GAP = "  "

COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "degraded": "yellow",
    "stale": "yellow",
    "stopping": "yellow",
    "down": "red",
    "dead": "red",
    "failed": "red",
}

Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    cell: Callable[[Status], str]
    keep: int  # columns with less are left out first when it gets narrow
    right: bool = False


@dataclass(frozen=True, slots=True)
class _Filled:
    """A column with its texts, all of one width."""

    title: str
    texts: tuple[str, ...]  # the header first
    keep: int

    @property
    def width(self) -> int:
        return len(self.texts[0])


def as_text(groups: Sequence[Status], *, width: int | None = None) -> str:
    """All groups.

    Args:
        groups: `dplaunch.status.snapshot` of each.
        width: columns of the terminal; None for what it has.
    """
    wide = shutil.get_terminal_size((120, 24)).columns if width is None else width
    return "\n\n".join(_one(group, max(wide, MIN_WIDTH)) for group in groups)


def _one(group: Status, width: int) -> str:
    return "\n".join([*_heading(group, width), "", *_table(group, width)])


def watch(look: Callable[[], Sequence[Status]], interval_s: float) -> None:
    """Shows the status again and again in its place, until Ctrl-C or the last group's end."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()

    def drawn() -> Text:
        return Text.from_ansi(as_text(look(), width=console.width))

    with Live(drawn(), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        try:
            while True:
                time.sleep(interval_s)
                live.update(drawn(), refresh=True)
        except KeyboardInterrupt:
            return


def duration(seconds: float) -> str:
    """ "4s", "3m12s", "5h02m", "3d04h"."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _heading(group: Status, width: int) -> list[str]:
    weights = group["weights"] or {}
    state = click.style(group["state"], fg=COLOURS.get(group["state"]), bold=True)
    facts = {
        "model": group["model"],
        "address": group["address"] or "no HTTP server",
        "runs": f"{group['backend']}, {group['mode']}, weights {weights.get('version', '0')}, pid {group['pid']}",
        "requests": f"{_requests(group['requests'])}, {group['tokens_per_s']:.0f} tokens/s",
        "logs": _home(group["log_dir"]),
    }
    if group["stance"] != "serving":
        facts["stance"] = f"{group['stance']}: requests wait"
    if stale := {rank["stale"]: None for rank in group["ranks"] if rank["stale"]}:
        facts["stale"] = "; ".join(stale)
    if group["error"]:
        facts["error"] = group["error"]
    return [
        f"{group['name']}  {state}  {group['ready']} of {group['dp']} ranks ready  up {duration(group['uptime_s'])}",
        *(_fact(name, text, width) for name, text in facts.items()),
    ]


def _fact(name: str, text: str, width: int) -> str:
    start = f"  {name:<10}"
    room = width - len(start)
    if len(text) > room:
        # The end of a path tells more than its beginning.
        is_path = text.startswith(("/", "~"))
        text = f"…{text[len(text) - room + 1 :]}" if is_path else f"{text[: room - 1]}…"
    return start + text


def _requests(requests: Status) -> str:
    said = f"{requests['in_flight']} in flight, {requests['queued']} queued, {requests['finished']} finished"
    told = [f"{requests[name]} {name}" for name in ("moved", "lost", "poisoned", "refused") if requests[name]]
    return ", ".join([said, *told])


def _table(group: Status, width: int) -> list[str]:
    ranks = group["ranks"]
    several = len({rank["node"] for rank in ranks}) > 1
    columns = [_fill(column, ranks) for column in _columns(several, time.time())]
    titles = [column.title for column in columns]
    while sum(column.width + len(GAP) for column in columns) - len(GAP) > width and len(columns) > MIN_COLUMNS:
        least = min(columns, key=lambda column: column.keep)
        columns.remove(least)
    header, *rows = zip(*(_coloured(column) for column in columns), strict=True)
    lines = [click.style(GAP.join(header).rstrip(), dim=True), *(GAP.join(row).rstrip() for row in rows)]
    there = {column.title for column in columns}
    if left_out := [title for title in titles if title not in there]:
        lines += textwrap.wrap(f"not shown for want of width, but by --json: {', '.join(left_out)}", width)
    return lines


def _fill(column: _Column, ranks: Sequence[Status]) -> _Filled:
    texts = [column.title, *map(column.cell, ranks)]
    width = max(map(len, texts))
    return _Filled(
        column.title, tuple(text.rjust(width) if column.right else text.ljust(width) for text in texts), column.keep
    )


def _coloured(column: _Filled) -> list[str]:
    if column.title != "state":
        return list(column.texts)
    header, *states = column.texts
    return [header, *(click.style(state, fg=COLOURS.get(state.strip())) for state in states)]


def _columns(several_nodes: bool, now: float) -> list[_Column]:
    return [
        _Column("rank", lambda rank: str(rank["rank"]), 100, right=True),
        _Column("state", lambda rank: str(rank["state"]), 100),
        _Column("for", lambda rank: _since(rank, now), 40, right=True),
        _Column("process", _process, 80),
        _Column("node", lambda rank: str(rank["node"]), 70 if several_nodes else 10),
        _Column("devices", _devices, 60),
        _Column("identity", lambda rank: str(rank["instance_id"]), 30),
        _Column("inc", lambda rank: str(rank["incarnation"]), 25, right=True),
        _Column("in flight", lambda rank: str(rank["in_flight"]), 90, right=True),
        _Column("tok/s", lambda rank: f"{rank['tokens_per_s']:.0f}", 85, right=True),
        _Column("restarts", lambda rank: str(rank["restarts"]), 75, right=True),
        _Column("last exit", _last_exit, 65),
        _Column("log", lambda rank: Path(rank["log_file"]).name, 20),
    ]


def _since(rank: Status, now: float) -> str:
    return "" if rank["since"] is None else duration(max(0.0, now - rank["since"]))


def _process(rank: Status) -> str:
    return str(rank["process"]) or "-"


def _devices(rank: Status) -> str:
    names = [str(name) for name in rank["devices"]]
    if "any" in names:
        return f"{len(names)} x {rank['device_type']}"
    return f"{rank['device_type']} {','.join(names)}"


def _last_exit(rank: Status) -> str:
    died = rank["last_exit"]
    # The reason may be long, and is in the log and in --json.
    return "-" if died is None else str(died["text"]).partition(":")[0]


def _home(path: str) -> str:
    home = str(Path.home())
    return f"~{path[len(home) :]}" if path.startswith(f"{home}/") else path
