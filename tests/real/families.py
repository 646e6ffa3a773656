"""What a launcher has started: its processes, and the directory of its sockets."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

import dplaunch
from dplaunch import runtime_dir
from dplaunch.testing import poll_until

ORPHANS_S = 5.0
"""Seconds within which all is gone after the launcher was killed."""

BACK_S = 180.0
"""Seconds within which a rank is back: as the tests' START_S, two cores and other work beside it."""

RANK_TITLE = "dplaunch::"
ZYGOTE_TITLE = "dplaunch::zygote"


def family(pid: int) -> list[psutil.Process]:
    """The living processes below a process."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def titled(processes: Iterable[psutil.Process], title: str) -> list[psutil.Process]:
    """Those whose title begins so."""
    return [process for process in processes if _title(process).startswith(title)]


def ranks_of(processes: Iterable[psutil.Process], name: str) -> list[psutil.Process]:
    """The ranks of the group `name`, in order."""
    return sorted(titled(processes, f"{RANK_TITLE}{name}_dp"), key=_title)


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended. One that nobody has collected yet counts: it holds nothing."""
    try:
        return not process.is_running() or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def wait_gone(processes: Iterable[psutil.Process], timeout_s: float = ORPHANS_S) -> None:
    """Returns when all have ended.

    Raises:
        TimeoutError: names those that have not.
    """
    everyone = list(processes)
    try:
        poll_until(lambda: all(map(is_gone, everyone)), timeout_s)
    except TimeoutError:
        left = [f"{process.pid} {_title(process)}" for process in everyone if not is_gone(process)]
        raise TimeoutError(f"still there after {timeout_s:g} s: {left}") from None


def kill_and_await(group: dplaunch.Group, rank: int) -> None:
    """SIGKILL for a rank's process, and its return."""
    (report,) = group.call("dplaunch_report", rank=rank)
    os.kill(report["pid"], signal.SIGKILL)
    poll_until(lambda: rank not in group.ranks_up, BACK_S, "the rank to be gone")
    poll_until(lambda: rank in group.ranks_up, BACK_S, "the rank to be back")


def socket_dirs(pid: int) -> set[Path]:
    """The socket directories that a launcher has made and not removed."""
    return set(runtime_dir._parent().glob(f"{pid}-*"))


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""
