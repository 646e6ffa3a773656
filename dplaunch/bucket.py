"""A part of a model's weights in memory that every rank of this host maps: written once, read by all.

The memory is a memfd. It has no name that could outlive its owner, and is not bounded by the size of /dev/shm, which
containers keep small. Ranks open it through the launcher's entry in /proc.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dplaunch import device_memory
from dplaunch.device_memory import DeviceMemory
from dplaunch.host_memory import Writer

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
        path: where a process of this host maps it; "" when it is on a device alone.
        size: bytes.
        entries: what is in it.
        fd: what keeps the memory; -1 for a file on disk.
        on_device: the same bytes on a device, for ranks that read them there.
    """

    path: str
    size: int
    entries: tuple[Entry, ...]
    fd: int = -1
    on_device: DeviceMemory | None = None

    @property
    def device(self) -> str:
        """The name of the device that it is on; "" for none."""
        return "" if self.on_device is None else self.on_device.name

    def free(self) -> None:
        """Lets go of it; processes that have mapped it keep what they see. Idempotent."""
        memory, self.on_device = self.on_device, None
        if memory is not None:
            memory.free()
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


def in_buckets(
    tensors: Iterable[tuple[str, Any]],
    most: int = BUCKET_BYTES,
    folder: Path | None = None,
    readers: Sequence[str] = (),
) -> Iterator[Bucket]:
    """Tensors in the order in which they come, in buckets; each bucket is freed by whoever asked for it.

    A tensor is written before the next one is asked for: trainers hand out memory that they use again for the next,
    and take back what they have merged or gathered. One on a device stays there for those that read it there, and goes
    to the host for the others.

    Args:
        tensors: by name; on any device. A sharded one is gathered when it comes, which is when it is whole.
        most: bytes of a bucket; a larger tensor has one of its own.
        folder: where buckets become files; None for memory.
        readers: for each that will read them, the name of the device on which it can; "" for the host's memory.
    """
    bucket: Bucket | None = None
    entries: list[Entry] = []
    number, place = 0, ""
    writer = Writer()
    write = writer.to_memory if folder is None else writer.to_disk
    try:
        for name, tensor in tensors:
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            nbytes = whole.numel() * whole.element_size()
            its_place = device_memory.name_of(whole.device) if any(readers) else ""
            if bucket is not None and (bucket.size + nbytes > most or its_place != place):
                full, bucket = bucket, None
                yield _finished(full, entries, folder, readers)
            if bucket is None:
                number, place = number + 1, its_place
                memory = _memory_for(whole, place, max(most, nbytes), readers)
                on_host = memory is None or any(reader != place for reader in readers)
                bucket, entries = _new_bucket(folder, number, on_host, memory), []
            entries.append(_written(bucket, write, name, whole, nbytes))
        if bucket is not None:
            full, bucket = bucket, None
            yield _finished(full, entries, folder, readers)
    finally:
        writer.close()
        if bucket is not None:
            bucket.free()


def _memory_for(tensor: Any, place: str, nbytes: int, readers: Sequence[str]) -> DeviceMemory | None:
    """Where a bucket goes on the device of its tensors; None where nobody reads it there, or there is no room."""
    if not place or place not in readers:
        return None
    try:
        # And what lies between tensors.
        return device_memory.DeviceMemory(tensor.device, nbytes + ALIGNMENT)
    except RuntimeError:
        return None


def _new_bucket(folder: Path | None, number: int, on_host: bool, memory: DeviceMemory | None) -> Bucket:
    if not on_host:
        return Bucket("", 0, (), on_device=memory)
    if folder is None:
        fd, path = new_memory(MEMORY_NAME)
    else:
        path = str(folder / f"{number}.bucket")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    return Bucket(path, 0, (), fd, memory)


def _written(bucket: Bucket, write: Callable[[int, int, Any], None], name: str, tensor: Any, nbytes: int) -> Entry:
    """Puts a tensor behind the others."""
    import torch

    start = -(-bucket.size // ALIGNMENT) * ALIGNMENT
    if nbytes:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if bucket.on_device is not None:
            bucket.on_device.write(start, flat)
        if bucket.fd >= 0:
            write(bucket.fd, start, flat)
    bucket.size = start + nbytes
    return name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start, nbytes


def _finished(bucket: Bucket, entries: Sequence[Entry], folder: Path | None, readers: Sequence[str]) -> Bucket:
    bucket.entries = tuple(entries)
    try:
        if bucket.on_device is not None:
            bucket.on_device.share(readers.count(bucket.device))
        if bucket.fd >= 0:
            # Not shorter than its entries say, where the last one is empty; and nothing can be mapped of no bytes.
            os.ftruncate(bucket.fd, max(1, bucket.size))
    except BaseException:
        bucket.free()
        raise
    if folder is not None:
        bucket.free()
    return bucket


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
        yield name, flat.view(tuple(shape))


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
