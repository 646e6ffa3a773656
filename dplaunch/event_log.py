"""events.jsonl: what happened to a group, when and why, one JSON object a line, beside the ranks' logs."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from dplaunch.events import Event, Level, as_record

FILE_NAME = "events.jsonl"
OLDER_NAME = "events.1.jsonl"

MAX_BYTES = 16 * 2**20
"""Size at which the log becomes the older one, in the place of the one before: some 60,000 events each."""

RETRY_S = 5.0
"""Seconds after a failure before the disk is tried again: it is asked rarely, and a full one may be freed."""

EARLY_EVENTS = 1000
"""Events that are kept from before there is a directory to write to."""


class EventLog:
    """Writes every event that it is called with. A disk that fails costs events, never the group.

    Args:
        warn: told in words that events cannot be written; once, until they could be again.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._path = Path()
        self._is_open = False
        self._group = ""
        self._early: deque[Event] = deque(maxlen=EARLY_EVENTS)
        self._fd: int | None = None
        self._size = 0
        self._torn = False  # whether the last line was only written in part
        self._dropped = 0
        self._retry_at = 0.0
        self._warned = self._warning = False

    def open(self, directory: Path, group: str) -> None:
        """Writes from now on to the directory, first what has happened before.

        Args:
            group: the group's id, which every line carries.
        """
        self._path, self._group, self._is_open = directory / FILE_NAME, group, True
        for event in self._early:
            self(event)
        self._early.clear()

    def close(self) -> None:
        """Lets go of the file; what happens later is not written. Idempotent."""
        self._let_go()
        self._is_open = False

    def __call__(self, event: Event) -> None:
        """Writes one event. Never raises."""
        if self._warning:
            return  # Its own warning comes back as an event.
        if not self._is_open:
            self._early.append(event)
            return
        if self._dropped and time.monotonic() < self._retry_at:
            self._dropped += 1
            return
        try:
            self._write(event)
        except OSError as error:
            self._failed(error)

    def _write(self, event: Event) -> None:
        if self._dropped:
            missing = f"{self._dropped} {'event' if self._dropped == 1 else 'events'} could not be written"
            self._append(self._line(Event(message=missing, level=Level.WARNING, data={"dropped": self._dropped})))
            self._dropped = 0
        self._append(self._line(event))
        self._warned = False

    def _line(self, event: Event) -> bytes:
        record = as_record(event) | {"group": self._group}
        return json.dumps(record, ensure_ascii=False, default=str).encode(errors="replace") + b"\n"

    def _append(self, line: bytes) -> None:
        fd = self._opened()
        if self._size and self._size + len(line) > MAX_BYTES:
            self._rotate()
            fd = self._opened()
        data = b"\n" + line if self._torn else line
        written = os.write(fd, data)
        self._size += written
        self._torn = written < len(data)
        if self._torn:
            raise OSError("the disk took only a part of a line")

    def _opened(self) -> int:
        # A file that was removed takes lines, but nobody will ever read them.
        if self._fd is not None and os.fstat(self._fd).st_nlink == 0:
            self._let_go()
        if self._fd is None:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._fd).st_size
        return self._fd

    def _rotate(self) -> None:
        self._let_go()
        os.replace(self._path, self._path.with_name(OLDER_NAME))

    def _failed(self, error: OSError) -> None:
        self._let_go()
        self._dropped += 1
        self._retry_at = time.monotonic() + RETRY_S
        if self._warned:
            return
        self._warned = self._warning = True
        try:
            self._warn(f"events cannot be written to {self._path}: {error.strerror or error}; trying again")
        finally:
            self._warning = False

    def _let_go(self) -> None:
        fd, self._fd, self._size = self._fd, None, 0
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)
