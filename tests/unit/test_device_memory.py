"""Memory of a device that a trainer and ranks share: what goes there, and how a rank reads it. No device is needed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from dplaunch import bucket, device_memory
from dplaunch.testing.devices import OnDevice, PretendedMemory, opened

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.tensor(7, dtype=torch.int64),
    "c": torch.randn(40).to(torch.bfloat16),
    "empty": torch.empty(0, 5),
    "turned": torch.arange(6.0).view(2, 3).t(),
}


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "DeviceMemory", PretendedMemory)
    monkeypatch.setattr(device_memory, "name_of", lambda device: device if isinstance(device, str) else "")


def made(tensors: Any, readers: list[str], most: int = 10_000) -> list[bucket.Bucket]:
    return list(bucket.in_buckets(tensors, most, readers=readers))


def places(buckets: list[bucket.Bucket]) -> list[tuple[str, bool]]:
    """Of each bucket: the device that it is on, and whether the host has it too."""
    return [(each.device, bool(each.path)) for each in buckets]


def handle_of(shared: bucket.Bucket) -> bytes:
    """One of those by which its memory on a device is opened."""
    assert shared.on_device is not None
    return shared.on_device.handle()


def on(device: str) -> list[tuple[str, Any]]:
    return [(name, OnDevice(tensor, device)) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize(
    ("readers", "place"),
    [
        (["GPU-a"], ("GPU-a", False)),
        (["GPU-a", "GPU-a"], ("GPU-a", False)),
        (["GPU-a", "GPU-b"], ("GPU-a", True)),
        (["GPU-a", ""], ("GPU-a", True)),
        (["GPU-b"], ("", True)),
        ([""], ("", True)),
        ([], ("", True)),
    ],
)
def test_weights_leave_their_device_for_those_who_cannot_read_them_there(
    readers: list[str], place: tuple[str, bool]
) -> None:
    buckets = made(on("GPU-a"), readers)
    assert places(buckets) == [place]
    for each in buckets:
        each.free()


def test_a_bucket_is_on_one_device_and_weights_of_the_host_are_in_others() -> None:
    mixed = [*on("GPU-a")[:2], *list(TENSORS.items())[2:4], *on("GPU-b")[4:]]
    buckets = made(mixed, ["GPU-a", "GPU-b"])
    assert places(buckets) == [("GPU-a", True), ("", True), ("GPU-b", True)]
    assert [[name for name, *_ in each.entries] for each in buckets] == [["a", "b"], ["c", "empty"], ["turned"]]
    for each in buckets:
        each.free()


def test_a_rank_gets_copies_of_what_is_there_since_the_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = made(on("GPU-a"), ["GPU-a"])
    with opened(handle_of(one)) as path:
        content = torch.frombuffer(bucket.mapped(path), dtype=torch.uint8)
    monkeypatch.setattr(device_memory, "opened", lambda handle, number: content)
    found = dict(device_memory.tensors_in(b"its handle", 0, one.entries))
    content.zero_()
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    one.free()


def test_memory_on_a_device_is_freed_with_its_bucket() -> None:
    (one,) = made(on("GPU-a"), ["GPU-a"])
    with opened(handle_of(one)) as path:
        pass
    one.free()
    with pytest.raises(OSError, match="No such file"):
        bucket.mapped(path)


def test_a_view_of_memory_shows_its_bytes_and_has_nothing_to_free() -> None:
    owner = torch.arange(100, dtype=torch.uint8)
    seen = device_memory.view_of(owner)
    owner[7] = 70
    assert seen.dtype == torch.uint8
    assert torch.equal(seen, owner)
    assert seen.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()
    del seen
    assert owner[7] == 70


SHARES = """
import torch
from dplaunch.device_memory import readers_of
counts = torch.tensor([1, 0, 2])
_, name, _ = counts.untyped_storage()._share_filename_cpu_()
print([readers_of(name, offset) for offset in range(4)], readers_of(b"/none", 0))
"""
"""torch's counters on a device are in a file of the kind that it makes of this tensor."""


def test_whether_a_reader_has_let_go_is_read_from_torchs_counter() -> None:
    said = subprocess.run([sys.executable, "-c", SHARES], check=True, capture_output=True, text=True).stdout
    assert said == "[1, 0, 2, None] None\n"


def test_a_rank_that_cannot_open_a_handle_does_not_see_the_device() -> None:
    assert not device_memory.sees(b"no handle", b"secret", 0)


def test_no_device_is_ours_where_torch_or_cuda_was_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_memory.own_devices() == {}
    monkeypatch.delitem(sys.modules, "torch")
    assert device_memory.own_devices() == {}
