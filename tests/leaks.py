"""What a test leaves behind: processes, threads, file descriptors, shared memory."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

GRACE_S = 5.0
"""Seconds for what is on its way out: a killed process is reaped, a closed socket's thread ends."""

LAZY_FDS = 4
"""Descriptors that libraries open once and keep: /dev/urandom, an event loop's, a cached directory."""

HELPER_FDS = 6
"""Descriptors for each shared helper process that the test was the first to need."""

SHARED_THREADS = "dplaunch-zygote-"
"""The threads of shared helper processes, which stay as long as these."""

SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is at one moment."""

    children: frozenset[int]
    threads: frozenset[threading.Thread]
    fds: tuple[str, ...]
    shm: frozenset[str]

    @classmethod
    def take(cls) -> Snapshot:
        """What there is now."""
        return cls(
            children=frozenset(child.pid for child in psutil.Process().children(recursive=True)),
            threads=frozenset(threading.enumerate()),
            fds=tuple(sorted(_fds())),
            shm=frozenset(os.listdir(SHM)) if SHM.is_dir() else frozenset(),
        )

    def leaks(self, now: Snapshot, allowed_pids: Iterable[int]) -> list[str]:
        """One line for each kind of thing that `now` has and this has not."""
        allowed = set(allowed_pids)
        children = now.children - self.children - allowed
        threads = [thread for thread in now.threads - self.threads if _counts(thread)]
        shm = [name for name in now.shm - self.shm if not _held_by_others(name, now.children)]
        found = []
        if children:
            found.append("processes: " + "; ".join(map(_describe, sorted(children))))
        if threads:
            found.append("threads: " + ", ".join(sorted(thread.name for thread in threads)))
        if len(now.fds) > len(self.fds) + LAZY_FDS + HELPER_FDS * len(allowed - self.children):
            new = list(now.fds)
            for target in self.fds:
                if target in new:
                    new.remove(target)
            found.append(f"{len(now.fds) - len(self.fds)} file descriptors: " + ", ".join(new))
        if shm:
            found.append("shared memory: " + ", ".join(sorted(shm)))
        return found


def leaks_since(before: Snapshot, allowed_pids: Callable[[], Iterable[int]]) -> list[str]:
    """What is left from since `before`, after a grace of `GRACE_S` seconds."""
    deadline = time.monotonic() + GRACE_S
    while found := before.leaks(Snapshot.take(), allowed_pids()):
        if time.monotonic() > deadline:
            return found
        # Only here: with torch imported a collection takes 0.3 s, too much for each of a thousand tests.
        gc.collect()
        time.sleep(0.05)
    return []


def left_of_a_shared_group(before: Snapshot, allowed_pids: Callable[[], Iterable[int]]) -> list[str]:
    """As `leaks_since`, for a fixture of many tests: threads of its event loop and of pytest live longer than it."""
    return leaks_since(replace(before, threads=frozenset(threading.enumerate())), allowed_pids)


def _fds() -> Iterable[str]:
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/self/fd/{fd}").split(":[")[0]


def _counts(thread: threading.Thread) -> bool:
    # Libraries keep daemon threads of their own; ours have to end with what started them.
    ours = thread.name.startswith("dplaunch-") and not thread.name.startswith(SHARED_THREADS)
    return thread.is_alive() and (not thread.daemon or ours)


def _describe(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return f"{pid} ({process.status()}) {' '.join(process.cmdline())[:120] or process.name()}"
    return f"{pid} (gone)"


def _held_by_others(name: str, ours: frozenset[int]) -> bool:
    """Whether a process that is none of ours has it mapped, or it is gone: then it is not this test's."""
    try:
        inode = (SHM / name).stat().st_ino
    except FileNotFoundError:
        return True
    # By inode: a semaphore is made under another name than the one that it gets, and the kernel shows the first.
    mapped = re.compile(rf"^\S+ \S+ \S+ \S+ {inode} +/dev/shm/", re.MULTILINE)
    for process in psutil.process_iter():
        if process.pid == os.getpid() or process.pid in ours:
            continue
        with contextlib.suppress(OSError):
            if mapped.search(Path(f"/proc/{process.pid}/maps").read_text()):
                return True
    return False
