"""An update's parts, on their way from a trainer to the ranks; and what a server answers when it fails."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dplaunch.bucket import Bucket, in_buckets
from dplaunch.errors import DplaunchError, GroupDeadError, StandstillError, UsageError, WeightsError
from dplaunch.seam import frontend
from dplaunch.seam.steered import as_answer
from dplaunch.testing import poll_until_async
from dplaunch.transfer import Posted, Relayed
from tests.unit.served_errors import create_error_response


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    import torch

    (bucket,) = in_buckets([("a", torch.ones(3))])
    yield bucket
    bucket.free()


async def test_a_part_is_answered_when_the_next_is_asked_for(bucket: Bucket) -> None:
    source = Posted(keep=True)
    loading = source.buckets()
    putting = asyncio.create_task(source.put(bucket))
    first = await anext(loading)
    assert (first.path, first.entries) == (bucket.path, bucket.entries)
    assert not putting.done()
    asking = asyncio.ensure_future(anext(loading, None))
    await putting
    source.finish()
    assert await asking is None
    # Whoever loaded it has freed it, and it is there still.
    first.free()
    assert source.lost() == ""
    assert [Path(again.path).read_bytes() async for again in source.buckets()] == [Path(bucket.path).read_bytes()]
    source.close()
    assert bucket.fd == -1
    assert source.lost() != ""


async def test_parts_that_nobody_has_loaded_are_freed_with_the_update(bucket: Bucket) -> None:
    source = Posted(keep=False)
    putting = asyncio.create_task(source.put(bucket))
    await asyncio.sleep(0)
    before = len(os.listdir("/proc/self/fd"))
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    putting.cancel()
    await asyncio.wait((putting,))


async def test_a_trainer_that_is_silent_or_gives_up_ends_the_update(bucket: Bucket) -> None:
    silent = Posted(keep=True, gap_s=0.01)
    with pytest.raises(WeightsError, match="nothing for"):
        await anext(silent.buckets())
    leaving = Posted(keep=True)
    leaving.give_up("the trainer gave up")
    with pytest.raises(WeightsError, match="gave up"):
        await anext(leaving.buckets())


async def test_what_vllms_engine_is_told_comes_in_order_and_cannot_be_had_again() -> None:
    source = Relayed("start_weight_update")
    found = []

    async def load() -> None:
        found.extend([part async for part in source.parts()])

    loading = asyncio.create_task(load())
    await source.put({"names": ["a"]})
    await source.put({"names": ["b"]})
    source.finish()
    await poll_until_async(loading.done)
    assert found == [{"names": ["a"]}, {"names": ["b"]}]
    assert "once" in source.lost()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("one", hint="two"), 400),
        (WeightsError("one", hint="two"), 409),
        (StandstillError("one", hint="two"), 503),
        (GroupDeadError("one", hint="two"), 500),
    ],
)
def test_each_error_has_the_status_that_a_trainer_can_go_by(error: DplaunchError, status: int) -> None:
    with frontend.preserved_environ():
        answer = create_error_response(as_answer(error)).error
    assert answer.code == status
    assert (answer.message.splitlines()[0], "two" in answer.message) == ("one", True)
