"""New weights in a running group: in all ranks or in none, and never stale. The same on every backend.

A stand-in engine's answers depend on its weights, so that a rank with others would be seen.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dplaunch import device_memory
from dplaunch.bucket import digest_of_files
from dplaunch.errors import RequestError, StandstillError, UsageError, WeightsError
from dplaunch.group import AsyncGroup
from dplaunch.spec import RestartPolicy
from dplaunch.testing import Fault, StandInPlan, When, expected_tokens, poll_until_async
from dplaunch.testing.devices import OnDevice, PretendedMemory
from dplaunch.testing.weights import checksum_of
from tests.contract.conftest import Launch
from tests.contract.groups import Watched
from tests.contract.test_group import SLOW, params, tokens

BACK_S = 60.0
PROMPTS = [[index + 1, 3] for index in range(12)]


def tensors(seed: int) -> dict[str, Any]:
    """A small model's weights, of several types and shapes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = {f"layers.{n}.weight": torch.randn(33, 7, generator=generator) for n in range(4)}
    return made | {"scale": torch.tensor(float(seed)), "head": made["layers.0.weight"].t().to(torch.float16)}


def killed(rank: int) -> StandInPlan:
    """A rank that is killed when it is to load weights, the first time."""
    return StandInPlan(faults={(rank, 0): Fault(when=When.WEIGHTS, returncode=-signal.SIGKILL)})


async def answers_with(group: AsyncGroup, weights: str) -> None:
    """Every rank answers with the weights of that checksum."""
    for rank in group.client.ranks:
        outputs = await asyncio.wait_for(group.generate(PROMPTS, params(6), data_parallel_rank=rank), BACK_S)
        assert [tokens(output) for output in outputs] == [expected_tokens(prompt, 6, weights) for prompt in PROMPTS]


async def until(watched: Watched, rank: int, state: str, incarnation: int = 1) -> None:
    await poll_until_async(lambda: (state, incarnation) in watched.states(rank), BACK_S, f"rank {rank} {state}")


def kill(watched: Watched, rank: int) -> None:
    handle = watched.group.supervisor.ranks[rank].handle
    assert handle is not None
    handle.kill()


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several for a small model."""
    monkeypatch.setattr("dplaunch.weight_source.BUCKET_BYTES", 1000)


@pytest.mark.usefixtures("small_buckets")
async def test_all_ranks_get_new_weights_from_each_kind_of_source(launch: Launch, tmp_path: Path) -> None:
    import torch

    group = (await launch(dp=3)).group
    await answers_with(group, "")
    assert group.weight_version == "0"

    first = tensors(1)
    done = await group.update_weights(first)
    assert (done.version, done.ranks, dict(done.behind)) == ("1", (0, 1, 2), {})
    assert await group.weight_checksums() == dict.fromkeys(range(3), checksum_of(first.items()))
    await answers_with(group, checksum_of(first.items()))

    second = tensors(2)
    await group.update_weights(iter(second.items()), "step-2")
    await answers_with(group, checksum_of(second.items()))

    module = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5))
    await group.update_weights(module, 3)
    await answers_with(group, checksum_of(module.state_dict().items()))

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    await group.update_weights(checkpoint)
    assert group.weight_version == "4"
    await answers_with(group, digest_of_files(str(checkpoint)))
    assert all(report == "4" for report in await group.call("get_weight_version"))


@pytest.mark.usefixtures("small_buckets")
async def test_ranks_on_other_hosts_get_each_bucket_once_per_host(launch: Launch) -> None:
    hosts = {1: 1, 2: 2, 3: 1, 4: 2}  # rank 0 is where the launcher is
    group = (await launch(StandInPlan(hosts=hosts), dp=5)).group
    for seed in (1, 2):
        await group.update_weights(tensors(seed))
        await answers_with(group, checksum_of(tensors(seed).items()))
    taken = await group.call("taken_buckets")
    assert taken[1] == taken[2] > 2
    assert [taken[rank] for rank in (0, 3, 4)] == [0, 0, 0]


def on_device(weights: Mapping[str, Any], device: str) -> list[tuple[str, Any]]:
    """The same weights, where a trainer would have them."""
    return [(name, OnDevice(tensor, device)) for name, tensor in weights.items()]


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a device on which this process has memory."""
    monkeypatch.setattr(device_memory, "own_devices", lambda: {"GPU-a": "GPU-a"})
    monkeypatch.setattr(device_memory, "DeviceMemory", PretendedMemory)
    monkeypatch.setattr(device_memory, "name_of", lambda device: device if isinstance(device, str) else "")
    monkeypatch.setattr(PretendedMemory, "left_open", 0)
    return "GPU-a"


@pytest.mark.usefixtures("small_buckets")
async def test_a_rank_on_the_device_of_the_weights_reads_them_there_and_the_others_from_the_host(
    launch: Launch, pretended_device: str
) -> None:
    # Rank 2 does not see what it should: it is in another container, say.
    plan = StandInPlan(devices={0: pretended_device, 1: "GPU-b", 2: pretended_device}, blind=(2,))
    group = (await launch(plan, dp=4)).group
    weights = tensors(1)
    await group.update_weights(on_device(weights, pretended_device))
    await answers_with(group, checksum_of(weights.items()))
    first, *others = await group.call("buckets_on_device")
    assert first > 2
    assert others == [0, 0, 0]
    assert PretendedMemory.left_open == 1  # the mark that rank 2 did not see


@pytest.mark.usefixtures("small_buckets")
async def test_ranks_that_share_the_device_of_the_weights_each_open_them_by_a_handle_of_their_own(
    launch: Launch, pretended_device: str
) -> None:
    group = (await launch(StandInPlan(devices=dict.fromkeys(range(2), pretended_device)), dp=2)).group
    weights = tensors(1)
    await group.update_weights(on_device(weights, pretended_device))
    await answers_with(group, checksum_of(weights.items()))
    assert min(await group.call("buckets_on_device")) > 2
    assert PretendedMemory.left_open == 0


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("blind", [(0,), (1,), (0, 1)])
async def test_a_rank_that_dies_or_sees_nothing_leaves_no_memory_of_the_weights_device_open(
    launch: Launch, pretended_device: str, blind: tuple[int, ...]
) -> None:
    dies = {(1, 0): Fault(when=When.WEIGHTS, returncode=-signal.SIGKILL)}
    plan = StandInPlan(devices=dict.fromkeys(range(2), pretended_device), faults=dies, blind=blind)
    group, weights = (await launch(plan, dp=2)).group, tensors(1)
    there = on_device(weights, pretended_device)
    assert (await group.update_weights(there)).ranks == (0,)
    await poll_until_async(lambda: group.client.ranks == [0, 1])
    await answers_with(group, checksum_of(weights.items()))
    # The marks that the blind ones did not see, rank 1 twice; or the bucket that it died of, if it read there.
    assert PretendedMemory.left_open == len(blind) + 1


@pytest.mark.usefixtures("small_buckets")
async def test_weights_leave_the_device_where_they_are_from_the_host_or_kept_there(
    launch: Launch, pretended_device: str
) -> None:
    group = (await launch(StandInPlan(devices={0: pretended_device}), dp=1)).group
    weights = tensors(1)
    await group.update_weights(weights)
    await answers_with(group, checksum_of(weights.items()))
    there = on_device(tensors(2), pretended_device)
    await group.update_weights(iter(there), keep="memory")
    await answers_with(group, checksum_of(tensors(2).items()))
    assert await group.call("buckets_on_device") == [0]


@pytest.mark.usefixtures("small_buckets")
async def test_where_a_device_has_no_room_its_ranks_get_weights_from_the_host(
    launch: Launch, pretended_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = (await launch(StandInPlan(devices={0: pretended_device}), dp=1)).group

    def no_room(device: str, nbytes: int) -> PretendedMemory:
        if nbytes > device_memory.SECRET_BYTES:
            raise RuntimeError("out of memory")
        return PretendedMemory(device, nbytes)

    monkeypatch.setattr(device_memory, "DeviceMemory", no_room)
    weights = tensors(1)
    await group.update_weights(on_device(weights, pretended_device))
    await answers_with(group, checksum_of(weights.items()))
    assert await group.call("buckets_on_device") == [0]


@pytest.mark.usefixtures("small_buckets")
async def test_a_rank_that_comes_back_reads_weights_on_its_device_again(launch: Launch, pretended_device: str) -> None:
    watched = await launch(StandInPlan(devices={0: pretended_device}), dp=1)
    group, weights = watched.group, tensors(1)
    there = on_device(weights, pretended_device)
    await group.update_weights(there)
    kill(watched, 0)
    await until(watched, 0, "ready")
    await answers_with(group, checksum_of(weights.items()))
    (again,) = await group.call("buckets_on_device")
    assert again > 2


async def test_when_the_rank_that_takes_buckets_for_its_host_dies_the_others_have_the_weights(launch: Launch) -> None:
    dies = {(0, 0): Fault(when=When.WEIGHTS, returncode=-signal.SIGKILL)}
    watched = await launch(StandInPlan(hosts=dict.fromkeys(range(3), 1), faults=dies), dp=3)
    group, weights = watched.group, tensors(1)
    done = await group.update_weights(weights)
    assert done.ranks == (1, 2)
    assert "died" in done.behind[0]
    await until(watched, 0, "ready")
    await poll_until_async(lambda: group.client.ranks == [0, 1, 2])
    await answers_with(group, checksum_of(weights.items()))


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("keep", [None, "memory", "disk"])
async def test_a_rank_that_is_killed_between_updates_comes_back_with_the_new_weights(launch: Launch, keep: Any) -> None:
    watched = await launch()
    group, weights = watched.group, tensors(1)
    wanted = checksum_of(weights.items())
    await group.update_weights(weights if keep is None else iter(weights.items()), keep=keep)
    kill(watched, 1)
    await until(watched, 1, "ready")
    assert await group.weight_checksums() == {0: wanted, 1: wanted}
    await answers_with(group, wanted)


@pytest.mark.parametrize("kind", ["memory", "checkpoint"])
async def test_eight_ranks_that_are_killed_together_get_the_weights_in_the_time_of_one(
    launch: Launch, tmp_path: Path, kind: str
) -> None:
    load_s = 0.4
    watched = await launch(StandInPlan(load_s=load_s), dp=8, restart=RestartPolicy(backoff_s=0.05, limit=4))
    group, weights, readings = watched.group, tensors(1), 0

    def read() -> Mapping[str, Any]:
        nonlocal readings
        readings += 1
        return weights

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    await group.update_weights(tmp_path if kind == "checkpoint" else read)
    wanted = digest_of_files(str(tmp_path)) if kind == "checkpoint" else checksum_of(weights.items())
    assert group.weights is not None
    arrivals = group._arrivals
    assert arrivals is not None
    async with group.weights.lock:
        for rank in range(8):
            kill(watched, rank)
        await poll_until_async(lambda: arrivals.waiting == 8, BACK_S, "eight ranks that wait for weights")
        began = time.monotonic()
    await poll_until_async(lambda: group.client.ranks == list(range(8)), BACK_S, "eight ranks")
    assert time.monotonic() - began < 8 * load_s
    assert readings == (0 if kind == "checkpoint" else 2)
    assert await group.weight_checksums() == dict.fromkeys(range(8), wanted)


async def test_a_rank_that_dies_while_several_get_the_weights_does_not_hold_up_the_others(launch: Launch) -> None:
    dies = Fault(when=When.WEIGHTS, returncode=-signal.SIGKILL)
    fails = Fault(when=When.WEIGHTS, error="out of memory")
    watched = await launch(StandInPlan(faults={(0, 1): dies, (1, 1): fails}), dp=3)
    group, weights = watched.group, tensors(1)
    await group.update_weights(weights)
    assert group.weights is not None
    arrivals = group._arrivals
    assert arrivals is not None
    async with group.weights.lock:
        for rank in range(3):
            kill(watched, rank)
        await poll_until_async(lambda: arrivals.waiting == 3, BACK_S, "three ranks that wait for weights")
    await until(watched, 2, "ready", 1)
    for rank in (0, 1):
        await until(watched, rank, "ready", 2)
    await poll_until_async(lambda: group.client.ranks == [0, 1, 2])
    await answers_with(group, checksum_of(weights.items()))


async def test_weights_that_cannot_be_had_again_leave_a_rank_stale_until_the_next_update(launch: Launch) -> None:
    watched = await launch()
    group, weights = watched.group, tensors(1)
    await group.update_weights(iter(weights.items()))
    kill(watched, 1)
    await until(watched, 1, "stale")
    assert group.client.ranks == [0]
    assert "an iterator" in group.supervisor.ranks[1].stale
    await answers_with(group, checksum_of(weights.items()))
    # Neither more ranks nor the same ones anew get what nobody has.
    await group.scale(3)
    assert group.client.ranks == [0]
    await group.update_weights(tensors(2))
    assert group.client.ranks == [0, 1, 2]
    assert watched.states(1)[-2:] == [("stale", 1), ("ready", 1)]
    await answers_with(group, checksum_of(tensors(2).items()))


async def test_tensors_that_were_written_to_since_are_not_taken_for_what_they_were(launch: Launch) -> None:
    watched = await launch()
    group, weights = watched.group, tensors(1)
    before = checksum_of(weights.items())
    await group.update_weights(weights)
    # torch does not count this one.
    weights["scale"].data = weights["scale"].data + 1
    kill(watched, 1)
    await until(watched, 1, "stale")
    assert "checksum" in group.supervisor.ranks[1].stale
    weights["head"].add_(1)
    kill(watched, 1)
    await until(watched, 1, "stale", 2)
    assert "written to after the update" in group.supervisor.ranks[1].stale
    await answers_with(group, before)


async def test_ranks_that_join_after_an_update_have_its_weights(launch: Launch) -> None:
    group = (await launch(dp=1)).group
    weights = tensors(1)
    await group.update_weights(weights, "seven")
    await group.scale(3)
    assert group.client.ranks == [0, 1, 2]
    assert await group.call("get_weight_version") == ["seven"] * 3
    await answers_with(group, checksum_of(weights.items()))


async def test_a_rank_that_is_killed_during_an_update_is_named_and_comes_back_with_the_new_weights(
    launch: Launch,
) -> None:
    watched = await launch(killed(1))
    group, weights = watched.group, tensors(1)
    done = await group.update_weights(weights)
    assert done.ranks == (0,)
    assert "died" in done.behind[1]
    await until(watched, 1, "ready")
    await poll_until_async(lambda: group.client.ranks == [0, 1])
    await answers_with(group, checksum_of(weights.items()))


async def test_a_rank_that_fails_at_an_update_is_replaced_by_one_with_the_new_weights(launch: Launch) -> None:
    plan = StandInPlan(faults={(0, 0): Fault(when=When.WEIGHTS, error="out of memory")})
    watched = await launch(plan)
    group, weights = watched.group, tensors(1)
    done = await group.update_weights(weights)
    assert done.ranks == (1,)
    assert "out of memory" in done.behind[0]
    await until(watched, 0, "ready")
    await poll_until_async(lambda: group.client.ranks == [0, 1])
    await answers_with(group, checksum_of(weights.items()))


async def test_a_rank_that_does_not_acknowledge_in_time_is_replaced(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dplaunch.weights.LAG_S", 0.5)
    plan = StandInPlan(faults={(1, 0): Fault(when=When.WEIGHTS, hang=True)})
    watched = await launch(plan)
    group, weights = watched.group, tensors(1)
    done = await group.update_weights(weights)
    assert "did not acknowledge in time" in done.behind[1]
    await until(watched, 1, "ready")
    await poll_until_async(lambda: group.client.ranks == [0, 1])
    await answers_with(group, checksum_of(weights.items()))


def breaking(weights: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors that end in an error."""
    yield from list(weights.items())[:5]
    raise OSError("the disk is gone")


@pytest.mark.usefixtures("small_buckets")
async def test_a_source_that_fails_half_way_leaves_all_ranks_with_what_they_had(launch: Launch) -> None:
    watched = await launch()
    group, weights = watched.group, tensors(1)
    await group.update_weights(weights)
    with pytest.raises(WeightsError, match="the disk is gone") as raised:
        await group.update_weights(lambda: breaking(tensors(2)))
    assert "restarted with weights 1" in raised.value.hint
    assert group.weight_version == "1"
    await until(watched, 0, "ready")
    await until(watched, 1, "ready")
    await poll_until_async(lambda: group.client.ranks == [0, 1])
    await answers_with(group, checksum_of(weights.items()))


async def test_a_source_that_fails_at_once_changes_nothing(launch: Launch) -> None:
    watched = await launch()
    with pytest.raises(WeightsError, match="there are no weights") as raised:
        await watched.group.update_weights({})
    assert "Nothing was changed" in raised.value.hint
    assert watched.states(0) == [("starting", 0), ("ready", 0)]
    await answers_with(watched.group, "")


async def test_what_no_rank_can_load_is_refused_and_all_have_the_first_weights(launch: Launch) -> None:
    fault = Fault(when=When.WEIGHTS, error="There is no module named 'scale'")
    watched = await launch(StandInPlan(faults={(rank, 0): fault for rank in range(2)}))
    group = watched.group
    with pytest.raises(WeightsError, match=r"no rank could load weights 1: rank 0: .*no module named 'scale'"):
        await group.update_weights(tensors(1))
    await until(watched, 1, "ready")
    await poll_until_async(lambda: group.client.ranks == [0, 1], BACK_S)
    await answers_with(group, "")


async def test_ranks_that_disagree_about_weights_are_restarted_with_those_from_before(launch: Launch) -> None:
    watched = await launch(StandInPlan(faults={(1, 0): Fault(deviates=True)}))
    group = watched.group
    with pytest.raises(WeightsError, match="the ranks disagree"):
        await group.update_weights(tensors(1))
    await until(watched, 0, "ready")
    await until(watched, 1, "ready")
    await poll_until_async(lambda: group.client.ranks == [0, 1])
    await answers_with(group, "")


async def test_requests_wait_for_an_update_and_none_is_answered_by_both_weights(launch: Launch) -> None:
    group = (await launch(SLOW)).group
    weights = tensors(1)
    early = asyncio.create_task(group.generate(PROMPTS, params(20)))
    await poll_until_async(lambda: group.client.unfinished == len(PROMPTS))
    update = asyncio.create_task(group.update_weights(weights))
    await poll_until_async(lambda: group.client.is_held)
    late = asyncio.create_task(group.generate(PROMPTS, params(20)))
    await update
    new = checksum_of(weights.items())
    assert [tokens(output) for output in await early] == [expected_tokens(prompt, 20) for prompt in PROMPTS]
    assert [tokens(output) for output in await late] == [expected_tokens(prompt, 20, new) for prompt in PROMPTS]


async def test_a_request_that_moves_while_an_update_waits_for_it_ends_on_the_weights_it_began_with(
    launch: Launch,
) -> None:
    watched = await launch(SLOW)
    group = watched.group
    early = asyncio.create_task(group.generate(PROMPTS, params(60)))
    await poll_until_async(lambda: group.client.rank_counters[1].tokens > 20)
    update = asyncio.create_task(group.update_weights(tensors(1)))
    await poll_until_async(lambda: group.client.is_held)
    kill(watched, 1)
    assert [tokens(output) for output in await early] == [expected_tokens(prompt, 60) for prompt in PROMPTS]
    await update
    await until(watched, 1, "ready")
    await answers_with(group, checksum_of(tensors(1).items()))


async def test_a_request_that_was_kept_through_an_update_is_not_moved_to_another_rank(launch: Launch) -> None:
    watched = await launch(SLOW)
    group = watched.group
    kept = asyncio.create_task(group.generate([[5]] * 2, params(100), on_error="return"))
    await poll_until_async(lambda: group.client.rank_counters[1].tokens > 0)
    await group.update_weights(tensors(1), mode="keep")
    kill(watched, 1)
    first, second = await asyncio.wait_for(kept, BACK_S)
    errors = [output for output in (first, second) if isinstance(output, RequestError)]
    (error,) = errors
    assert error.retryable
    assert "it began on weights that have been replaced since" in error.message


async def test_an_update_that_waits_too_long_is_given_up_and_the_group_serves_on(launch: Launch) -> None:
    group = (await launch(SLOW)).group
    early = asyncio.create_task(group.generate(PROMPTS, params(200)))
    await poll_until_async(lambda: group.client.unfinished == len(PROMPTS))
    with pytest.raises(StandstillError, match="12 requests were still running"):
        await group.update_weights(tensors(1), timeout_s=0.2)
    assert not group.client.is_held
    assert [tokens(output) for output in await early] == [expected_tokens(prompt, 200) for prompt in PROMPTS]
    with pytest.raises(UsageError, match="cannot be a int"):
        await group.update_weights(5)


async def test_an_adapter_is_loaded_swapped_and_removed_in_all_ranks_and_in_one_that_comes_back(launch: Launch) -> None:
    watched = await launch()
    group = watched.group
    first = await group.load_lora("style", "/adapters/one")
    second = await group.load_lora("style", "/adapters/two")
    assert first.lora_int_id != second.lora_int_id
    here = [second.lora_int_id]
    assert [list(loaded) for loaded in await group.call("list_loras")] == [here, here]
    weights = tensors(1)
    await group.update_weights(weights)
    assert [list(loaded) for loaded in await group.call("list_loras")] == [here, here]
    kill(watched, 0)
    await until(watched, 0, "ready")
    await poll_until_async(lambda: group.client.ranks == [0, 1])
    assert [list(loaded) for loaded in await group.call("list_loras")] == [here, here]
    await group.unload_lora("style")
    assert [list(loaded) for loaded in await group.call("list_loras")] == [[], []]
    assert group.loras == {}
    await answers_with(group, checksum_of(weights.items()))
    with pytest.raises(UsageError, match="no adapter 'style'"):
        await group.unload_lora("style")


async def test_answers_of_other_weights_are_not_taken_from_a_results_file(launch: Launch, tmp_path: Path) -> None:
    group, path = (await launch()).group, tmp_path / "run.jsonl"
    weights = tensors(1)
    for expected in ("", checksum_of(weights.items())):
        for _ in range(2):
            outputs = await group.generate(PROMPTS, params(6), resume=path)
            assert [tokens(output) for output in outputs] == [expected_tokens(each, 6, expected) for each in PROMPTS]
        # Called as those of the start are: it is the weights that count.
        await group.update_weights(weights, version=0)
    assert group.client.counters.accepted == 2 * len(PROMPTS)
