"""What a watcher of the launch sees: reporters of the group's events."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from dplaunch.events import Event, Level, as_record
from dplaunch.plan import RankSpec

if TYPE_CHECKING:
    from dplaunch.live_table import LiveTable


class ReportKind(enum.StrEnum):
    """How events are shown."""

    AUTO = "auto"  # a live table on a terminal while starting, lines otherwise
    LINES = "lines"  # one plain line a change
    QUIET = "quiet"  # warnings and errors only
    JSON = "json"  # one JSON object a line


def make_reporter(
    kind: ReportKind = ReportKind.AUTO,
    *,
    ranks: int = 0,
    quiet_after: bool = False,
    stream: TextIO | None = None,
    started_at: float | None = None,
) -> Reporter:
    """A listener for a group's events, to be used as a context manager around the group's start.

    Args:
        ranks: how many ranks are started; 0 when not known yet.
        quiet_after: whether only warnings and errors are shown once the start is over.
        stream: where to write; None for stderr.
        started_at: Unix time at which the launch began; None for now.
    """
    stream = sys.stderr if stream is None else stream
    started_at = time.time() if started_at is None else started_at
    if kind is ReportKind.JSON:
        return JsonReporter(stream, started_at)
    if kind is ReportKind.AUTO and stream.isatty():
        return LiveReporter(stream, started_at, ranks=ranks, quiet_after=quiet_after)
    return Reporter(stream, started_at, quiet=kind is ReportKind.QUIET, quiet_after=quiet_after)


class Reporter:
    """Writes one plain line a change: "12.3s rank 0 loading", the seconds since the launch began."""

    def __init__(self, stream: TextIO, started_at: float, *, quiet: bool = False, quiet_after: bool = False) -> None:
        self._stream = stream
        self._started_at = started_at
        self._quiet = quiet
        self._quiet_after = quiet_after
        self._last: dict[int | None, tuple[int, str]] = {}

    def __call__(self, event: Event) -> None:
        """Shows an event. Never raises: when the stream is gone, nothing is shown any more."""
        # OSError: the reader of a pipe left. ValueError: the stream was closed.
        with contextlib.suppress(OSError, ValueError):
            self._show(event)

    def expect(self, ranks: Iterable[RankSpec]) -> None:
        """Takes up what the plan says about the ranks. Optional."""

    def close(self) -> None:
        """Says that the start is over: ends whatever is drawn. Idempotent; events are still taken."""
        self._quiet = self._quiet or self._quiet_after

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, event: Event) -> None:
        # A phase may be told again and again while it lasts; a change is told once.
        change = (event.incarnation, event.message)
        repeated = self._last.get(event.rank) == change or self._quiet
        self._last[event.rank] = change
        if event.level is not Level.INFO or not repeated:
            self._write(self._line(event))

    def _line(self, event: Event) -> str:
        level = "" if event.level is Level.INFO else f"{event.level}: "
        return f"{max(0.0, event.at - self._started_at):.1f}s {level}{event.message}"

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()


class JsonReporter(Reporter):
    """Writes one JSON object a line, for every event."""

    def _show(self, event: Event) -> None:
        self._write(json.dumps(as_record(event), ensure_ascii=False, default=str))


class LiveReporter(Reporter):
    """Draws a live table until the ranks have started, and writes lines from then on.

    Where another live display holds the terminal, it writes lines from the beginning.
    """

    def __init__(self, stream: TextIO, started_at: float, *, ranks: int = 0, quiet_after: bool = False) -> None:
        super().__init__(stream, started_at, quiet_after=quiet_after)
        self._ranks = ranks
        self._table: LiveTable | None = None

    def __enter__(self) -> Self:
        from dplaunch.live_table import LiveTable, can_draw, screen

        if can_draw(self._stream) and screen.acquire(blocking=False):
            self._table = LiveTable(self._ranks, self._stream, self._started_at)
            try:
                self._table.start()
            except BaseException:
                self.close()
                raise
        return self

    def expect(self, ranks: Iterable[RankSpec]) -> None:
        """Draws a row for each rank, with its devices."""
        if self._table is not None:
            self._table.expect(ranks)

    def close(self) -> None:
        """Leaves the final table."""
        super().close()
        table, self._table = self._table, None
        if table is None:
            return
        from dplaunch.live_table import screen

        try:
            # The terminal may be gone.
            with contextlib.suppress(OSError, ValueError):
                table.stop()
        finally:
            screen.release()

    def _show(self, event: Event) -> None:
        table = self._table
        if table is None:
            super()._show(event)
            return
        table.update(event)
        if table.settled or event.level is Level.ERROR:
            self.close()
            if event.level is not Level.INFO:
                super()._show(event)
        elif event.level is not Level.INFO or event.rank is None:
            table.print(self._line(event))
