"""Batches that are read as they finish, watched, and gone on with from a file: the same on every backend."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest

from dplaunch.batch_progress import BatchState
from dplaunch.errors import GroupDeadError
from dplaunch.spec import RestartPolicy
from dplaunch.testing import Fault, StandInPlan, When, expected_tokens, poll_until_async
from tests.contract.conftest import Launch
from tests.contract.test_group import SLOW, params, tokens


async def test_answers_come_as_they_finish_and_leaving_early_aborts_the_rest(launch: Launch) -> None:
    group = (await launch(SLOW)).group
    lengths = [400, 3, 400, 400]
    asked = [params(length) for length in lengths]
    async with contextlib.aclosing(group.generate_iter([[n + 1] for n in range(4)], asked)) as outputs:
        index, output = await anext(outputs)
        assert (index, tokens(output)) == (1, expected_tokens([2], 3))
        assert group.client.unfinished == 3
    assert group.client.unfinished == 0
    assert [tokens(output) for output in await group.generate([[4]], params(2))] == [expected_tokens([4], 2)]


async def test_a_batch_goes_on_from_its_file_also_in_a_group_that_came_later(launch: Launch, tmp_path: Path) -> None:
    prompts = [[n + 1, 5] for n in range(30)]
    first = (await launch()).group
    await first.generate(prompts[:20], params(6), resume=tmp_path / "run.jsonl")
    await first.close()
    second = (await launch(base_id="second")).group
    told: list[BatchState] = []
    outputs = await second.generate(prompts, params(6), resume=tmp_path / "run.jsonl", progress=told.append)
    assert [tokens(output) for output in outputs] == [expected_tokens(prompt, 6) for prompt in prompts]
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    assert second.client.counters.accepted == 10
    assert (told[-1].done, told[-1].resumed, told[-1].tokens) == (30, 20, 60)
    assert set(told[-1].shares) == {0, 1}
    assert sum(told[-1].shares.values()) == pytest.approx(1)


async def test_a_batch_whose_group_dies_is_finished_by_the_next_group(launch: Launch, tmp_path: Path) -> None:
    prompts = [[n + 1] for n in range(8)]
    lengths = [params(3)] * 4 + [params(400)] * 4
    plan = StandInPlan(token_delay_s=0.02, faults={(0, 0): Fault(when=When.REQUEST, nth=9, returncode=-signal.SIGKILL)})
    watched = await launch(plan, dp=1, restart=RestartPolicy(limit=0))
    group, path = watched.group, tmp_path / "run.jsonl"
    found: list[int] = []

    async def read() -> None:
        async for index, _ in group.generate_iter(prompts, lengths, resume=path):
            found.append(index)

    reading = asyncio.create_task(read())
    await poll_until_async(lambda: len(found) == 4)
    # The ninth request is the end of the only rank.
    with pytest.raises(GroupDeadError):
        await group.generate([[9]], params(1))
    with pytest.raises(GroupDeadError):
        await reading
    assert sorted(found) == [0, 1, 2, 3]
    await group.close()
    second = (await launch(dp=1, base_id="second")).group
    outputs = await second.generate(prompts, lengths, resume=path)
    assert [len(tokens(output)) for output in outputs] == [3] * 4 + [400] * 4
    assert second.client.counters.accepted == 4


async def test_a_batch_that_is_cancelled_keeps_in_its_file_what_was_answered(launch: Launch, tmp_path: Path) -> None:
    group, path = (await launch(SLOW)).group, tmp_path / "run.jsonl"
    asked: list[Any] = [params(2), params(400)]
    batch = asyncio.create_task(group.generate([[1], [2]], asked, resume=path))
    await poll_until_async(lambda: path.exists() and len(path.read_text().splitlines()) == 2)
    batch.cancel()
    await asyncio.gather(batch, return_exceptions=True)
    (output,) = await group.generate([[1]], asked[0], resume=path)
    assert tokens(output) == expected_tokens([1], 2)
    assert group.client.counters.accepted == 2
