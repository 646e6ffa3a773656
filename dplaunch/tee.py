"""Following the ranks' logs, all in one stream."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from dplaunch.logs import TAIL_BLOCK_BYTES, cleaned, tail_of

TEE_INTERVAL_S = 0.2
"""Seconds between two looks at the files: soon enough for a reader, and nothing beside what a rank uses."""

_COLOURS = (36, 33, 35, 32, 34, 31)


class _Follower:
    """Reads what is new in one file, whole lines at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rest = b""
        # A log that is there already belongs to an earlier launch or incarnation.
        self._position = self._size()

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def history(self, lines: int) -> list[str]:
        """The last whole lines of what is there already. One that is unfinished is still to come."""
        try:
            with self._path.open("rb") as file:
                start = file.seek(max(0, self._position - TAIL_BLOCK_BYTES))
                self._position = start + file.read(self._position - start).rfind(b"\n") + 1
                return tail_of(file, lines, self._position)
        except OSError:
            return []

    def new_lines(self, *, last: bool = False) -> list[str]:
        """Lines that came since the last call; with `last`, the unfinished one too."""
        size = self._size()
        if size < self._position:  # truncated
            self._position, self._rest = 0, b""
        data = self._rest
        if size > self._position:
            with contextlib.suppress(OSError), self._path.open("rb") as file:
                file.seek(self._position)
                data += file.read()
                self._position = file.tell()
        *whole, self._rest = data.split(b"\n")
        if last:
            whole.append(self._rest)
            self._rest = b""
        return cleaned(whole)


class Tee:
    """Follows the ranks' logs and writes each new line with its rank in front: "rank 1 | ...".

    Runs in a daemon thread from `start` to `stop`. When the stream goes away it ends quietly.

    Args:
        logs: the log of each rank; create the Tee before the ranks are spawned, only what is new is shown.
        stream: None for whatever `sys.stderr` is at the time of each write, so that a live table stays whole.
        color: None for colours where the stream is a terminal.
        history: lines of each log to begin with, of what is there already.
    """

    def __init__(
        self,
        logs: Mapping[int, Path],
        stream: TextIO | None = None,
        *,
        color: bool | None = None,
        history: int = 0,
    ) -> None:
        self._history = history
        self._stream = stream
        self._color = (stream or sys.stderr).isatty() if color is None else color
        self._followers = {rank: _Follower(path) for rank, path in logs.items()}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, rank: int, path: Path) -> None:
        """Follows one more rank; call it before the rank is spawned."""
        with self._lock:
            self._followers[rank] = _Follower(path)

    def start(self) -> None:
        """Begins to follow."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name="dplaunch-tee", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Writes what is left and ends the thread. Idempotent."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _follow(self) -> None:
        # OSError: the reader of a pipe left. ValueError: the stream was closed.
        with contextlib.suppress(OSError, ValueError):
            if self._history:
                for rank, follower in sorted(self._followers.items()):
                    self._write(rank, follower.history(self._history))
            while not self._stopping.wait(TEE_INTERVAL_S):
                self._copy(last=False)
            self._copy(last=True)

    def _copy(self, *, last: bool) -> None:
        with self._lock:
            followers = sorted(self._followers.items())
        for rank, follower in followers:
            self._write(rank, follower.new_lines(last=last))

    def _write(self, rank: int, lines: Sequence[str]) -> None:
        if lines:
            stream = self._stream or sys.stderr
            stream.write(self._labelled(rank, lines))
            stream.flush()

    def _labelled(self, rank: int, lines: Sequence[str]) -> str:
        label = f"rank {rank} | "
        if self._color:
            label = f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m{label}\x1b[0m"
        return "".join(f"{label}{line}\n" for line in lines)
