"""What the driver says of the devices: which there are, who holds memory on them. Never through CUDA."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

FREE_S = 20.0
"""Seconds for the driver to take back the memory of a process that was killed: a second or two were seen."""

POLL_S = 0.1

Held = dict[int, dict[str, int]]
"""Bytes by process and device (its UUID)."""


def uuids() -> list[str]:
    """The devices of this machine in the order of the PCI bus; none where there is no driver."""
    with _nvml() as nvml:
        return [] if nvml is None else [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in _handles(nvml)]


def held() -> Held:
    """Who holds memory of which device, as a process with a CUDA context does."""
    found: Held = {}
    with _nvml() as nvml:
        for handle in [] if nvml is None else _handles(nvml):
            uuid = _text(nvml.nvmlDeviceGetUUID(handle))
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                found.setdefault(int(process.pid), {})[uuid] = int(process.usedGpuMemory or 0)
    return found


def used() -> dict[str, int]:
    """Bytes in use on each device, by whomever: the driver's own few hundred MiB are among them."""
    with _nvml() as nvml:
        if nvml is None:
            return {}
        return {
            _text(nvml.nvmlDeviceGetUUID(handle)): int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
            for handle in _handles(nvml)
        }


def size() -> int:
    """Bytes of the smallest device; 0 where there is none."""
    with _nvml() as nvml:
        sizes = [] if nvml is None else [int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in _handles(nvml)]
    return min(sizes, default=0)


def held_by(pids: Collection[int], now: Mapping[int, Mapping[str, int]] | None = None) -> int:
    """Bytes that these processes hold on all devices together."""
    return sum(sum((held() if now is None else now).get(pid, {}).values()) for pid in pids)


def wait_until_free(pids: Collection[int] | None = None, timeout_s: float = FREE_S) -> tuple[float, Held]:
    """Waits until none of the processes has a context on any device.

    Args:
        pids: which; None for all but this one.
        timeout_s: seconds until it gives up.

    Returns:
        The seconds that it took, and who holds what at the end: nobody, unless it gave up.
    """
    started = time.monotonic()
    while True:
        left = {pid: on for pid, on in held().items() if (pid != os.getpid() if pids is None else pid in pids)}
        seconds = time.monotonic() - started
        if not left or seconds > timeout_s:
            return seconds, left
        time.sleep(POLL_S)


def has_cuda(pid: int) -> bool:
    """Whether a process has a CUDA context, by the driver's list.

    Its open files do not say it: the driver's monitoring library opens /dev/nvidia-uvm too (seen with driver 580).
    """
    return pid in held()


def plain(uuid: str) -> str:
    """A UUID as torch says it, without the driver's "GPU-"."""
    return uuid.removeprefix("GPU-").lower()


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _handles(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
