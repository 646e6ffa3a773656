"""The ranks' log files: where they go, their last lines, and clearing old ones away."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dplaunch.errors import LogDirError

OWNER_FILE = ".dplaunch-launch"
"""Marks a log directory that dplaunch made by itself and may remove; says which launcher uses it."""

KEEP_LAUNCHES = 20
"""How many log directories of past launches stay."""

TAIL_BLOCK_BYTES = 64 * 1024
TAIL_LIMIT_BYTES = 1024 * 1024
"""How far back `tail` looks. A progress bar redrawn for an hour is one line of many megabytes."""

_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
# tqdm's "Loading:  50%|#####     | 1/2 [00:01<00:01,  1.2it/s]"; a traceback may follow on the same line.
_TQDM = re.compile(r"^[^|\r]*?\d{1,3}%(?: Completed)? ?\|[^\r]*?\[\d[^\]\r]{0,80}\]")
_RICH_BAR = re.compile(r"[━╸╺]{5,}")


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


def newest(parent: Path) -> Path | None:
    """The owned log directory below parent of the latest launch; None where there is none."""
    with contextlib.suppress(OSError):
        owned = [(owner.created, path) for path in parent.iterdir() if (owner := _read_owner(path)) is not None]
        return max(owned)[1] if owned else None
    return None


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


def cleaned(lines: Iterable[bytes]) -> list[str]:
    """Those of the lines that say something, as text."""
    texts = (clean(line.decode(errors="replace")) for line in lines)
    return [text for text in texts if text.strip()]


def tail(path: Path, lines: int = 20) -> list[str]:
    """The last lines of a log, cleaned; blank ones and progress bars do not count.

    Reads from the end, at most `TAIL_LIMIT_BYTES`. A file that cannot be read has no lines.
    """
    try:
        with path.open("rb") as file:
            return tail_of(file, lines, file.seek(0, os.SEEK_END))
    except OSError:
        return []


def tail_of(file: BinaryIO, lines: int, end: int) -> list[str]:
    """The last lines before the place `end` of an open file; as `tail`."""
    want = TAIL_BLOCK_BYTES
    while True:
        start = max(0, end - want)
        file.seek(start)
        data = file.read(end - start)
        if start > 0:
            data = re.split(rb"[\r\n]", data, maxsplit=1)[-1]  # its first line is most likely cut
        found = cleaned(data.split(b"\n"))
        if len(found) >= lines or start == 0 or want >= TAIL_LIMIT_BYTES:
            return found[-lines:] if lines > 0 else []
        want *= 4
