"""How the progress of a batch is drawn: a bar on a terminal, one overwritten line in a notebook, lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Protocol, TextIO

from dplaunch.batch_progress import BatchState
from dplaunch.live_table import can_draw, screen

BAR_WIDTH = 30
"""Characters of the bar in a notebook."""


REFRESH_INTERVAL_S = 0.25
"""Seconds between two drawings of a batch's bar."""

LINE_INTERVAL_S = 10.0
"""Seconds between two lines where nothing can be overwritten: a log of an hour gets 360."""

FEW_RANKS = 4
"""So many ranks are told one by one; of more, the least and the greatest share."""


class Bar(Protocol):
    """Something that shows how far a batch is."""

    interval_s: float
    """Seconds between two drawings."""

    def draw(self, state: BatchState) -> None:
        """Shows it."""

    def close(self) -> None:
        """Leaves what was drawn last. Called once."""


def choose_bar(total: int, *, lines_too: bool = False) -> Bar | None:
    """The bar for where stderr goes; where none can be drawn or another display is, lines if wanted, or None."""
    from rich.console import Console

    if Console(file=sys.stderr).is_jupyter:
        return NotebookBar(total, sys.stderr)
    if can_draw(sys.stderr) and screen.acquire(blocking=False):
        return TerminalBar(total, sys.stderr)
    return Lines(sys.stderr) if lines_too else None


class TerminalBar:
    """A bar by rich; holds the screen until it is closed."""

    interval_s = REFRESH_INTERVAL_S

    def __init__(self, total: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("prompts  {task.fields[facts]}"),
            console=Console(file=stream),
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=total, facts="")
        self._progress.start()

    def draw(self, state: BatchState) -> None:
        """See `Bar`."""
        self._progress.update(self._task, completed=state.done, refresh=True, facts=_facts(state))

    def close(self) -> None:
        """See `Bar`."""
        try:
            self._progress.stop()
        finally:
            screen.release()


class NotebookBar:
    """One line, overwritten: rich's notebook display needs ipywidgets and swallows other output."""

    interval_s = REFRESH_INTERVAL_S

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream

    def draw(self, state: BatchState) -> None:
        """See `Bar`."""
        filled = min(BAR_WIDTH, BAR_WIDTH * state.done // self._total)
        bar = "█" * filled + "░" * (BAR_WIDTH - filled)
        self._stream.write(f"\r{bar} {state.done}/{self._total} prompts  {_facts(state)}   ")
        self._stream.flush()

    def close(self) -> None:
        """See `Bar`."""
        self._stream.write("\n")
        self._stream.flush()


class Lines:
    """One plain line now and then."""

    interval_s = LINE_INTERVAL_S

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def draw(self, state: BatchState) -> None:
        """See `Bar`."""
        self._stream.write(f"{state.done}/{state.total} prompts  {_facts(state)}\n")
        self._stream.flush()

    def close(self) -> None:
        """See `Bar`."""


def _facts(state: BatchState) -> str:
    parts = [f"{state.tokens_per_s:,.0f} tokens/s", _shares(state.shares), f"ETA {_clock(state.left_s)}"]
    return "  ".join(part for part in parts if part)


def _shares(shares: Mapping[int, float]) -> str:
    if len(shares) < 2:
        return ""
    percents = [f"{100 * share:.0f}" for share in shares.values()]
    if len(percents) > FEW_RANKS:
        return f"ranks {100 * min(shares.values()):.0f}-{100 * max(shares.values()):.0f}%"
    return f"ranks {'/'.join(percents)}%"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
