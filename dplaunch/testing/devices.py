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


class PretendedMemory:
    """In place of `dplaunch.device_memory.DeviceMemory`; the device is its name, and a handle two paths.

    As torch does it, what was handed over and nobody has let go of stays without `free`; it is `lost`.
    """

    lost: ClassVar[int] = 0
    """How many are, in this process."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.name = device
        self._fd, self._path = new_memory("dplaunch-pretended-device")
        os.ftruncate(self._fd, nbytes)
        self._counter, self._counter_path = new_memory("dplaunch-pretended-counter")

    def write(self, start: int, flat: Any) -> None:
        """Copies a tensor's bytes to where they belong."""
        os.pwrite(self._fd, flat.numpy().tobytes(), start)

    def handle(self) -> bytes:
        """By what a stand-in engine opens it."""
        os.write(self._counter, _HELD)
        return f"{self._path} {self._counter_path}".encode()

    def free(self) -> None:
        """Gives it back."""
        os.ftruncate(self._counter, 0)

    def __del__(self) -> None:
        PretendedMemory.lost += os.fstat(self._counter).st_size > 0
        os.close(self._fd)
        os.close(self._counter)


_HELD = b"held"


@contextmanager
def opened(handle: bytes) -> Iterator[str]:
    """The path of what a handle stands for; afterwards it is let go of."""
    path, counter = handle.decode().split()
    yield path
    Path(counter).write_bytes(b"")


class OnDevice:
    """A tensor of the host that says it is on a device."""

    def __init__(self, tensor: Any, device: str) -> None:
        self._tensor = tensor
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)
