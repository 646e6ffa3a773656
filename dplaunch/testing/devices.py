"""A device that is not there: its memory is the host's, and what stands for it in `dplaunch.device_memory`.

Stand-in engines that pretend to be on a device (`StandInPlan.devices`) read it.
"""

from __future__ import annotations

import os
from typing import Any

from dplaunch.bucket import new_memory


class PretendedMemory:
    """In place of `dplaunch.device_memory.DeviceMemory`; the device is its name, and a handle a path."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.name = device
        self._fd, self._path = new_memory("dplaunch-pretended-device")
        os.ftruncate(self._fd, nbytes)

    def write(self, start: int, flat: Any) -> None:
        """Copies a tensor's bytes to where they belong."""
        os.pwrite(self._fd, flat.numpy().tobytes(), start)

    def handle(self) -> bytes:
        """By what a stand-in engine opens it."""
        return self._path.encode()

    def __del__(self) -> None:
        os.close(self._fd)


class OnDevice:
    """A tensor of the host that says it is on a device."""

    def __init__(self, tensor: Any, device: str) -> None:
        self._tensor = tensor
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)
