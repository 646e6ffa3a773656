"""The ranks' log files: where they go, their last lines, following them, and clearing old ones away."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TextIO

from dplaunch.errors import LogDirError

OWNER_FILE = ".dplaunch-launch"
"""Marks a log directory that dplaunch made by itself and may remove; says which launcher uses it."""

KEEP_LAUNCHES = 20
"""How many log directories of past launches stay."""

TEE_INTERVAL_S = 0.2
"""Seconds between two looks at the files: soon enough for a reader, and nothing beside what a rank uses."""

TAIL_BLOCK_BYTES = 64 * 1024
TAIL_LIMIT_BYTES = 1024 * 1024
"""How far back `tail` looks. A progress bar redrawn for an hour is one line of many megabytes."""

_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
# tqdm's "Loading:  50%|#####     | 1/2 [00:01<00:01,  1.2it/s]"; a traceback may follow on the same line.
_TQDM = re.compile(r"^[^|\r]*?\d{1,3}%(?: Completed)? ?\|[^\r]*?\[\d[^\]\r]{0,80}\]")
_RICH_BAR = re.compile(r"[━╸╺]{5,}")
_COLOURS = (36, 33, 35, 32, 34, 31)


def prepare_log_dir(path: Path, *, owned: bool = False) -> Path:
    """Makes sure that the directory exists and can be written; returns it absolute. A new one gets mode 0700.

    Args:
        owned: True for a directory that dplaunch chose itself, which `prune_old` may remove one day.

    Raises:
        LogDirError: when it cannot be written.
    """
    path = path.expanduser().absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Trying is the only test that holds for read-only mounts, quotas, ACLs and root alike.
        with tempfile.TemporaryFile(dir=path):
            pass
        if owned:
            _write_owner(path, live=True)
    except OSError as error:
        raise LogDirError(
            f"cannot write logs to {path}: {error.strerror or error}",
            hint="Name a directory that you can write: --log-dir DIR (log_dir= in Python).",
        ) from error
    return path


def release_log_dir(path: Path) -> None:
    """Says that the launch which used an owned directory is over, so that `prune_old` may remove it."""
    with contextlib.suppress(OSError):
        if (path / OWNER_FILE).exists():
            _write_owner(path, live=False)


def prune_old(parent: Path, keep: int = KEEP_LAUNCHES) -> list[Path]:
    """Removes the oldest owned log directories below parent but for the newest `keep`; returns those removed.

    A directory without dplaunch's mark (the user's own), one of another host, and one that a live launcher
    uses are never touched.
    """
    owned: list[tuple[float, Path]] = []
    with contextlib.suppress(OSError):
        for entry in parent.iterdir():
            owner = _read_owner(entry)
            if owner is not None and owner.host == socket.gethostname():
                owned.append((owner.created, entry))
    owned.sort(reverse=True)
    removed = []
    for _, path in owned[keep:]:
        owner = _read_owner(path)
        if owner is not None and not owner.is_live():
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


@dataclass(frozen=True, slots=True)
class _Owner:
    host: str
    pid: int  # 0 when the launch is over
    started: float  # when the process began, because pids are used again
    created: float

    def is_live(self) -> bool:
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            return self.pid > 0 and abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        return False


def _write_owner(path: Path, *, live: bool) -> None:
    import psutil

    known = _read_owner(path)
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid() if live else 0,
        "started": psutil.Process().create_time(),
        "created": known.created if known else time.time(),
    }
    (path / OWNER_FILE).write_text(json.dumps(owner))


def _read_owner(path: Path) -> _Owner | None:
    if path.is_symlink():
        return None
    try:
        owner = json.loads((path / OWNER_FILE).read_text())
        return _Owner(str(owner["host"]), int(owner["pid"]), float(owner["started"]), float(owner["created"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def clean(line: str) -> str:
    """A log line as text: without colours, and without what a progress bar drew. May be empty."""
    kept = [_without_bar(part) for part in _ANSI.sub("", line).split("\r")]
    # Parts before the last were overdrawn, unless a bar shared the line with something real.
    return next((part for part in reversed(kept) if part), "")


def _without_bar(part: str) -> str:
    if _RICH_BAR.search(part):
        return ""
    return _TQDM.sub("", part).rstrip()


def _cleaned(lines: Iterable[bytes]) -> list[str]:
    texts = (clean(line.decode(errors="replace")) for line in lines)
    return [text for text in texts if text.strip()]


def tail(path: Path, lines: int = 20) -> list[str]:
    """The last lines of a log, cleaned; blank ones and progress bars do not count.

    Reads from the end, at most `TAIL_LIMIT_BYTES`. A file that cannot be read has no lines.
    """
    try:
        with path.open("rb") as file:
            return _tail(file, lines)
    except OSError:
        return []


def _tail(file: BinaryIO, lines: int) -> list[str]:
    end = file.seek(0, os.SEEK_END)
    want = TAIL_BLOCK_BYTES
    while True:
        start = max(0, end - want)
        file.seek(start)
        data = file.read(end - start)
        if start > 0:
            data = re.split(rb"[\r\n]", data, maxsplit=1)[-1]  # its first line is most likely cut
        found = _cleaned(data.split(b"\n"))
        if len(found) >= lines or start == 0 or want >= TAIL_LIMIT_BYTES:
            return found[-lines:] if lines > 0 else []
        want *= 4


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
        return _cleaned(whole)


class Tee:
    """Follows the ranks' logs and writes each new line with its rank in front: "rank 1 | ...".

    Runs in a daemon thread from `start` to `stop`. When the stream goes away it ends quietly.

    Args:
        logs: the log of each rank; create the Tee before the ranks are spawned, only what is new is shown.
        stream: None for whatever `sys.stderr` is at the time of each write, so that a live table stays whole.
        color: None for colours where the stream is a terminal.
    """

    def __init__(self, logs: Mapping[int, Path], stream: TextIO | None = None, *, color: bool | None = None) -> None:
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
            while not self._stopping.wait(TEE_INTERVAL_S):
                self._copy(last=False)
            self._copy(last=True)

    def _copy(self, *, last: bool) -> None:
        with self._lock:
            followers = sorted(self._followers.items())
        for rank, follower in followers:
            lines = follower.new_lines(last=last)
            if lines:
                stream = self._stream or sys.stderr
                stream.write(self._labelled(rank, lines))
                stream.flush()

    def _labelled(self, rank: int, lines: Sequence[str]) -> str:
        label = f"rank {rank} | "
        if self._color:
            label = f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m{label}\x1b[0m"
        return "".join(f"{label}{line}\n" for line in lines)
