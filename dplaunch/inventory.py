"""What there is to run on, found without initialising a device."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 2**20

SMI_TIMEOUT_S = 20.0
"""Seconds for `nvidia-smi`: without the persistence daemon the driver takes some seconds a device to wake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator.

    Args:
        id: its CUDA index as a string.
        uuid: its UUID ("" when not known).
        name: the product's name.
        memory_total: bytes.
        memory_free: bytes.
    """

    id: str
    uuid: str
    name: str
    memory_total: int
    memory_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One host.

    Args:
        name: its host name or address.
        cores: the cores that this process may use, as the kernel numbers them.
        memory_total: bytes of host memory, as limited by the cgroup.
        memory_free: bytes of it that are available.
        devices: its accelerators; empty on a CPU host.
        env: variables of a rank there that are the node's own and not the launcher's, such as its address.
        free_devices: how many of its accelerators are free in the scheduler, parts counted; None for all of them.
        note: what of it is free, in the words of who gives it out ("0 of 2 CPUs free in Ray"); for refusals.
    """

    name: str
    cores: tuple[int, ...]
    memory_total: int
    memory_free: int
    devices: tuple[Device, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    free_devices: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The hosts of a launch; the launcher's own comes first.

    Args:
        nodes: the hosts that may be used.
        placed: for each rank the name of its node, where that is decided already (the user's placement groups).
        scheduler: who chooses which of a node's devices a rank gets ("Ray"); "" where the plan does.
        share: what a rank takes of each of its devices' slots; below 1 several may be on one device.
    """

    nodes: tuple[Node, ...]
    placed: tuple[str, ...] | None = None
    scheduler: str = ""
    share: float = 1.0

    @property
    def device_type(self) -> str:
        """ "cuda" where any host has accelerators, else "cpu"."""
        return "cuda" if any(node.devices for node in self.nodes) else "cpu"


def local_node(environ: Mapping[str, str] | None = None) -> Node:
    """This host, as far as this process may use it.

    Asks the driver through NVML or `nvidia-smi`, never through CUDA: a process that has initialised CUDA
    cannot fork ranks that use it.

    Args:
        environ: whose CUDA_VISIBLE_DEVICES says which devices are allowed; None for this process's own.
    """
    import psutil

    memory = psutil.virtual_memory()
    total, free = limit_by_cgroup(memory.total, memory.available)
    visible = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    devices = _nvml_devices()
    return Node(
        name=socket.gethostname(),
        cores=tuple(sorted(os.sched_getaffinity(0))),
        memory_total=total,
        memory_free=free,
        devices=visible_devices(_smi_devices() if devices is None else devices, visible),
    )


def visible_devices(devices: Sequence[Device], setting: str | None) -> tuple[Device, ...]:
    """The devices that a value of CUDA_VISIBLE_DEVICES allows, in its order; None allows all.

    As in CUDA, whatever follows an entry that names no device is not visible.
    """
    if setting is None:
        return tuple(devices)
    allowed: list[Device] = []
    for entry in setting.split(","):
        device = find_device(devices, entry.strip())
        if device is None:
            break
        if device not in allowed:
            allowed.append(device)
    return tuple(allowed)


def find_device(devices: Sequence[Device], name: str) -> Device | None:
    """The device with an index, a UUID or the beginning of one; None when there is none."""
    for device in devices:
        if name == device.id or (name.startswith(("GPU-", "MIG-")) and device.uuid.startswith(name)):
            return device
    # A slice of a device is not listed by itself; its memory is not known here.
    if devices and name.startswith("MIG-"):
        return Device(id=name, uuid=name, name="MIG slice", memory_total=0, memory_free=0)
    return None


def limit_by_cgroup(
    total: int,
    free: int,
    *,
    root: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
) -> tuple[int, int]:
    """The host's memory as limited by this process's control group and those above it, bytes: total, free."""
    for group in _cgroups(root, membership):
        limit, used = _read_number(group / "memory.max"), _read_number(group / "memory.current")
        if limit is None or used is None:
            limit = _read_number(group / "memory.limit_in_bytes")
            used = _read_number(group / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < total:
            # Cached file pages count as used, but give way.
            total, free = limit, min(free, limit - used + _inactive_file(group))
    return total, max(free, 0)


def _cgroups(root: Path, membership: Path) -> Iterator[Path]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        group = top / name.lstrip("/")
        # Inside a container the path may be the host's: then only the top, which is the container's, exists.
        for level in (group, *group.parents):
            if level.is_relative_to(top) and level.is_dir():
                yield level


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _inactive_file(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(values.get("inactive_file", 0))


def _nvml_devices() -> list[Device] | None:
    """The NVIDIA devices as NVML lists them; None when it cannot be asked."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return [_nvml_device(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _nvml_device(pynvml: Any, index: int) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except pynvml.NVMLError:
        # Devices that share the host's memory report none of their own.
        total, free = 0, 0
    uuid, name = (_text(get(handle)) for get in (pynvml.nvmlDeviceGetUUID, pynvml.nvmlDeviceGetName))
    return Device(id=str(index), uuid=uuid, name=name, memory_total=total, memory_free=free)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _smi_devices() -> list[Device]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = "--query-gpu=index,uuid,name,memory.total,memory.free"
    try:
        answer = subprocess.run(
            [tool, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
            timeout=SMI_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_smi(answer.stdout)


def parse_smi(text: str) -> list[Device]:
    """The devices in what `nvidia-smi` prints as CSV: index, uuid, name, total and free MiB."""
    devices = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 5 or not fields[0].isdecimal():
            continue
        index, uuid, name = fields[:3]
        total, free = (int(field) * MIB if field.isdecimal() else 0 for field in fields[3:])
        devices.append(Device(id=index, uuid=uuid, name=name, memory_total=total, memory_free=free))
    return devices
