"""A bucket of weights that a trainer has written: its memory is taken over, without a copy, once it has been looked at.

The trainer says over HTTP where its memfd is (`/proc/PID/fd/N`). That is a path from outside, so nothing is believed of
it: it has to be memory under our name, of our user, and sealed, so that whoever wrote it can neither change nor shrink
it while ranks read it. No path of a file is ever opened, and none from outside reaches a rank.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dplaunch.bucket import MEMORY_NAME, Bucket, Entry
from dplaunch.errors import UsageError

_PATH = re.compile(r"/proc/[1-9]\d{0,9}/fd/\d{1,9}")

_NAME = f"/memfd:{MEMORY_NAME}"
"""How the kernel shows memory of `bucket.in_buckets`, in front of " (deleted)"."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
"""What nobody may do any more: a mapping of memory that shrinks kills whoever reads it (SIGBUS)."""

ITEM_BYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "float32": 4,
    "int32": 4,
    "float64": 8,
    "int64": 8,
}
"""The types that weights may have, by torch's names, and the bytes of an element."""

MAX_DIMENSIONS = 8


def seal(bucket: Bucket) -> None:
    """Makes a bucket's memory unchangeable, for its writer too.

    Raises:
        OSError: when it is still mapped for writing.
    """
    fcntl.fcntl(bucket.fd, fcntl.F_ADD_SEALS, SEALS)


def as_told(bucket: Bucket) -> dict[str, Any]:
    """What is posted of a bucket."""
    return {"path": bucket.path, "entries": [list(entry) for entry in bucket.entries]}


def take(told: Any) -> Bucket:
    """Opens a bucket that was posted; from here on its memory is this process's too.

    Args:
        told: what came over HTTP: "path" and "entries", as `as_told` makes them.

    Raises:
        UsageError: when it is not what it has to be.
    """
    path = told.get("path") if isinstance(told, Mapping) else None
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise UsageError(
            "a bucket's path is /proc/PID/fd/N, and nothing else", hint="dplaunch.integrations makes them."
        )
    fd = _open(path)
    try:
        size = _checked(fd, path)
        entries = _entries(told.get("entries"), size)
    except BaseException:
        os.close(fd)
        raise
    return Bucket(f"/proc/{os.getpid()}/fd/{fd}", size, entries, fd)


def _open(path: str) -> int:
    try:
        # Before it is opened, which for a device or a pipe would do something.
        if not os.readlink(path).startswith(_NAME):
            raise _not_ours(path)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be opened here: {error.strerror}",
            hint="The trainer has to run on the launcher's host, as the same user, and to wait for the answer.",
        ) from error


def _checked(fd: int, path: str) -> int:
    """The bytes of what was opened, which may be another thing than what was looked at."""
    facts = os.fstat(fd)
    if not os.readlink(f"/proc/self/fd/{fd}").startswith(_NAME) or facts.st_uid != os.getuid():
        raise _not_ours(path)
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise UsageError(f"{path} is not sealed", hint="Seal a bucket before it is posted.")
    return facts.st_size


def _not_ours(path: str) -> UsageError:
    return UsageError(f"{path} is no memory of dplaunch's, of this user", hint="Only that is taken from outside.")


def _entries(told: Any, size: int) -> tuple[Entry, ...]:
    if not isinstance(told, Sequence) or isinstance(told, str) or not told:
        raise UsageError("the bucket says of no tensor where it is", hint='"entries" is a list with one for each.')
    return tuple(_entry(each, size) for each in told)


def _entry(told: Any, size: int) -> Entry:
    try:
        name, dtype, shape, start, nbytes = told
        numbers = [*shape, start, nbytes]
        ok = isinstance(name, str) and len(shape) <= MAX_DIMENSIONS
        ok = ok and all(type(number) is int and number >= 0 for number in numbers)
        ok = ok and math.prod(shape) * ITEM_BYTES[dtype] == nbytes and start + nbytes <= size
    except (TypeError, ValueError, KeyError):
        ok = False
    if not ok:
        raise UsageError(
            f"a tensor of the bucket cannot be: {str(told)[:200]}",
            hint=f"It is [name, dtype, shape, first byte, bytes], within {size} bytes.",
        )
    return (name, dtype, tuple(shape), start, nbytes)
