"""A results file: the answers of a batch, one JSON line each, written as they come and found again by the next call.

The first line says what the file is: {"dplaunch": "results", "format": 1, "model": ...}. Each other line is one answer:
{"key": ..., "params": ..., "copy": 0, "output": {...}}; of two with the same first three the later one counts.

A line is handed to the kernel whole as soon as its answer is there, so the death of the process loses nothing that was
answered. The disk is asked to keep it (fsync) every `SYNC_S` seconds and at the end, so the loss of the machine costs
the answers of that time. A last line that is not whole is cut off when the file is opened again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from dplaunch.errors import ResultsFileError
from dplaunch.resume_keys import ResultId
from dplaunch.threads import in_thread

FORMAT = 1
"""Of the lines. A file of another one is refused."""

SYNC_S = 5.0
"""Seconds between two fsyncs: each may take a tenth of a second on a slow disk, and answers come faster than that."""

_BEGIN = b'{"dplaunch": "results", '


class ResultsFile:
    """An open results file; a context manager. One batch at a time may have it.

    Args:
        path: the file, which is made where there is none; its directory has to be there.
        model: what answers. A file of another model is refused.

    Raises:
        ResultsFileError: when it cannot be opened, another batch has it open, or it is of another model, of another
            format, or no results file.
    """

    def __init__(self, path: str | os.PathLike[str], model: str) -> None:
        self.path = Path(path)
        self._model = model
        self._synced = time.monotonic()
        self._places: dict[ResultId, tuple[int, int]] = {}
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._refuse(f"cannot be opened: {error.strerror}", "Give a path in a directory that can be written.")
        try:
            self._lock()
            self._size = self._read()
        except OSError as error:
            os.close(self._fd)
            self._refuse(f"cannot be read: {error.strerror}", "See what became of the disk.")
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, result_id: ResultId) -> bool:
        return result_id in self._places

    def __len__(self) -> int:
        return len(self._places)

    def output(self, result_id: ResultId) -> Mapping[str, Any]:
        """The saved output.

        Raises:
            KeyError: when there is none.
        """
        offset, length = self._places[result_id]
        output: Mapping[str, Any] = json.loads(os.pread(self._fd, length, offset))["output"]
        return output

    def add(self, result_id: ResultId, output: Mapping[str, Any]) -> None:
        """Writes a result.

        Raises:
            ResultsFileError: when the disk does not take it; the file is as it was.
        """
        offset, length = self._append({**result_id._asdict(), "output": output})
        self._places[result_id] = offset, length

    async def sync(self) -> None:
        """Has the disk keep what was written, where that is due."""
        if time.monotonic() - self._synced >= SYNC_S:
            self._synced = time.monotonic()
            # A copy of the descriptor: the batch may be cancelled and close its own meanwhile.
            copy = os.dup(self._fd)
            try:
                await in_thread(lambda: _sync_and_close(copy), "fsync")
            except OSError as error:
                self._refuse(f"is not kept by its disk: {error.strerror}", "See what became of the disk.")

    def close(self) -> None:
        """Has the disk keep all that was written, and lets the file go. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            _sync_and_close(fd)
        except OSError as error:
            self._refuse(f"is not kept by its disk: {error.strerror}", "See what became of the disk.")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse("is open for another batch", "Wait for its end, or give another file.")
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):  # a file system without locks
                raise

    def _read(self) -> int:
        """Learns what is there; returns the size, without a last line that is not whole."""
        size, whole = os.fstat(self._fd).st_size, 0
        with open(self._fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    self._check_header(line)
                if not line.endswith(b"\n"):
                    break
                if number > 1:
                    self._places[self._result_id(number, line)] = whole, len(line)
                whole += len(line)
        if whole < size:
            os.ftruncate(self._fd, whole)
        self._size = whole
        if not whole:
            self._append({"dplaunch": "results", "format": FORMAT, "model": self._model})
        return self._size

    def _check_header(self, line: bytes) -> None:
        if not line.endswith(b"\n"):
            # Only what is surely ours is cut off and written anew.
            if not (line.startswith(_BEGIN) or _BEGIN.startswith(line)):
                self._refuse("is no results file", "Give another path.")
            return
        header: Any = None
        with contextlib.suppress(ValueError):
            header = json.loads(line)
        if not isinstance(header, dict) or header.get("dplaunch") != "results":
            self._refuse("is no results file", "Give another path.")
        if header.get("format") != FORMAT:
            self._refuse(f"has format {header.get('format')!r}, and this dplaunch reads {FORMAT}", "Give another path.")
        if header.get("model") != self._model:
            self._refuse(
                f"holds results of {header.get('model')!r}, and this group's model is {self._model!r}",
                "Give a file for each model; where both are the same, correct the file's first line.",
            )

    def _result_id(self, number: int, line: bytes) -> ResultId:
        try:
            record = json.loads(line)
            record["output"]["request_id"]
            return ResultId(record["key"], record["params"], record["copy"])
        except (ValueError, KeyError, TypeError):
            self._refuse(f"has no result in line {number}", "Delete that line: its prompt is then asked again.")

    def _append(self, record: Mapping[str, Any]) -> tuple[int, int]:
        line = json.dumps(record).encode() + b"\n"
        offset = self._size
        try:
            _write_all(self._fd, line, offset)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, offset)
            self._refuse(
                f"takes no more: {error.strerror}", f"Its {len(self)} results are safe; make room, and call again."
            )
        self._size = offset + len(line)
        return offset, len(line)

    def _refuse(self, what: str, hint: str) -> NoReturn:
        raise ResultsFileError(f"{self.path} {what}", hint=hint)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)


def _sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(fd)
