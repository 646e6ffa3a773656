"""A part of a model's weights in memory that every rank of this host maps: written once, read by all.

The memory is a memfd. It has no name that could outlive its owner, and is not bounded by the size of /dev/shm, which
containers keep small. Ranks open it through the launcher's entry in /proc.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET_BYTES = 256 * 2**20
"""Bytes after which a bucket is full: large enough that a call for each costs nothing, small beside any model."""

ALIGNMENT = 64
"""Bytes; where a tensor begins. vLLM's loaders read each as its own dtype."""

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".gguf")
"""How the names of files end that hold weights."""

MEMORY_NAME = "dplaunch-weights"
"""What the kernel shows a bucket's memory as."""

Entry = tuple[str, str, tuple[int, ...], int, int]
"""One tensor: name, dtype ("bfloat16"), shape, and its first byte and bytes in the bucket."""


@dataclass(slots=True)
class Bucket:
    """Some of a model's tensors.

    Args:
        path: where a process of this host maps it.
        size: bytes.
        entries: what is in it.
        fd: what keeps the memory; -1 for a file on disk.
    """

    path: str
    size: int
    entries: tuple[Entry, ...]
    fd: int = -1

    def free(self) -> None:
        """Lets go of it; processes that have mapped it keep what they see. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def read(self) -> bytes:
        """All of it, for a rank that is on another host."""
        return Path(self.path).read_bytes()


def new_memory(name: str) -> tuple[int, str]:
    """A new memfd: its descriptor, and the path by which other processes of this host open it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    return fd, f"/proc/{os.getpid()}/fd/{fd}"


def fill(
    tensors: Iterable[tuple[str, Any]],
    folder: Path | None = None,
    number: int = 0,
    like: Sequence[tuple[str, Any]] | None = None,
) -> Bucket:
    """Writes tensors into a new bucket.

    Args:
        tensors: by name; on any device.
        folder: where it becomes a file; None for memory.
        number: tells its file from others.
        like: names, and tensors of the same types and shapes, where `tensors` can be gone through but once. Each is
            written before the next is asked for, and none is asked for beyond these.
    """
    if like is None:
        like = tensors = list(tensors)
    entries, size = _layout(like)
    if folder is None:
        fd, path = new_memory(MEMORY_NAME)
    else:
        path = str(folder / f"{number}.bucket")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    bucket = Bucket(path, size, entries, fd)
    try:
        os.ftruncate(fd, max(1, size))
        _write(fd, itertools.islice(tensors, len(entries)), entries)
        if folder is not None:
            bucket.free()
    except BaseException:
        bucket.free()
        raise
    return bucket


def _layout(tensors: Sequence[tuple[str, Any]]) -> tuple[tuple[Entry, ...], int]:
    entries: list[Entry] = []
    size = 0
    for name, tensor in tensors:
        start = -(-size // ALIGNMENT) * ALIGNMENT
        nbytes = tensor.numel() * tensor.element_size()
        entries.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start, nbytes))
        size = start + nbytes
    return tuple(entries), size


def _write(fd: int, tensors: Iterable[tuple[str, Any]], entries: Sequence[Entry]) -> None:
    """By write(2), which fills new pages in half the time of a mapping, and says so where a disk is full."""
    import torch

    for (_, tensor), (_, _, _, start, nbytes) in zip(tensors, entries, strict=True):
        if nbytes:
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
            left = memoryview(flat.numpy())
            while left:
                # One call writes 2 GiB at most.
                left = left[os.pwrite(fd, left, start + nbytes - len(left)) :]


def mapped(path: str) -> mmap.mmap:
    """The bytes of a bucket, without a copy. Private to the process: nobody can change them for the others."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def tensors_in(path: str, entries: Iterable[Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """The tensors of a bucket, which stays mapped while one of them is there."""
    import torch

    memory = mapped(path)
    for name, dtype, shape, start, nbytes in entries:
        kind = getattr(torch, dtype)
        if nbytes:
            flat = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start).view(kind)
        else:
            flat = torch.empty(0, dtype=kind)
        yield name, flat.view(*shape) if len(shape) else flat.view(())


def digest(before: str, path: str, entries: Sequence[Any]) -> str:
    """A digest over buckets: the one of those before, then names, types, shapes and bytes of this one."""
    # Shapes as lists: they are on either side of the wire, which has no tuples.
    heads = [[name, kind, list(shape)] for name, kind, shape, *_ in entries]
    made = hashlib.sha256(f"{before} {heads}".encode())
    with mapped(path) as memory:
        made.update(memory)
    return made.hexdigest()


def digest_of_files(folder: str) -> str:
    """A digest over the weights of a checkpoint, file by file."""
    made = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        if file.is_file() and file.name.endswith(WEIGHT_FILES):
            made.update(file.name.encode())
            with file.open("rb") as stream:
                made.update(hashlib.file_digest(stream, "sha256").digest())
    return made.hexdigest()


class Landmark:
    """Memory with a secret in it: whoever reads it through its path is on this host, and may map buckets."""

    def __init__(self) -> None:
        self.secret = secrets.token_hex(16)
        self._fd, self.path = new_memory("dplaunch-landmark")
        os.write(self._fd, self.secret.encode())

    def close(self) -> None:
        """Lets go of it. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def sees(path: str, secret: str) -> bool:
    """Whether this process is on the host of a `Landmark`."""
    try:
        with open(path, "rb") as file:
            return file.read(2 * len(secret)) == secret.encode()
    except OSError:
        return False


class Depot:
    """What a rank on another host than the launcher's keeps for itself and the ranks that are there too."""

    def __init__(self) -> None:
        self._landmark: Landmark | None = None
        self._fd = -1
        self.taken = 0
        """Buckets that came over the network."""

    def landmark(self) -> tuple[str, str]:
        """By what the others see that they are on this host: a path, and the secret that is there."""
        if self._landmark is None:
            self._landmark = Landmark()
        return self._landmark.path, self._landmark.secret

    def take(self, data: bytes) -> str:
        """Puts a bucket into memory, in place of the one before; its path."""
        self._free()
        self._fd, path = new_memory("dplaunch-weights-copy")
        with os.fdopen(os.dup(self._fd), "wb") as file:
            file.write(data)
        self.taken += 1
        return path

    def clear(self) -> None:
        """Lets go of both. Idempotent."""
        self._free()
        if self._landmark is not None:
            self._landmark.close()
            self._landmark = None

    def _free(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
