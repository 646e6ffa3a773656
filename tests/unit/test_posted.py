"""Memory that a trainer says where it is: only what is ours and sealed is taken, and nothing else is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dplaunch.bucket import Bucket, in_buckets, tensors_in
from dplaunch.errors import UsageError
from dplaunch.posted import as_told, seal, take


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    import torch

    (bucket,) = in_buckets([("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.ones(2, dtype=torch.bfloat16))])
    seal(bucket)
    yield bucket
    bucket.free()


def test_a_bucket_that_was_posted_outlives_its_writer(bucket: Bucket) -> None:
    taken = take(as_told(bucket))
    bucket.free()
    try:
        found = dict(tensors_in(taken.path, taken.entries))
        assert found["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        assert found["b"].tolist() == [1.0, 1.0]
    finally:
        del found
        taken.free()


def test_what_is_sealed_cannot_be_changed_by_its_writer(bucket: Bucket) -> None:
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(bucket.fd, b"other", 0)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(bucket.fd, 0)


def test_no_file_is_opened_whatever_the_path_says(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with (tmp_path / "secret").open() as file:
        before = len(os.listdir("/proc/self/fd"))
        paths = [str(tmp_path / "secret"), f"/proc/{os.getpid()}/fd/{file.fileno()}", "/proc/self/fd/0", "/dev/zero"]
        paths += [f"/proc/{os.getpid()}/fd/../../../etc/passwd", "/proc/1/fd/999999", "", f"{bucket.path}\n"]
        for path in paths:
            with pytest.raises(UsageError):
                take({**as_told(bucket), "path": path})
        assert len(os.listdir("/proc/self/fd")) == before


def test_memory_that_its_writer_could_still_change_is_refused() -> None:
    import torch

    (bucket,) = in_buckets([("a", torch.ones(3))])
    try:
        with pytest.raises(UsageError, match="not sealed"):
            take(as_told(bucket))
    finally:
        bucket.free()


@pytest.mark.parametrize(
    "entry",
    [
        ["a", "float32", [2, 3], 0, 1 << 40],
        ["a", "float32", [2, 3], 1 << 20, 24],
        ["a", "float32", [2, 3], -4, 24],
        ["a", "float32", [2, 4], 0, 24],
        ["a", "load", [2, 3], 0, 24],
        ["a", "float32", [-2, -3], 0, 24],
        ["a", "float32", [True, 6], 0, 24],
        [1, "float32", [2, 3], 0, 24],
        ["a", "float32", 6, 0, 24],
        ["a"],
        "a",
        None,
    ],
)
def test_a_tensor_that_cannot_be_there_is_refused(bucket: Bucket, entry: Any) -> None:
    with pytest.raises(UsageError, match="cannot be"):
        take({"path": bucket.path, "entries": [entry]})


@pytest.mark.parametrize("told", [None, [], "x", {}, {"path": 1}])
def test_what_is_no_bucket_at_all_is_refused(told: Any) -> None:
    with pytest.raises(UsageError, match="path"):
        take(told)


def test_a_bucket_with_no_tensors_is_refused(bucket: Bucket) -> None:
    wrong: list[Any] = [[], None, "abc"]
    for entries in wrong:
        with pytest.raises(UsageError, match="no tensor"):
            take({"path": bucket.path, "entries": entries})
