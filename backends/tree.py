"""A rank's process tree: who belongs to it, how to end it, and what it leaves in shared memory."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")

CLEAR_TIMEOUT_S = 10.0
"""Seconds for processes to go after SIGKILL: a driver that frees tens of gigabytes takes some of them."""

STAT_BYTES = 4096
"""More than a process's line in /proc has: 52 numbers and a name."""

# By inode: a semaphore is made under another name than the one that it gets, and the kernel shows the first.
_MAPPED = re.compile(rb"^\S+ \S+ \S+ \S+ (\d+) +/dev/shm/", re.MULTILINE)
_DEFUNCT = (b"Z", b"X")


class Tree:
    """All processes of one rank: those of its process group, and those below them.

    The group alone would miss what moved to a group of its own, and ancestry alone what lost its parent.

    Args:
        pid: the rank's process, leader of its group.
        session: the session that it was made in (its zygote's). A group's number may be used again once the
            group is gone, but not within the session of a dead zygote.
        before: what was in shared memory before the rank was made, and so is not its to remove.
    """

    def __init__(self, pid: int, session: int, before: frozenset[str]) -> None:
        self.pid = pid
        self._session = session
        self._before = before
        self._names: set[str] = set()

    def members(self) -> list[int]:
        """The living processes of the tree."""
        return sorted(process.pid for process in self._members())

    def note_shared_memory(self) -> None:
        """Remembers the shared memory that the tree maps now, so that `clear` can remove it later."""
        self._note(self.members())

    def note_own_shared_memory(self) -> None:
        """The same for what the rank's own process maps, which its workers may have let go when it is killed. Cheap."""
        self._note([self.pid])

    def kill(self) -> list[int]:
        """SIGKILL to every process, stopped ones too; returns their pidfds, for the caller to close."""
        members = self._members()
        self._note([process.pid for process in members])
        killed = []
        for process in members:
            # By pidfd, and looked at again: the number may be another process's by now.
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(process.pid)
                killed.append(pidfd)
                if _same(process, _read_process(process.pid)):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return killed

    def clear(self, timeout_s: float = CLEAR_TIMEOUT_S) -> bool:
        """Kills what is left, waits until it is gone, removes the shared memory that nobody maps any more.

        Returns:
            False when processes are still there after `timeout_s`; then nothing is removed.
        """
        deadline = time.monotonic() + timeout_s
        # Again until none is found: a process may have been forked while the others were killed.
        while waiting := self.kill():
            try:
                if not _wait_for(waiting, deadline):
                    return False
            finally:
                for pidfd in waiting:
                    os.close(pidfd)
        self._sweep()
        return True

    def _note(self, pids: list[int]) -> None:
        if new := shared_memory_names() - self._before:
            for pid in pids:
                self._names |= _mapped_by(pid) & new

    def _members(self) -> list[_Process]:
        alive = [process for process in _processes() if process.state not in _DEFUNCT]
        found = {process.pid for process in alive if self._owns(process)}
        below = found
        while below:
            below = {process.pid for process in alive if process.parent in found} - found
            found |= below
        return [process for process in alive if process.pid in found]

    def _owns(self, process: _Process) -> bool:
        return process.session == self._session and self.pid in (process.group, process.pid)

    def _sweep(self) -> None:
        left = self._names & shared_memory_names()
        if not left:
            return
        for process in _processes():
            left -= _mapped_by(process.pid)
        for name in left:
            with contextlib.suppress(OSError):
                (SHARED_MEMORY / name).unlink()


def shared_memory_names() -> frozenset[str]:
    """The shared-memory objects of this host."""
    try:
        return frozenset(os.listdir(SHARED_MEMORY))
    except OSError:
        return frozenset()


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    state: bytes
    parent: int
    group: int
    session: int
    started: int


def _processes() -> Iterator[_Process]:
    """All but the kernel's own.

    Few system calls: beside a thread that computes, each one that lets go of the interpreter's lock may take 10 ms.
    """
    for entry in os.listdir("/proc"):
        with contextlib.suppress(ProcessLookupError):
            if entry.isdigit() and os.getsid(int(entry)) and (process := _read_process(int(entry))) is not None:
                yield process


def _read_process(pid: int) -> _Process | None:
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = os.read(file, STAT_BYTES)
    except OSError:
        return None
    finally:
        os.close(file)
    # The second field is the program's name, which may itself hold spaces and brackets.
    fields = text[text.rindex(b")") + 2 :].split()
    return _Process(pid, fields[0], int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def _same(one: _Process, other: _Process | None) -> bool:
    return other is not None and one.started == other.started


def _mapped_by(pid: int) -> set[str]:
    try:
        inodes = {int(inode) for inode in _MAPPED.findall(Path(f"/proc/{pid}/maps").read_bytes())}
        return {entry.name for entry in os.scandir(SHARED_MEMORY) if entry.inode() in inodes} if inodes else set()
    except OSError:
        return set()


def _wait_for(pidfds: list[int], deadline: float) -> bool:
    poller = select.poll()
    for pidfd in pidfds:
        poller.register(pidfd, select.POLLIN)
    left = len(pidfds)
    while left:
        ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready:
            return False
        for pidfd, _ in ready:
            poller.unregister(pidfd)
        left -= len(ready)
    return True
