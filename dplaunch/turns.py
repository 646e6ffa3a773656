"""What several processes need and one can make: the first makes it, the others wait, and then find it made.

A lock file for each key, and beside it a mark that says where the thing lies. Those that come when the mark is there
wait for nobody. The lock is the kernel's: it ends with its holder, however that went.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that has come.

    Args:
        ours: whether the thing is ours to make; False when it is made already.
        mark: the file that says so.
    """

    ours: bool
    mark: Path

    def made(self, paths: Iterable[str]) -> None:
        """Says that it is made, and what has to be there as long as it is; nothing where it was before.

        Raises:
            OSError: when the mark cannot be written.
        """
        if not self.ours:
            return
        # Whole or not at all: others read it without the lock.
        draft = self.mark.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(sorted(paths)))
        os.replace(draft, self.mark)


@contextlib.contextmanager
def turn(directory: Path, key: str, name: str, on_wait: Callable[[str], None]) -> Iterator[Turn]:
    """Goes on when it is made, or when it is ours to make: nobody else's turn comes before the end of the block then.

    A block that ends without `Turn.made`, as by an exception, leaves it to the next one.

    Args:
        directory: of the locks and marks, on the disk of what is made; it is created.
        key: what is made; a file name.
        name: ours, for those who wait for us.
        on_wait: called with the name of whom we wait for, before we do.

    Raises:
        OSError: before the block, when there can be no lock there.
    """
    mark = directory / f"{key}.json"
    if is_made(mark):
        yield Turn(ours=False, mark=mark)
        return
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _take(lock, on_wait)
        ours = not is_made(mark)
        if ours:
            os.truncate(lock, 0)
            os.pwrite(lock, name.encode(), 0)
        else:
            fcntl.lockf(lock, fcntl.LOCK_UN)
        yield Turn(ours=ours, mark=mark)
    finally:
        os.close(lock)


def is_made(mark: Path) -> bool:
    """Whether it was made once, and all of it is still there."""
    try:
        return all(os.path.exists(path) for path in json.loads(mark.read_text()))
    except (OSError, ValueError):
        return False


def _take(lock: int, on_wait: Callable[[str], None]) -> None:
    # Not flock(): a child that is forked meanwhile would hold that lock on. This one goes when its process does, and
    # also when that closes the file, so nothing else in the process may open it.
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait(os.pread(lock, 200, 0).decode(errors="replace"))
        fcntl.lockf(lock, fcntl.LOCK_EX)
