"""What there is to run on."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dplaunch.inventory import (
    MIB,
    Device,
    Inventory,
    Node,
    limit_by_cgroup,
    local_node,
    parse_smi,
    visible_devices,
)

GIB = 2**30
SMI = """\
0, GPU-aaa, NVIDIA H200, 143771, 143000
1, GPU-bbb, NVIDIA H200, 143771, [N/A]
nonsense
"""


def devices(count: int) -> list[Device]:
    return [
        Device(id=str(i), uuid=f"GPU-{i}abc", name="G", memory_total=80 * GIB, memory_free=80 * GIB)
        for i in range(count)
    ]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_this_machine_has_cores_and_memory(without_nvml: None) -> None:
    node = local_node({})
    assert node.cores == tuple(sorted(os.sched_getaffinity(0)))
    assert 0 < node.memory_free <= node.memory_total


def test_the_inventory_imports_nothing_that_could_initialise_a_device() -> None:
    code = (
        "import sys; from dplaunch.inventory import local_node; local_node();"
        "print([m for m in ('torch', 'vllm', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("setting", "ids"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("-1", []),
        ("2", ["2"]),
        ("3,1", ["3", "1"]),
        ("1, 2", ["1", "2"]),
        ("1,1", ["1"]),
        ("0,9,1", ["0"]),
        ("GPU-2abc,0", ["2", "0"]),
        ("GPU-3", ["3"]),
    ],
)
def test_the_launchers_visible_devices_are_the_allowed_ones(setting: str | None, ids: list[str]) -> None:
    assert [device.id for device in visible_devices(devices(4), setting)] == ids


def test_a_slice_of_a_device_is_known_by_its_uuid_only() -> None:
    (slice_,) = visible_devices(devices(1), "MIG-123")
    assert (slice_.id, slice_.memory_total) == ("MIG-123", 0)


def test_what_nvidia_smi_prints_is_read() -> None:
    first, second = parse_smi(SMI)
    assert first == Device(
        id="0", uuid="GPU-aaa", name="NVIDIA H200", memory_total=143771 * MIB, memory_free=143000 * MIB
    )
    assert second.memory_free == 0


def test_nvidia_smi_is_asked_where_nvml_is_not_installed(
    without_nvml: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [device.id for device in local_node({}).devices] == ["0", "1"]
    assert [device.id for device in local_node({"CUDA_VISIBLE_DEVICES": "1"}).devices] == ["1"]


def test_a_broken_nvidia_smi_means_no_devices(
    without_nvml: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho no driver; exit 9\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert local_node({}).devices == ()


class FakeNvml:
    """Two devices; the second, like one that shares the host's memory, reports none."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if handle == 1:
            raise self.NVMLError
        return SimpleNamespace(total=80 * GIB, free=70 * GIB)

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "H200"


def test_nvml_is_asked_where_it_is_installed_and_let_go_again(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    first, second = local_node({}).devices
    assert first == Device(id="0", uuid="GPU-0", name="H200", memory_total=80 * GIB, memory_free=70 * GIB)
    assert (second.uuid, second.memory_total) == ("GPU-1", 0)
    assert nvml.open == 0


def test_memory_is_limited_by_the_control_group(tmp_path: Path) -> None:
    write(tmp_path / "membership", "0::/pod/app\n")
    write(tmp_path / "fs/pod/app/memory.max", "max\n")
    write(tmp_path / "fs/pod/app/memory.current", "1\n")
    write(tmp_path / "fs/pod/memory.max", f"{8 * GIB}\n")
    write(tmp_path / "fs/pod/memory.current", f"{3 * GIB}\n")
    write(tmp_path / "fs/pod/memory.stat", f"anon 5\ninactive_file {GIB}\n")
    limited = limit_by_cgroup(64 * GIB, 60 * GIB, root=tmp_path / "fs", membership=tmp_path / "membership")
    assert limited == (8 * GIB, 6 * GIB)


def test_memory_is_limited_by_a_control_group_of_the_first_version(tmp_path: Path) -> None:
    write(tmp_path / "membership", "5:memory:/app\n3:cpu:/app\n")
    write(tmp_path / "fs/memory/app/memory.limit_in_bytes", f"{4 * GIB}\n")
    write(tmp_path / "fs/memory/app/memory.usage_in_bytes", f"{GIB}\n")
    limited = limit_by_cgroup(64 * GIB, 60 * GIB, root=tmp_path / "fs", membership=tmp_path / "membership")
    assert limited == (4 * GIB, 3 * GIB)


def test_memory_is_the_hosts_where_no_group_limits_it(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert limit_by_cgroup(64 * GIB, 60 * GIB, root=nowhere, membership=nowhere) == (64 * GIB, 60 * GIB)


def test_cores_are_the_devices_only_where_no_host_has_accelerators() -> None:
    cpu = Node(name="a", cores=(0,), memory_total=1, memory_free=1)
    gpu = Node(name="b", cores=(0,), memory_total=1, memory_free=1, devices=tuple(devices(1)))
    assert Inventory(nodes=(cpu,)).device_type == "cpu"
    assert Inventory(nodes=(cpu, gpu)).device_type == "cuda"
