"""Requests whose rank died: what the next rank is sent, what comes back of it, and whom a death is blamed on."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from dplaunch.client import GroupClient
from dplaunch.errors import GroupDeadError, RequestError
from dplaunch.events import Event, Kind
from dplaunch.inflight import Failed
from dplaunch.link import RankLink
from dplaunch.migrate import EngineTraits
from dplaunch.seam import frontend
from dplaunch.spec import RequestPolicy
from dplaunch.suspects import PAST
from tests.unit.test_client import FakeCodec, FakeLink, Rig, output, request, sent


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """Imported with os.environ left as it was."""
    frontend.import_vllm(quiet=True)


class Moves(Rig):
    """A client that tells what it does."""

    def __init__(self, ranks: int, **policy: Any) -> None:
        super().__init__(0)
        self.events: list[Event] = []
        self.client = GroupClient(FakeCodec(), policy=RequestPolicy(**policy), emit=self.events.append)
        for rank in range(ranks):
            self.up(rank)

    def holder(self, request_id: str) -> int:
        """The rank that a request was sent to last, among those that are up."""
        return next(rank for rank, link in self.links.items() if request_id in link.added)

    def kill(self, rank: int) -> FakeLink:
        """A rank dies and is back at once."""
        link = self.down(rank)
        self.up(rank, link.incarnation + 1)
        return link

    def ask(self, request_id: str, **fields: Any) -> None:
        """A request with these sampling parameters."""
        from vllm import SamplingParams

        made = request(request_id)
        made.sampling_params = SamplingParams(**fields)
        self.client.add(made)

    def told(self, kind: Kind) -> list[str]:
        """The messages of one kind."""
        return [event.message for event in self.events if event.kind is kind]

    def reasons(self) -> list[str]:
        """What requests failed with, among all that the frontend gets now."""
        return [outcome.error.message for outcome in self.outcomes() if isinstance(outcome, Failed)]

    def new_tokens(self) -> list[list[int]]:
        """The tokens of each output that the frontend gets now."""
        return [list(part.new_token_ids) for outputs in self.outcomes() for part in outputs.outputs]


def tokens(request_id: str, *ids: int, ends: str = "", **fields: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    reason = FinishReason[ends.upper()] if ends else None
    return EngineCoreOutput(request_id, list(ids), finish_reason=reason, **fields)


def logprobs(count: int) -> Any:
    from vllm.v1.outputs import LogprobsLists

    rows = np.arange(count).reshape(count, 1)
    return LogprobsLists(rows, rows / 10, rows[:, 0], None)


# Going on.


def test_a_request_that_goes_on_twice_has_all_its_tokens_each_time() -> None:
    rig = Moves(1)
    rig.ask("a", max_tokens=10)
    rig.answer(0, tokens("a", 5, 6))
    rig.kill(0)
    rig.answer(0, tokens("a", 7))
    rig.down(0, blame=False)
    again = rig.up(0, 2).sent[-1][1]
    assert again.prompt_token_ids == [1, 2, 3, 5, 6, 7]
    assert again.sampling_params.max_tokens == 7
    assert rig.new_tokens() == [[5, 6], [7]]


def test_what_is_said_of_the_prompt_once_is_not_said_again() -> None:
    rig = Moves(1)
    rig.ask("a", prompt_logprobs=1)
    rig.answer(0, tokens("a", 5))
    rig.kill(0)
    rig.outcomes()
    rig.answer(0, tokens("a", 6, prefill_stats=object(), events=[object()], new_prompt_logprobs_tensors=object()))
    (part,) = rig.outcome().outputs
    assert (part.new_token_ids, part.prefill_stats, part.events) == ([6], None, None)
    assert part.new_prompt_logprobs_tensors is None


def test_a_pinned_request_that_has_begun_goes_on_when_its_rank_is_back() -> None:
    rig = Moves(2)
    rig.add("a", rank=1)
    rig.answer(1, tokens("a", 5))
    rig.down(1)
    assert rig.links[0].added == []
    assert rig.client.queued == 1
    assert rig.up(1, 1).sent[-1][1].prompt_token_ids == [1, 2, 3, 5]


def test_a_death_is_told_once_with_what_becomes_of_its_requests() -> None:
    rig = Moves(1)
    rig.ask("a")
    rig.ask("b", frequency_penalty=1.0)
    rig.ask("c", seed=1)
    rig.ask("d")
    for name in "abc":
        rig.answer(0, tokens(name, 5))
    rig.down(0)
    assert rig.told(Kind.MOVED) == [
        "rank 0 died with 4 requests: 1 continues on others, 1 is sent again, 1 is repeated and compared, 1 was lost"
    ]
    (lost,) = rig.told(Kind.LOST)
    assert lost.startswith("1 request of rank 0 could not be moved: it has a penalty over its own output")
    counters = rig.client.counters
    assert (counters.moved, counters.replayed, counters.lost) == (3, 2, 1)
    assert rig.client.rank_counters[0].moved_away == 3
    (failed,) = [outcome for outcome in rig.outcomes() if isinstance(outcome, Failed)]
    assert failed.error.retryable


def test_what_an_old_link_still_delivers_reaches_no_request_that_has_moved() -> None:
    rig = Moves(1)
    rig.ask("a")
    old = rig.kill(0)
    rig.receive(old, outputs_of(tokens("a", 99)))
    assert rig.outcomes() == []


def outputs_of(*parts: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutputs

    return EngineCoreOutputs(outputs=list(parts))


# Repeating and comparing.


def repeated(shown: tuple[int, ...] = (5, 6, 7)) -> Moves:
    rig = Moves(1)
    rig.ask("a", seed=1)
    rig.answer(0, tokens("a", *shown))
    rig.kill(0)
    assert rig.links[0].sent[-1][1].prompt_token_ids == [1, 2, 3]
    rig.outcomes()
    return rig


def test_what_was_shown_is_left_out_and_what_is_new_comes_through() -> None:
    rig = repeated()
    for token in (5, 6, 7, 8):
        rig.answer(0, tokens("a", token))
    assert rig.new_tokens() == [[8]]


def test_an_output_that_is_half_new_is_cut_with_its_logprobs() -> None:
    rig = repeated()
    rig.answer(0, tokens("a", 5, 6))
    rig.answer(0, tokens("a", 7, 8, 9, new_logprobs=logprobs(3)))
    ((part,),) = [outputs.outputs for outputs in rig.outcomes()]
    assert part.new_token_ids == [8, 9]
    assert part.new_logprobs.sampled_token_ranks.tolist() == [1, 2]


def test_an_answer_that_is_another_one_ends_with_an_error_and_is_stopped() -> None:
    rig = repeated()
    rig.answer(0, tokens("a", 5, 99))
    (reason,) = rig.reasons()
    assert "it was answered differently on rank 0 at token 2" in reason
    assert rig.links[0].aborted == ["a"]
    assert (rig.client.unfinished, rig.client.load[0]) == (0, 0)


def test_an_answer_that_ends_where_it_had_gone_on_is_another_one() -> None:
    rig = repeated()
    rig.answer(0, tokens("a", 5, 6, ends="stop"))
    assert "differently on rank 0 at token 2, where it ended" in rig.reasons()[0]


def test_a_repeated_request_whose_rank_dies_too_is_compared_from_the_start_again() -> None:
    rig = repeated()
    rig.answer(0, tokens("a", 5, 6))
    rig.down(0, blame=False)
    rig.up(0, 2)
    rig.answer(0, tokens("a", 5, 6, 7, 8, ends="length"))
    assert rig.new_tokens() == [[8]]
    assert rig.client.unfinished == 0


# Ranks that abort.


async def test_a_request_that_an_ending_rank_aborts_goes_on_elsewhere() -> None:
    rig = Moves(2)
    rig.ask("a")
    rank = rig.holder("a")
    rig.answer(rank, tokens("a", 5))
    rig.answer(rank, tokens("a", ends="abort"))
    rig.down(rank)
    assert rig.links[1 - rank].sent[-1][1].prompt_token_ids == [1, 2, 3, 5]
    assert rig.new_tokens() == [[5]]


async def test_a_request_that_is_aborted_by_a_call_ends() -> None:
    rig = Moves(1)
    rig.ask("a")
    call = asyncio.create_task(rig.client.call("pause_scheduler"))
    await sent(rig, 1)
    rig.answer(0, tokens("a", ends="abort"))
    assert [str(part.finish_reason) for outputs in rig.outcomes() for part in outputs.outputs] == ["abort"]
    assert rig.client.unfinished == 0
    rig.reply(0)
    await call


# Whom a death is blamed on.


def test_a_request_that_two_ranks_die_of_is_kept_from_a_third() -> None:
    rig = Moves(3)
    rig.add("a")
    rig.down(rig.holder("a"))
    rig.down(rig.holder("a"))
    (reason,) = rig.reasons()
    assert reason.startswith("request a was in flight on 2 ranks that died, and is kept from a third: rank ")
    assert reason.count("SIGKILL(-9)") == 2
    assert (rig.client.counters.poisoned, rig.client.unfinished) == (1, 0)
    assert rig.told(Kind.POISONED) == [reason]


def test_deaths_that_were_asked_for_do_not_count() -> None:
    rig = Moves(1)
    rig.add("a")
    for _ in range(3):
        rig.down(0, blame=False)
        rig.up(0)
    assert rig.reasons() == []
    assert rig.links[0].added == ["a"]


def test_what_had_shown_nothing_is_tried_alone_and_does_not_take_the_others_with_it() -> None:
    rig = Moves(1)
    rig.add("a", "b", "c")
    rig.kill(0)
    assert rig.links[0].added == ["a"]
    assert rig.client.queued == 2
    rig.kill(0)  # of a
    assert [outcome.request_id for outcome in rig.outcomes()] == ["a"]
    assert rig.links[0].added == ["b"]
    rig.answer(0, tokens("b", 1, ends="length"))
    assert rig.links[0].added == ["b", "c"]


def test_a_request_that_has_gone_on_for_a_while_is_past_suspicion() -> None:
    rig = Moves(1)
    rig.ask("a", max_tokens=100)
    rig.answer(0, tokens("a", 5))
    rig.kill(0)
    for _ in range(PAST):
        rig.answer(0, tokens("a", 5))
    rig.kill(0)
    assert rig.reasons() == []
    assert rig.links[0].added == ["a"]


def test_the_count_of_all_deaths_stops_a_request_that_ranks_die_of_later_and_later() -> None:
    rig = Moves(1)
    rig.ask("a", max_tokens=100)
    for _ in range(3):
        assert rig.client.unfinished == 1
        for _ in range(PAST):
            rig.answer(0, tokens("a", 5))
        rig.kill(0)
    assert rig.client.counters.poisoned == 1


def test_what_waits_in_the_engine_behind_a_full_house_is_no_suspect() -> None:
    rig = Moves(1)
    rig.client.know_engines(EngineTraits(slots=2))
    rig.add("a", "b", "c", "d")
    rig.answer(0, output("a"))
    rig.kill(0)
    # a had begun, b was being looked at and is tried alone, when the others are through.
    assert rig.links[0].added == ["a", "c", "d"]


async def test_ranks_that_die_together_do_not_get_each_others_requests() -> None:
    rig = Moves(3)
    rig.client = GroupClient(FakeCodec(), settle_s=0.01)
    for rank in range(3):
        rig.up(rank)
    rig.add("a", "b", "c")
    first, second = sorted(rig.links)[:2]
    rig.down(first)
    rig.down(second)
    (last,) = rig.links.values()
    async with asyncio.timeout(30):
        while len(last.added) < 2:
            await asyncio.sleep(0.01)
    assert rig.client.counters.poisoned == 0


def test_the_text_of_a_poisoned_request_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    kept = tmp_path / "poison.jsonl"
    rig = Moves(1, max_failures=1, poison_file=kept)
    rig.add("a")
    rig.kill(0)
    assert kept.stat().st_mode & 0o777 == 0o600
    line = json.loads(kept.read_text())
    assert line["prompt_token_ids"] == [1, 2, 3]
    assert "in flight on a rank that died" in line["error"]
    assert str(kept) in rig.told(Kind.POISONED)[0]


# A full group.


def test_a_request_beyond_the_bound_is_refused_and_said_once() -> None:
    rig = Moves(1, max_queue=2)
    rig.add("a", "b")
    for _ in range(3):
        with pytest.raises(RequestError, match="the group is full: 2 requests are in it") as caught:
            rig.add("c")
        assert caught.value.retryable
    assert rig.client.counters.refused == 3
    assert len(rig.told(Kind.REFUSED)) == 1
    rig.client.abort(["a"])
    rig.add("c")
    assert rig.client.unfinished == 2


# Ranks that leave.


def test_a_rank_that_retires_gets_nothing_new_until_its_next_incarnation() -> None:
    rig = Moves(2)
    rig.client.retire(0)
    rig.add("a", "b")
    rig.add("pinned", rank=0)
    assert rig.links[0].added == []
    assert rig.client.ranks == [1]
    assert rig.client.load == {0: 0, 1: 2}
    rig.down(0, blame=False)
    assert rig.up(0, 1).added == ["pinned"]


async def test_a_rank_is_idle_when_its_last_request_has_ended() -> None:
    rig = Moves(2)
    rig.add("a", "b", rank=0)
    waiting = asyncio.create_task(rig.client.idle(0))
    rig.answer(0, output("a", ends=True))
    await asyncio.sleep(0)
    assert not waiting.done()
    rig.client.abort(["b"])
    await asyncio.wait_for(waiting, 30)
    await rig.client.idle(1)


async def test_waiting_for_an_idle_rank_ends_with_the_group() -> None:
    rig = Moves(1)
    rig.add("a")
    waiting = asyncio.create_task(rig.client.idle(0))
    await asyncio.sleep(0)
    rig.client.die(GroupDeadError("gone"))
    await asyncio.wait_for(waiting, 30)
    assert rig.client.counters.lost == 1


def test_requests_pinned_to_a_rank_that_was_taken_away_fail_until_it_is_there_again() -> None:
    rig = Moves(2)
    rig.down(1, blame=False)
    rig.client.forget(1)
    rig.add("a", rank=1)
    assert rig.reasons() == ["the request was lost: it is pinned to rank 1, which does not come back"]
    rig.up(1)
    rig.add("b", rank=1)
    assert rig.links[1].added == ["b"]


# What is counted.


def test_what_ranks_do_is_counted() -> None:
    rig = Moves(1)
    rig.add("a", "b", "c")
    rig.answer(0, tokens("a", 5, 6), tokens("b", 7, ends="length"))
    rig.client.abort(["c"])
    counters = rig.client.counters
    assert (counters.accepted, counters.finished, counters.aborted) == (3, 1, 1)
    assert (rig.client.rank_counters[0].tokens, rig.client.rank_counters[0].finished) == (3, 1)


async def test_a_rank_is_at_a_call_since_the_first_was_sent_but_for_the_question_whether_it_is_there() -> None:
    rig = Moves(1)
    link = cast(RankLink, rig.links[0])
    calls = [asyncio.create_task(rig.client.call_link(link, "dplaunch_ping"))]
    await sent(rig, 1)
    assert rig.client.calling_since(link) is None
    calls.append(asyncio.create_task(rig.client.call_link(link, "sleep")))
    await sent(rig, 2)
    first = rig.client.calling_since(link)
    assert first is not None
    assert first <= time.monotonic()
    calls.append(asyncio.create_task(rig.client.call_link(link, "wake_up")))
    await sent(rig, 3)
    assert rig.client.calling_since(link) == first
    rig.client.die(GroupDeadError("gone"))
    await asyncio.gather(*calls, return_exceptions=True)


def test_a_rank_is_heard_with_every_message() -> None:
    rig = Moves(1)
    link = cast(RankLink, rig.links[0])
    assert rig.client.heard(link) == 0.0
    rig.answer(0)
    assert rig.client.heard(link) > 0.0
