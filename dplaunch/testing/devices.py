"""A device that is not there: its memory is the host's, and what stands for it in `dplaunch.device_memory`.

Stand-in engines that pretend to be on a device (`StandInPlan.devices`) read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from dplaunch.bucket import new_memory

UNTOLD, TOLD, LET_GO = b"0", b"1", b"2"
"""What has become of a handle; at more than one reader torch would lose count, and so does this (b"3")."""


class PretendedMemory:
    """In place of `dplaunch.device_memory.DeviceMemory`; the device is its name, and a handle two paths."""

    left_open: ClassVar[int] = 0
    """Handles of this process that were given away, and not let go of by exactly one reader."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.name = device
        self._fd, self._path = new_memory("dplaunch-pretended-device")
        os.ftruncate(self._fd, nbytes)
        self._counters: list[tuple[int, str]] = []
        self._told = 0

    def write(self, start: int, flat: Any) -> None:
        """Copies a tensor's bytes to where they belong."""
        os.pwrite(self._fd, flat.numpy().tobytes(), start)

    def share(self, readers: int) -> None:
        """Makes a handle for each."""
        self._counters = [new_memory("dplaunch-pretended-counter") for _ in range(readers)]
        for fd, _ in self._counters:
            os.pwrite(fd, UNTOLD, 0)

    def handle(self) -> bytes:
        """By what one stand-in engine opens it."""
        fd, path = self._counters[self._told]
        self._told += 1
        os.pwrite(fd, TOLD, 0)
        return f"{self._path} {path}".encode()

    def free(self) -> None:
        """Gives it back."""
        counters, self._counters = self._counters, []
        for fd, _ in counters:
            PretendedMemory.left_open += os.pread(fd, 1, 0) not in (UNTOLD, LET_GO)
            os.close(fd)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


@contextmanager
def opened(handle: bytes) -> Iterator[str]:
    """The path of what a handle stands for; afterwards it is let go of."""
    path, counter = handle.decode().split()
    yield path
    state = Path(counter).read_bytes()
    Path(counter).write_bytes(b"%d" % (int(state) + 1))


class OnDevice:
    """A tensor of the host that says it is on a device."""

    def __init__(self, tensor: Any, device: str) -> None:
        self._tensor = tensor
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)
