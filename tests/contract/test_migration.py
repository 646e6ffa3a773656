"""Ranks that die under streams: every answer is the undisturbed one, or an error that says why. On every backend."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dplaunch.errors import RequestError
from dplaunch.events import Kind
from dplaunch.spec import RequestPolicy
from dplaunch.testing import Fault, StandInPlan, When, expected_tokens, poll_until_async
from tests.contract.conftest import Launch
from tests.contract.groups import Watched

SLOW = StandInPlan(token_delay_s=0.03)
POISON = 999
TOKENS = 60


class Stream:
    """One answer as it comes."""

    def __init__(self, watched: Watched, name: str, prompt: Sequence[int], rank: int | None = None, **fields: Any):
        self.tokens: list[int] = []
        self.finish = ""
        self.prompt = list(prompt)
        self._watched = watched
        self._name = name
        self._rank = rank
        self._fields = {"max_tokens": TOKENS, "temperature": 0, **fields}
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA, **self._fields)
        prompt = {"prompt_token_ids": self.prompt}
        engine = self._watched.group.engine
        async for output in engine.generate(prompt, params, self._name, data_parallel_rank=self._rank):
            (part,) = output.outputs
            self.tokens += part.token_ids
            self.finish = part.finish_reason or self.finish

    async def is_exact(self) -> bool:
        """Whether the whole answer is as foretold."""
        await asyncio.wait_for(self.task, 60)
        return self.tokens == expected_tokens(self.prompt, TOKENS) and self.finish == "length"


async def under_way(streams: Sequence[Stream]) -> None:
    """Waits until each has shown something."""
    await poll_until_async(lambda: all(len(stream.tokens) >= 2 for stream in streams), 60, "the first tokens of all")


def kill(watched: Watched, rank: int) -> None:
    handle = watched.group.supervisor.ranks[rank].handle
    assert handle is not None
    handle.kill()


def told(watched: Watched, kind: Kind) -> list[str]:
    return [event.message for event in watched.events if event.kind is kind]


async def test_streams_go_on_when_their_rank_dies_and_are_the_undisturbed_ones(launch: Launch) -> None:
    watched = await launch(SLOW)
    plain = [Stream(watched, f"s{n}", [20 + n, 7]) for n in range(8)]
    repeated = [Stream(watched, f"p{n}", [40 + n, 7], presence_penalty=1.0) for n in range(4)]
    pinned = Stream(watched, "pinned", [60, 7], rank=1)
    streams = [*plain, *repeated, pinned]
    await under_way(streams)
    kill(watched, 1)
    assert [await stream.is_exact() for stream in streams] == [True] * len(streams)
    counters = watched.group.client.counters
    assert (counters.finished, counters.lost, counters.poisoned) == (len(streams), 0, 0)
    assert counters.moved == watched.group.client.rank_counters[1].moved_away >= 2
    (moved,) = told(watched, Kind.MOVED)
    assert moved.startswith(f"rank 1 died with {counters.moved} requests: ")
    await poll_until_async(lambda: watched.states(1)[-1] == ("ready", 1), 60, "the return of rank 1")


async def test_a_repeated_answer_that_is_another_one_ends_with_an_error_that_says_where(launch: Launch) -> None:
    plan = StandInPlan(faults={(0, 0): Fault()}, default=Fault(deviates=True), token_delay_s=0.03)
    watched = await launch(plan)
    stream = Stream(watched, "seeded", [5, 6], rank=0, temperature=1.0, seed=3)
    await under_way([stream])
    kill(watched, 0)
    with pytest.raises(RequestError, match="answered differently on rank 0 at token 1") as caught:
        await asyncio.wait_for(stream.task, 60)
    assert caught.value.retryable
    assert stream.tokens == expected_tokens([5, 6], len(stream.tokens))
    assert watched.group.client.unfinished == 0


async def test_all_answers_to_one_prompt_survive_the_death_of_a_rank(launch: Launch) -> None:
    from vllm import SamplingParams

    group = (await launch(SLOW)).group
    params = SamplingParams(n=4, max_tokens=TOKENS, temperature=1.0, detokenize=False)
    batch = asyncio.create_task(group.generate([[9, 8]], params))
    tokens = group.client.rank_counters
    await poll_until_async(lambda: tokens[0].tokens > 4 and tokens[1].tokens > 4, 60, "answers of both ranks")
    handle = group.supervisor.ranks[0].handle
    assert handle is not None
    handle.kill()
    (output,) = await asyncio.wait_for(batch, 60)
    assert [part.index for part in output.outputs] == [0, 1, 2, 3]
    assert [list(part.token_ids) for part in output.outputs] == [expected_tokens([9, 8], TOKENS)] * 4


async def test_a_request_that_ranks_die_of_fails_by_name_and_takes_no_other_with_it(
    launch: Launch, tmp_path: Path
) -> None:
    deadly = Fault(when=When.REQUEST, returncode=-signal.SIGKILL, nth=0, poison_token=POISON)
    kept = tmp_path / "poison.jsonl"
    watched = await launch(
        StandInPlan(default=deadly, token_delay_s=0.03), dp=3, requests=RequestPolicy(poison_file=kept)
    )
    streams = [Stream(watched, f"s{n}", [20 + n, 7]) for n in range(9)]
    await under_way(streams)
    poison = Stream(watched, "poison", [POISON])
    with pytest.raises(RequestError, match=r"in flight on 2 ranks that died, .* kept from a third") as caught:
        await asyncio.wait_for(poison.task, 60)
    assert not caught.value.retryable
    assert [await stream.is_exact() for stream in streams] == [True] * len(streams)
    deaths = [state for rank in range(3) for state, _ in watched.states(rank) if state == "down"]
    assert len(deaths) == 2
    assert kept.stat().st_mode & 0o777 == 0o600
    assert watched.group.client.counters.poisoned == len(told(watched, Kind.POISONED)) == 1


async def test_a_full_group_refuses_and_keeps_no_trace_of_what_it_refused(launch: Launch) -> None:
    watched = await launch(SLOW, requests=RequestPolicy(max_queue=2))
    group = watched.group
    streams = [Stream(watched, f"s{n}", [20 + n, 7]) for n in range(2)]
    await under_way(streams)
    for number in range(5):
        with pytest.raises(RequestError, match="max_queue is 2") as caught:
            await asyncio.wait_for(Stream(watched, f"late{number}", [9]).task, 60)
        assert caught.value.retryable
    assert set(group.engine.output_processor.request_states) == set(group.client._requests._in_flight)
    assert group.client.counters.refused == 5
    assert [await stream.is_exact() for stream in streams] == [True, True]
    assert (group.client.unfinished, len(group.engine.output_processor.request_states)) == (0, 0)
