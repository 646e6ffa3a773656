"""Where weights come from, the buckets that they travel in, and whether they can be had once more."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dplaunch import bucket
from dplaunch.errors import UsageError
from dplaunch.weight_source import Source, as_source

FD = Path("/proc/self/fd")


def _memory() -> int:
    """How many pieces of shared memory this process holds; other groups of it have some too."""
    return sum("dplaunch" in os.readlink(link) for link in FD.iterdir() if link.is_symlink())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buckets of 100 bytes, none of which stays."""
    monkeypatch.setattr("dplaunch.weight_source.BUCKET_BYTES", 100)
    before = _memory()
    yield
    gc.collect()
    assert _memory() == before


def weights() -> dict[str, Any]:
    return {
        "a": torch.arange(12.0).view(3, 4),
        "b": torch.tensor(7, dtype=torch.int64),
        "c": torch.randn(40).to(torch.bfloat16),
        "empty": torch.empty(0, 5),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "large": torch.randn(10, 10),
    }


async def read(source: Source) -> tuple[dict[str, Any], int]:
    """All tensors of a source, as a rank reads them, and the number of buckets."""
    found: dict[str, Any] = {}
    count = 0
    async for each in source.buckets():
        count += 1
        found |= {name: tensor.clone() for name, tensor in bucket.tensors_in(each.path, each.entries)}
        each.free()
    return found, count


def equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


async def test_tensors_of_all_types_and_shapes_arrive_as_they_were_in_several_buckets() -> None:
    given = weights()
    found, count = await read(as_source(given))
    assert equal(found, given)
    assert count == 4


async def test_a_bucket_that_is_freed_stays_with_those_who_have_mapped_it() -> None:
    (made,) = bucket.in_buckets(weights().items())
    tensors = dict(bucket.tensors_in(made.path, made.entries))
    made.free()
    assert equal(tensors, weights() | {"c": tensors["c"], "large": tensors["large"]})
    # What a rank writes is its own.
    tensors["a"].add_(1)


def used_again() -> Iterator[tuple[str, Any]]:
    """Tensors in the same memory, each there only until the next is asked for."""
    memory = torch.empty(10)
    for number in range(7):
        memory.fill_(number)
        yield str(number), memory


async def test_each_tensor_of_an_iterator_is_read_before_the_next_is_asked_for() -> None:
    for keep in (None, "memory"):
        source = as_source(used_again(), keep)
        found, count = await read(source)
        assert count == 4
        assert equal(found, {str(number): torch.full((10,), float(number)) for number in range(7)})
        source.close()


async def test_a_source_that_fails_half_way_leaves_no_memory() -> None:
    def broken() -> Iterator[tuple[str, Any]]:
        yield from used_again()
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        await read(as_source(broken()))


async def test_a_source_that_is_given_up_half_way_leaves_no_memory() -> None:
    given = weights()
    async with contextlib.aclosing(as_source(given).buckets()) as buckets:  # type: ignore[type-var]
        (await anext(buckets)).free()


@pytest.mark.parametrize("keep", ["memory", "disk"])
async def test_a_copy_gives_the_same_once_more_and_goes_when_it_is_closed(keep: Any) -> None:
    source = as_source(iter(weights().items()), keep)
    assert source.lost()
    first, _ = await read(source)
    assert source.lost() == ""
    second, count = await read(source)
    assert equal(first, second)
    assert count == 4
    folder = getattr(source, "_folder", None)
    source.close()
    assert source.lost()
    assert folder is None or not folder.exists()


async def test_tensors_are_lost_when_they_are_written_to_or_gone() -> None:
    given = weights()
    source = as_source(given)
    assert source.lost() == ""
    given["a"].mul_(2)
    assert source.lost() == "the tensors were written to after the update"
    source = as_source(given)
    del given["c"]
    assert source.lost() == "the tensors are gone"


async def test_a_module_is_read_by_the_names_of_a_checkpoint_and_tied_weights_once() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3, bias=False))
    module[1].weight = module[0].weight
    found, _ = await read(as_source(module))
    assert list(found) == ["0.weight"]
    wrapped, _ = await read(as_source(torch.nn.DataParallel(module)))
    assert list(wrapped) == ["0.weight"]


async def test_a_function_is_asked_each_time_and_an_iterator_has_one_turn() -> None:
    asked = as_source(weights)
    assert (asked.lost(), len((await read(asked))[0]), len((await read(asked))[0])) == ("", 6, 6)
    assert "gives them once" in as_source(iter(weights().items())).lost()


def test_a_checkpoint_is_lost_when_a_file_of_it_changes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no weights"):
        as_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1")
    source = as_source(str(tmp_path))
    assert (source.path, source.lost()) == (str(tmp_path), "")
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert source.lost() == f"{tmp_path} has changed since"


@pytest.mark.parametrize("given", [5, b"weights", None])
def test_what_cannot_be_weights_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="weights cannot be a"):
        as_source(given)
    with pytest.raises(UsageError, match="is no directory"):
        as_source("/there/is/no/such/folder")
    with pytest.raises(UsageError, match="keep cannot be"):
        as_source({}, "tape")  # type: ignore[arg-type]


def test_only_a_process_of_this_host_sees_the_landmark() -> None:
    mark = bucket.Landmark()
    assert bucket.sees(mark.path, mark.secret)
    assert not bucket.sees(mark.path, "0" * 32)
    mark.close()
    mark.close()
    assert not bucket.sees(mark.path, mark.secret)


def test_what_comes_over_the_network_is_loaded_from_memory_of_its_own() -> None:
    (made,), depot = bucket.in_buckets(weights().items()), bucket.Depot()
    path = depot.take(made.read())
    assert equal(dict(bucket.tensors_in(path, made.entries)), dict(bucket.tensors_in(made.path, made.entries)))
    assert bucket.digest("", path, made.entries) == bucket.digest("", made.path, made.entries)
    made.free()
    assert bucket.sees(*depot.landmark())
    # One at a time, and none at the end.
    fds = len(os.listdir("/proc/self/fd"))
    depot.take(b"next")
    assert len(os.listdir("/proc/self/fd")) == fds
    depot.clear()
    depot.clear()
    assert len(os.listdir("/proc/self/fd")) == fds - 2
