"""The directory that a group's sockets live in: private, short-named, and gone with its owner."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from dplaunch.control_wire import SOCKET_NAME

_NAME = re.compile(r"(?P<pid>\d+)-\w+")


def make_runtime_dir() -> Path:
    """A new directory that only this user may enter. Its name carries the owner's pid, for `runtime_dirs`.

    Not under the log directory: the path of a Unix socket may have 107 bytes, and log directories are long.
    """
    parent = _parent()
    parent.mkdir(mode=0o700, exist_ok=True)
    if not _is_ours(parent):  # somebody else made it first
        return Path(tempfile.mkdtemp(prefix=f"{_own_name()}-{os.getpid()}-"))
    parent.chmod(0o700)
    _remove_left([*parent.iterdir()])
    path = parent / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    path.mkdir(mode=0o700)
    return path


def runtime_dirs() -> list[Path]:
    """The directories of this user's owners on this machine, wherever they were made; those of dead ones are removed.

    A launcher may have been started in another session than the one that looks, with other variables.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    temporary = {Path(tempfile.gettempdir()), Path("/tmp")}
    found: list[Path] = []
    for parent in {_parent(), Path(runtime) / "dplaunch", *(place / _own_name() for place in temporary)}:
        with contextlib.suppress(OSError):
            if _is_ours(parent):
                found += parent.iterdir()
    for place in temporary:
        with contextlib.suppress(OSError):
            found += (path for path in place.glob(f"{_own_name()}-*") if _is_ours(path))
    return sorted(_living(found))


def owner_pid(path: Path) -> int:
    """The process that made a directory; 0 where the name tells none."""
    match = _NAME.fullmatch(path.name.removeprefix(f"{_own_name()}-"))
    return int(match["pid"]) if match else 0


def _own_name() -> str:
    return f"dplaunch-{os.getuid()}"


def _parent() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK) and len(runtime) < 40:
        return Path(runtime) / "dplaunch"
    return Path(tempfile.gettempdir()) / _own_name()


def _is_ours(path: Path) -> bool:
    # A link that somebody else made would lead to what is ours too.
    facts = path.lstat()
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()


def _remove_left(paths: list[Path]) -> None:
    """Removes what owners left that were killed."""
    for _ in _living(paths):
        pass


def _living(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        with contextlib.suppress(OSError):
            if owner_pid(path) == 0:
                continue
            if _has_owner(path):
                yield path
            else:
                shutil.rmtree(path)


def _has_owner(path: Path) -> bool:
    control = path / SOCKET_NAME
    if not control.exists():
        return psutil.pid_exists(owner_pid(path))
    # Surer than the pid, which may be used again, or be that of another container's process.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(str(control))
        except ConnectionRefusedError:
            return False
        except OSError:  # its queue is full, or it has just been removed
            return True
        return True
