"""The table of ranks on a terminal while they start, and the care that nothing else garbles it."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

from dplaunch.events import Event, RankState
from dplaunch.plan import RankSpec

if TYPE_CHECKING:
    from rich.console import Group

REFRESH_INTERVAL_S = 0.25
"""Seconds between two drawings: the seconds column runs, and a slow terminal keeps up."""

screen = threading.Lock()
"""Held by whatever draws on the terminal: two live displays at once would overdraw each other."""

_PROCESS = re.compile(r"\bpid \d+|\bactor \w+(?: on [\w.:-]+\w)?")
_STYLES = {
    RankState.STARTING: "yellow",
    RankState.READY: "green",
    RankState.DOWN: "red",
    RankState.STALE: "yellow",
    RankState.FAILED: "bold red",
}
_OVER = (RankState.STOPPING, RankState.STOPPED, RankState.FAILED)


def can_draw(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can move its cursor."""
    from rich.console import Console

    # isatty itself, because FORCE_COLOR makes rich take a file for a terminal.
    return stream.isatty() and not Console(file=stream).is_dumb_terminal


@dataclass(slots=True)
class _Row:
    devices: str = ""
    state: RankState | None = None
    phase: str = ""
    process: str = ""
    settled_at: float | None = None  # Unix time at which the seconds stopped

    def update(self, event: Event) -> None:
        if event.state is not None:
            self.state = event.state
            self.settled_at = None if event.state is RankState.STARTING else event.at
        self.phase = "" if self.state is RankState.READY else event.phase or self.phase
        if found := _PROCESS.search(event.message):
            self.process = found[0]


class LiveTable:
    """One row a rank, drawn from `start` to `stop`, which leaves the final table.

    While it is drawn, what is written to the terminal through `sys.stdout` and `sys.stderr` appears above it.
    Both are put back by `stop`, and what others kept of the stand-ins goes on to the real ones.

    Args:
        ranks: how many ranks the launch has; 0 when not known yet.
        stream: the terminal.
        started_at: Unix time at which the launch began.
    """

    def __init__(self, ranks: int, stream: TextIO, started_at: float) -> None:
        from rich.console import Console
        from rich.live import Live

        self._rows = {rank: _Row() for rank in range(ranks)}
        self._is_complete = ranks > 0  # whether every rank of the launch has a row
        self._started_at = started_at
        self._lock = threading.Lock()
        self._console = Console(file=stream)
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._standins: dict[str, _Above] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="dplaunch-progress", daemon=True)

    @property
    def settled(self) -> bool:
        """Whether the start is over: every expected rank is ready, or one was given up."""
        states = [row.state for row in self._rows.values()]
        all_ready = self._is_complete and all(state is RankState.READY for state in states)
        return all_ready or any(state in _OVER for state in states)

    def start(self) -> None:
        """Begins to draw. Call it once."""
        for name in ("stdout", "stderr"):
            original = getattr(sys, name)
            # A stream that goes to a file must go on to do so.
            if original is not None and original.isatty():
                standin = self._standins[name] = _Above(original, self.print)
                setattr(sys, name, standin)
        self._live.start(refresh=True)
        self._thread.start()

    def stop(self) -> None:
        """Draws the final table and puts everything back. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            for standin in self._standins.values():
                standin.flush_rest()
            self._live.stop()
        finally:
            for name, standin in self._standins.items():
                standin.release()
                if getattr(sys, name) is standin:
                    setattr(sys, name, standin.stream)
            self._standins.clear()

    def expect(self, ranks: Iterable[RankSpec]) -> None:
        """Makes a row for every rank, with its devices, and their node where there are several."""
        with self._lock:
            self._is_complete = True
            planned = tuple(ranks)
            several = len({rank.node for rank in planned}) > 1
            for rank in planned:
                row = self._rows.setdefault(rank.identity.rank, _Row())
                row.devices = _devices(rank) + (f" on {rank.node}" if several else "")

    def update(self, event: Event) -> None:
        """Takes up an event of a rank; those of the group are not for the table."""
        if event.rank is not None:
            with self._lock:
                self._rows.setdefault(event.rank, _Row()).update(event)

    def print(self, text: str) -> None:
        """Writes whole lines above the table."""
        from rich.text import Text

        self._console.print(Text.from_ansi(text), soft_wrap=True)

    def _refresh(self) -> None:
        try:
            while not self._stopping.wait(REFRESH_INTERVAL_S):
                self._live.refresh()
        except (OSError, ValueError):
            return  # the terminal is gone; the launch goes on

    def _render(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        now = time.time()
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("rank", "state", "phase", "seconds", "devices", "process"):
            table.add_column(name, justify="right" if name in ("rank", "seconds") else "left", no_wrap=True)
        with self._lock:
            rows = sorted(self._rows.items())
            ready = sum(row.state is RankState.READY for _, row in rows)
            for rank, row in rows:
                state = Text(row.state or "waiting", style=_STYLES.get(row.state, "dim") if row.state else "dim")
                seconds = max(0.0, (row.settled_at or now) - self._started_at)
                table.add_row(str(rank), state, row.phase, f"{seconds:.1f}", row.devices, row.process)
            ends = [row.settled_at for _, row in rows]
        until = max(end for end in ends if end is not None) if self.settled else now
        count = f"{ready} of {len(rows)} ranks ready" if rows else "preparing"
        return Group(table, Text(f"{count}, {max(0.0, until - self._started_at):.1f} s", style="bold"))


def _devices(rank: RankSpec) -> str:
    kind = "core" if rank.device_type == "cpu" else rank.device_type
    return f"{len(rank.devices)} x {kind}" if rank.is_scheduled else f"{kind} {','.join(rank.devices)}"


class _Above:
    """Stands in for `sys.stdout` or `sys.stderr`: whole lines go above the table, until it is released."""

    def __init__(self, stream: TextIO, show: Callable[[str], None]) -> None:
        self.stream = stream
        self._show = show
        self._rest = ""
        self._released = False
        # Re-entered when what shows a line writes one itself (a warning, say).
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            if self._released:
                return self.stream.write(text)
            *lines, self._rest = (self._rest + text).split("\n")
            if lines:
                self._show("\n".join(lines))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush_rest(self) -> None:
        """Shows an unfinished line, which nobody may finish any more."""
        with self._lock:
            if self._rest:
                rest, self._rest = self._rest, ""
                self._show(rest)

    def release(self) -> None:
        """From here on everything goes straight to the stream."""
        with self._lock:
            self._released = True
            rest, self._rest = self._rest, ""
            if rest:
                self.stream.write(rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(cast("Any", self.stream), name)
