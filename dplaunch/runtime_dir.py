"""The directory that a group's sockets live in: private, short-named, and gone with its owner."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import psutil


def make_runtime_dir() -> Path:
    """A new directory that only this user may enter. Its name carries the owner's pid, for `prune`.

    Not under the log directory: the path of a Unix socket may have 107 bytes, and log directories are long.
    """
    parent = _parent()
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.stat().st_uid != os.getuid():  # somebody else made it first
        return Path(tempfile.mkdtemp(prefix="dplaunch-"))
    _prune(parent)
    path = parent / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    path.mkdir(mode=0o700)
    return path


def _parent() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK) and len(runtime) < 40:
        return Path(runtime) / "dplaunch"
    return Path(tempfile.gettempdir()) / f"dplaunch-{os.getuid()}"


def _prune(parent: Path) -> None:
    """Removes what owners left that were killed."""
    for path in parent.iterdir():
        pid = path.name.partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
