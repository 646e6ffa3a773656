"""How the progress of a batch is drawn: a bar on a terminal, one overwritten line in a notebook."""

from __future__ import annotations

import sys
from typing import Protocol, TextIO

from dplaunch.live_table import can_draw, screen

BAR_WIDTH = 30
"""Characters of the bar in a notebook."""


class Bar(Protocol):
    """Something that shows how far a batch is."""

    def draw(self, done: int, rate: float, left: float | None) -> None:
        """Shows prompts done, tokens a second, and seconds left (None when not known)."""

    def close(self) -> None:
        """Leaves what was drawn last. Called once."""


def choose_bar(total: int) -> Bar | None:
    """The bar for where stderr goes; None where none can be drawn, or where another display is."""
    from rich.console import Console

    if Console(file=sys.stderr).is_jupyter:
        return NotebookBar(total, sys.stderr)
    if can_draw(sys.stderr) and screen.acquire(blocking=False):
        return TerminalBar(total, sys.stderr)
    return None


class TerminalBar:
    """A bar by rich; holds the screen until it is closed."""

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

    def draw(self, done: int, rate: float, left: float | None) -> None:
        """See `Bar`."""
        self._progress.update(self._task, completed=done, refresh=True, facts=_facts(rate, left))

    def close(self) -> None:
        """See `Bar`."""
        try:
            self._progress.stop()
        finally:
            screen.release()


class NotebookBar:
    """One line, overwritten: rich's notebook display needs ipywidgets and swallows other output."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream

    def draw(self, done: int, rate: float, left: float | None) -> None:
        """See `Bar`."""
        filled = min(BAR_WIDTH, BAR_WIDTH * done // self._total)
        bar = "█" * filled + "░" * (BAR_WIDTH - filled)
        self._stream.write(f"\r{bar} {done}/{self._total} prompts  {_facts(rate, left)}   ")
        self._stream.flush()

    def close(self) -> None:
        """See `Bar`."""
        self._stream.write("\n")
        self._stream.flush()


def _facts(rate: float, left: float | None) -> str:
    return f"{rate:,.0f} tokens/s  ETA {_clock(left)}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
