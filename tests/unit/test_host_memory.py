"""The host's memory, filled from tensors by one thread and by several."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dplaunch import bucket, host_memory
from dplaunch.host_memory import Writer
from dplaunch.posted import seal

PIECE = 4096


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "PIECE", PIECE)


@pytest.fixture(params=[1, 3])
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    made = Writer(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("sizes", [[0], [5], [PIECE, 3], [2 * PIECE], [10, 5 * PIECE + 7, 0, 3 * PIECE, 1]])
def test_what_is_written_is_there_however_many_write(writer: Writer, sizes: list[int]) -> None:
    fd, path = bucket.new_memory("test")
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    start = 0
    for tensor in tensors:
        writer.to_memory(fd, start, tensor)
        start += len(tensor)
    assert Path(path).read_bytes() == bytes(torch.cat(tensors).tolist())
    os.close(fd)


def test_a_bucket_of_large_tensors_is_what_was_given_and_can_be_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "__init__", lambda self, init=Writer.__init__: init(self, 3))
    given = {"a": torch.randn(7), "b": torch.randn(3, PIECE).to(torch.bfloat16), "c": torch.randn(2 * PIECE + 1)}
    (made,) = bucket.in_buckets(given.items())
    found = dict(bucket.tensors_in(made.path, made.entries))
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    # The kernel seals no memory that somebody can still write to.
    seal(made)
    made.free()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dplaunch-weights")]


def test_a_file_on_disk_is_written_piece_by_piece(writer: Writer, tmp_path: Path) -> None:
    tensor = torch.randint(0, 256, (3 * PIECE + 5,), dtype=torch.uint8)
    with (tmp_path / "file").open("wb") as file:
        writer.to_disk(file.fileno(), 10, tensor)
    assert (tmp_path / "file").read_bytes() == bytes(10) + bytes(tensor.tolist())


def test_where_there_is_no_room_the_error_says_so(writer: Writer) -> None:
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space left"):
        writer.to_disk(full.fileno(), 0, torch.ones(3, dtype=torch.uint8))
