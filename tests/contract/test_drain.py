"""How a group ends while requests are in flight: time for them, then they are aborted. The same on every backend."""

from __future__ import annotations

import asyncio
import time

import pytest

from dplaunch.errors import GroupClosedError
from dplaunch.testing import expected_tokens, poll_until_async
from tests.contract.conftest import Launch
from tests.contract.test_group import SLOW, params, tokens

PROMPTS = [[1], [2], [3]]


async def test_requests_in_flight_get_the_shutdown_timeout_to_end(launch: Launch) -> None:
    watched = await launch(SLOW, engine_args={"shutdown_timeout": 30})
    group = watched.group
    batch = asyncio.create_task(group.generate(PROMPTS, params(40)))
    await poll_until_async(lambda: group.client.unfinished == 3)
    await asyncio.wait_for(group.close(), 20)
    outputs = await asyncio.wait_for(batch, 10)
    assert [tokens(output) for output in outputs] == [expected_tokens(prompt, 40) for prompt in PROMPTS]
    assert "3 requests are in flight: up to 30 s for them to end" in [event.message for event in watched.events]


async def test_what_is_in_flight_at_the_deadline_is_aborted_with_what_it_has(launch: Launch) -> None:
    watched = await launch(SLOW, engine_args={"shutdown_timeout": 1})
    group = watched.group
    batch = asyncio.create_task(group.generate(PROMPTS, params(1500)))
    await poll_until_async(lambda: group.client.unfinished == 3)
    begun = time.monotonic()
    await asyncio.wait_for(group.close(), 15)
    assert time.monotonic() - begun >= 1
    for prompt, output in zip(PROMPTS, await asyncio.wait_for(batch, 10), strict=True):
        answer = output.outputs[0]
        assert answer.finish_reason == "abort"
        assert 0 < len(answer.token_ids) < 1500
        assert list(answer.token_ids) == expected_tokens(prompt, len(answer.token_ids))
    assert "3 requests are aborted after 1 s" in [event.message for event in watched.events]


async def test_a_group_that_is_closing_takes_no_new_request(launch: Launch) -> None:
    group = (await launch(SLOW, engine_args={"shutdown_timeout": 30})).group
    engine = group.engine
    batch = asyncio.create_task(group.generate(PROMPTS, params(60)))
    await poll_until_async(lambda: group.client.unfinished == 3)
    closing = asyncio.create_task(group.close())
    await asyncio.sleep(0)
    # vLLM's frontend puts an error of its own around it.
    with pytest.raises(Exception) as caught:  # noqa: PT011
        async for _ in engine.generate({"prompt_token_ids": [9]}, params(1), "late"):
            pass
    assert isinstance(caught.value.__cause__, GroupClosedError)
    await asyncio.wait_for(asyncio.gather(batch, closing), 20)
