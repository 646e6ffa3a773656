"""vLLM's own AsyncLLM is steered, and the group is: what its HTTP routes call is for all ranks, later ones too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dplaunch.bucket import in_buckets
from dplaunch.errors import DplaunchError
from dplaunch.group import AsyncGroup
from dplaunch.posted import as_told, seal
from dplaunch.seam.weights import lora_request
from dplaunch.testing.weights import checksum_of
from dplaunch.transfers import BUCKET, GIVE_UP
from tests.contract.conftest import Launch
from tests.contract.groups import Watched
from tests.contract.test_weights import answers_with, kill, killed, tensors, until

NCCL = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 3}


async def post(group: AsyncGroup, weights: Mapping[str, Any], **options: Any) -> None:
    """Sends a bucket, as the route does; its writer lets go of it at once."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    (bucket,) = in_buckets(weights.items())
    seal(bucket)
    try:
        told = {BUCKET: as_told(bucket), **options}
        await group.engine.update_weights(WeightTransferUpdateRequest(update_info=told))
    finally:
        bucket.free()


async def relay(group: AsyncGroup, info: Mapping[str, Any]) -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    await group.engine.update_weights(WeightTransferUpdateRequest(update_info=dict(info)))


async def connect(group: AsyncGroup, **others: Any) -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

    await group.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={**NCCL, **others}))


async def back(watched: Watched, rank: int) -> None:
    kill(watched, rank)
    await until(watched, rank, "ready")


async def test_weights_in_several_calls_are_one_update_of_the_group(launch: Launch) -> None:
    watched = await launch()
    group, weights = watched.group, tensors(1)
    first = dict(list(weights.items())[:2])
    rest = {name: weights[name] for name in weights if name not in first}
    await group.engine.start_weight_update()
    await post(group, first)
    await post(group, rest)
    assert group.weight_version == "0"
    await group.engine.finish_weight_update("step-1")
    assert group.weight_version == await group.engine.get_weight_version() == "step-1"
    assert await group.call("get_weight_version") == ["step-1", "step-1"]
    await answers_with(group, checksum_of(weights.items()))
    # The trainer has let go of its memory; the launcher's copy is the same memory.
    await back(watched, 1)
    await answers_with(group, checksum_of(weights.items()))
    await group.engine.start_weight_update()
    await post(group, tensors(2), keep=False)
    await group.engine.finish_weight_update()
    assert group.weight_version == "2"
    kill(watched, 1)
    await until(watched, 1, "stale", 2)
    assert "not kept" in group.supervisor.ranks[1].stale


async def test_a_rank_that_dies_while_a_trainer_sends_comes_back_with_what_the_others_have(launch: Launch) -> None:
    watched = await launch(killed(1))
    group, weights = watched.group, tensors(1)
    await group.engine.start_weight_update()
    await post(group, weights)
    await group.engine.finish_weight_update()
    await until(watched, 1, "ready")
    assert watched.group.client.ranks == [0, 1]
    await answers_with(group, checksum_of(weights.items()))


async def test_a_trainer_that_gives_up_or_sends_nonsense_leaves_the_weights_as_they_were(launch: Launch) -> None:
    watched = await launch()
    group, weights = watched.group, tensors(1)
    await group.update_weights(weights)
    for ends in ("gives up", "sends nonsense"):
        await group.engine.start_weight_update()
        await post(group, tensors(2))
        if ends == "gives up":
            await relay(group, {GIVE_UP: "out of memory"})
        else:
            with pytest.raises(DplaunchError, match="and nothing else"):
                await relay(group, {BUCKET: {"path": "/etc/passwd", "entries": [["a", "uint8", [1], 0, 1]]}})
            await relay(group, {GIVE_UP: "so it stops"})
        with pytest.raises(DplaunchError, match="no update"):
            await group.engine.finish_weight_update("2")
        assert group.weight_version == "1"
        incarnation = 1 if ends == "gives up" else 2
        for rank in (0, 1):
            await until(watched, rank, "ready", incarnation)
        await answers_with(group, checksum_of(weights.items()))


async def test_what_came_over_nccl_leaves_a_restarted_rank_stale_until_the_trainer_meets_it(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = await launch()
    group = watched.group
    with pytest.raises(DplaunchError, match="world_size is 2, and has to be 3"):
        await connect(group, world_size=2)
    # One whose trainer has gone before it sent anything is in nobody's way for long.
    monkeypatch.setattr("dplaunch.transfers.GAP_S", 0.0)
    await group.engine.start_weight_update()
    await connect(group)
    await group.engine.start_weight_update()
    with pytest.raises(DplaunchError, match="under way already"):
        await group.engine.start_weight_update()
    await relay(group, {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]})
    await group.engine.finish_weight_update()
    assert group.weight_version == "1"
    kill(watched, 1)
    await until(watched, 1, "stale")
    assert group.client.ranks == [0]
    with pytest.raises(DplaunchError, match="has not met rank 1") as refused:
        await group.engine.start_weight_update()
    assert "init_communicator" in str(refused.value)
    await connect(group)
    await group.engine.start_weight_update()
    await relay(group, {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]})
    await group.engine.finish_weight_update()
    assert group.client.ranks == [0, 1]


async def test_pause_and_sleep_over_vllms_engine_are_the_groups(launch: Launch) -> None:
    watched = await launch()
    group = watched.group
    engine = group.engine
    await engine.pause_generation(mode="keep")
    assert await engine.is_paused()
    kill(watched, 1)
    await until(watched, 1, "ready")
    assert await group.call("is_scheduler_paused") == [True, True]
    await engine.resume_generation()
    assert not await engine.is_paused()
    await engine.sleep(2, "abort")
    assert await engine.is_sleeping()
    assert await group.call("is_sleeping") == [True, True]
    assert not await engine.wake_up(["weights"])
    await engine.collective_rpc("reload_weights")
    assert await engine.wake_up(["kv_cache"])
    await answers_with(group, "")
    await engine.sleep(0)
    assert await engine.is_paused()
    assert await engine.wake_up()
    assert await engine.reset_prefix_cache()
    with pytest.raises(DplaunchError, match="cannot be called in the workers"):
        await engine.collective_rpc("update_weights", kwargs={"update_info": {}})


async def test_an_adapter_that_the_server_loads_is_in_a_rank_that_comes_up_later(launch: Launch) -> None:
    watched = await launch()
    group = watched.group
    await group.engine.add_lora(lora_request("tuned", 7, "/adapters/tuned"))
    await back(watched, 1)
    assert [set(each) for each in await group.call("list_loras")] == [{7}, {7}]
    # A number that the server has given is not given again.
    assert (await group.load_lora("other", "/adapters/other")).lora_int_id == 8
    await group.verbs.forget_lora("tuned")
    assert [set(each) for each in await group.call("list_loras")] == [{8}, {8}]
