"""The data path: routing, the in-flight table, utility calls. Links are stand-ins, messages are vLLM's own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from dplaunch.client import GroupClient
from dplaunch.errors import DplaunchError, GroupClosedError, GroupDeadError, UsageError
from dplaunch.inflight import Failed
from dplaunch.link import RankLink
from dplaunch.seam import frontend, wire

MOST_TOKENS = 16
"""Of an answer, by vLLM's defaults."""


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """Imported with os.environ left as it was."""
    frontend.import_vllm(quiet=True)


class FakeLink:
    """Keeps what was sent."""

    def __init__(self, rank: int, incarnation: int = 0) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.closed = False
        self.heard = 0.0
        self.sent: list[tuple[bytes, Any]] = []

    def send(self, kind: bytes, frames: Sequence[Any]) -> None:
        if not self.closed:
            self.sent.append((kind, frames[0]))

    @property
    def added(self) -> list[str]:
        """The ids of the requests that it was sent."""
        return [message.request_id for kind, message in self.sent if kind == wire.ADD]

    @property
    def aborted(self) -> list[str]:
        """The ids that it was told to abort."""
        return [request_id for kind, ids in self.sent if kind == wire.ABORT for request_id in ids]

    def calls(self) -> list[tuple[int, str, tuple[Any, ...]]]:
        """The utility calls: id, method, arguments."""
        return [message[1:] for kind, message in self.sent if kind == wire.UTILITY]


class Frame:
    """A message that was never bytes."""

    buffer = b""

    def __init__(self, message: Any) -> None:
        self.message = message


class FakeCodec:
    """Leaves messages as they are."""

    def encode(self, message: Any) -> Sequence[Any]:
        return [message]

    def decode(self, frames: Sequence[Any]) -> Any:
        return frames[0].message


class Rig:
    """A client and its links."""

    def __init__(self, ranks: int, **options: Any) -> None:
        self.engine_errors: list[int] = []
        self.client = GroupClient(FakeCodec(), self.engine_errors.append, **options)
        self.links: dict[int, FakeLink] = {}
        for rank in range(ranks):
            self.up(rank)

    def up(self, rank: int, incarnation: int = 0) -> FakeLink:
        """A new incarnation takes requests."""
        link = self.links[rank] = FakeLink(rank, incarnation)
        self.client.up(cast(RankLink, link))
        return link

    def down(self, rank: int, *, blame: bool = True) -> FakeLink:
        """A rank dies, as the supervisor sees it: down, then the sockets are closed."""
        link = self.links.pop(rank)
        self.client.down(cast(RankLink, link), "SIGKILL(-9)", blame=blame)
        link.closed = True
        return link

    def add(self, *request_ids: str, rank: int | None = None) -> None:
        """Sends plain requests."""
        for request_id in request_ids:
            self.client.add(request(request_id, rank=rank))

    def answer(self, rank: int, *parts: Any, **fields: Any) -> None:
        """A message from a rank's engine."""
        from vllm.v1.engine import EngineCoreOutputs

        self.receive(self.links[rank], EngineCoreOutputs(outputs=list(parts), **fields))

    def receive(self, link: FakeLink, message: Any) -> None:
        """A message that comes out of a link."""
        self.client.on_output(cast(RankLink, link), [Frame(message)])

    def reply(self, rank: int, result: Any = None, failure: str | None = None, link: FakeLink | None = None) -> None:
        """A rank's answer to the last utility call that it got."""
        from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
        from vllm.v1.serial_utils import UtilityResult

        link = link or self.links[rank]
        answer = UtilityOutput(link.calls()[-1][0], failure, None if failure else UtilityResult(result))
        self.receive(link, EngineCoreOutputs(utility_output=answer))

    def outcome(self) -> Any:
        """The next thing that the frontend gets."""
        return self.client.outputs.get_nowait()

    def failed(self) -> list[str]:
        """The ids of the requests that ended with an error, among all that the frontend gets now."""
        return [outcome.request_id for outcome in self.outcomes() if isinstance(outcome, Failed)]

    def outcomes(self) -> list[Any]:
        """All that the frontend gets now."""
        return [self.outcome() for _ in range(self.client.outputs.qsize())]


def request(request_id: str, *, rank: int | None = None, **fields: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=rank,
        **fields,
    )


def output(request_id: str, *, ends: bool = False) -> Any:
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    return EngineCoreOutput(request_id, [5], finish_reason=FinishReason.LENGTH if ends else None)


def late_interaction(request_id: str, key: str) -> Any:
    from vllm import PoolingParams
    from vllm.v1.pool.late_interaction import build_late_interaction_doc_params

    pooling = PoolingParams(task="embed", late_interaction_params=build_late_interaction_doc_params(key))
    made = request(request_id)
    made.sampling_params, made.pooling_params = None, pooling
    return made


# Routing.


def test_ties_go_round_so_that_a_quiet_group_uses_every_rank() -> None:
    rig = Rig(3)
    for number in range(6):
        rig.add(f"r{number}")
        rank = next(rank for rank, link in rig.links.items() if f"r{number}" in link.added)
        rig.answer(rank, output(f"r{number}", ends=True))
    assert [len(link.added) for link in rig.links.values()] == [2, 2, 2]
    assert rig.client.unfinished == 0


def test_a_request_goes_to_the_rank_with_the_fewest_in_flight() -> None:
    rig = Rig(2)
    rig.add("a", "b", "c", rank=0)
    rig.add("d", "e", "f")
    assert rig.links[1].added == ["d", "e", "f"]
    assert rig.client.load == {0: 3, 1: 3}


def test_a_finished_request_no_longer_counts_as_load() -> None:
    rig = Rig(2)
    rig.add("a", "b", rank=0)
    rig.answer(0, output("a"))
    assert rig.client.load == {0: 2, 1: 0}
    rig.answer(0, output("a", ends=True), output("b", ends=True))
    assert rig.client.load == {0: 0, 1: 0}
    assert rig.client.unfinished == 0


@pytest.mark.parametrize("gathers", [False, True])
def test_what_is_left_of_a_batch_of_equal_answers_is_shared_though_one_rank_ends_first(gathers: bool) -> None:
    rig = Rig(2, gathers=gathers, places=8)
    rig.add(*(f"a{number}" for number in range(24)))
    running = [link.added[:8] for link in rig.links.values()]
    for rank, names in enumerate(running):
        for _ in range(MOST_TOKENS - 1):
            rig.answer(rank, *(output(name) for name in names))
    rig.answer(0, *(output(name, ends=True) for name in running[0]))
    rig.add(*(f"b{number}" for number in range(8)))
    # The first four begin at once, and then rank 1 has as many places: in a moment.
    assert [len(link.added) for link in rig.links.values()] == [16, 16]
    rig.answer(1, *(output(name, ends=True) for name in running[1]))
    assert rig.client.load == {0: 8, 1: 8}


def test_while_places_are_free_a_rank_whose_requests_are_about_to_end_gets_no_more_than_the_others() -> None:
    rig = Rig(2, places=8)
    rig.add("a", "b", "c", "d")
    assert [sorted(link.added) for link in rig.links.values()] == [["a", "c"], ["b", "d"]]
    for _ in range(MOST_TOKENS - 1):
        rig.answer(0, output("a"), output("c"))
        rig.answer(1, output("b"), output("d"))
    rig.answer(0, output("a", ends=True), output("c", ends=True))
    rig.add("e", "f")
    assert rig.client.load == {0: 2, 1: 2}


def test_requests_that_were_about_to_end_and_move_are_like_any_other_on_their_next_rank() -> None:
    rig = Rig(1)
    rig.add("a", "b")
    for _ in range(MOST_TOKENS - 1):
        rig.answer(0, output("a"), output("b"))
    rig.up(1)
    rig.down(0)
    rig.up(0, 1)
    assert rig.client.load == {0: 0, 1: 2}
    rig.add("c", "d")
    assert rig.client.load == {0: 2, 1: 2}
    rig.client.abort(["a", "b", "c", "d"])
    rig.add("e", "f")
    assert rig.client.load == {0: 1, 1: 1}


def test_an_end_that_is_told_twice_counts_once() -> None:
    rig = Rig(1)
    rig.add("a", "b")
    rig.answer(0, output("a", ends=True), finished_requests={"a"})
    rig.answer(0, output("a", ends=True))
    assert rig.client.load == {0: 1}


def test_a_pinned_request_goes_to_its_rank_however_busy_that_is() -> None:
    rig = Rig(2)
    rig.add("a", "b", "c", rank=1)
    assert rig.links[1].added == ["a", "b", "c"]
    assert rig.links[0].added == []


def test_queries_that_share_a_cached_embedding_go_to_one_rank() -> None:
    rig = Rig(3)
    for number in range(6):
        rig.client.add(late_interaction(f"r{number}", "the same query"))
    assert sorted(len(link.added) for link in rig.links.values()) == [0, 0, 6]


def test_outputs_carry_the_rank_that_they_came_from() -> None:
    rig = Rig(2)
    rig.add("a", rank=1)
    rig.answer(1, output("a"))
    outputs = rig.outcome()
    assert outputs.engine_index == 1
    assert [part.request_id for part in outputs.outputs] == ["a"]


def test_a_message_that_says_nothing_does_not_wake_the_frontend() -> None:
    rig = Rig(1)
    rig.answer(0)
    assert rig.outcomes() == []


# Without a rank.


def test_requests_wait_while_no_rank_is_up_and_keep_their_order() -> None:
    rig = Rig(0)
    rig.add("a", "b", "c")
    assert rig.client.unfinished == 3
    assert rig.up(0).added == ["a", "b", "c"]


def test_a_pinned_request_waits_for_its_rank_while_others_are_up() -> None:
    rig = Rig(2)
    rig.down(1)
    rig.add("a", rank=1)
    assert rig.links[0].added == []
    rig.up(1, incarnation=1)
    assert rig.links[1].added == ["a"]


def test_a_request_that_is_pinned_to_a_rank_that_never_comes_back_fails_by_name() -> None:
    rig = Rig(2)
    rig.down(1)
    rig.add("waits", rank=1)
    rig.client.gone(1)
    rig.add("late", rank=1)
    rig.add("free")
    assert rig.failed() == ["waits", "late"]
    assert rig.links[0].added == ["free"]
    assert rig.client.unfinished == 1


def test_a_request_that_is_pinned_to_a_rank_that_does_not_come_back_fails_now_and_later() -> None:
    rig = Rig(2)
    rig.down(1)
    rig.add("a", rank=1)
    rig.add("b", rank=0)
    rig.client.gone(1)
    rig.add("c", rank=1)
    assert rig.failed() == ["a", "c"]
    assert rig.client.unfinished == 1
    assert rig.links[0].added == ["b"]


def test_what_waits_for_any_rank_goes_on_waiting_when_one_is_given_up() -> None:
    rig = Rig(0)
    rig.add("a")
    rig.client.gone(1)
    assert rig.outcomes() == []
    assert rig.up(0).added == ["a"]


# Aborts.


def test_an_abort_goes_to_the_rank_that_has_the_request() -> None:
    rig = Rig(2)
    rig.add("a", rank=0)
    rig.add("b", "c", rank=1)
    rig.client.abort(["a", "c"])
    assert rig.links[0].aborted == ["a"]
    assert rig.links[1].aborted == ["c"]


def test_an_aborted_request_is_gone_at_once_because_no_rank_answers_an_abort() -> None:
    rig = Rig(1)
    rig.add("a")
    rig.client.abort(["a"])
    assert rig.client.unfinished == 0
    assert rig.client.load == {0: 0}
    rig.answer(0, output("a", ends=True))  # was under way
    assert rig.client.load == {0: 0}


def test_an_abort_of_an_unknown_request_is_ignored() -> None:
    rig = Rig(1)
    rig.client.abort(["never seen"])
    assert rig.links[0].sent == []


def test_an_abort_of_a_waiting_request_takes_it_out() -> None:
    rig = Rig(0)
    rig.add("a", "b")
    rig.client.abort(["a"])
    assert rig.up(0).added == ["b"]
    assert rig.links[0].aborted == []


def test_a_request_that_is_sent_to_be_aborted_leaves_nothing_behind() -> None:
    rig = Rig(1)
    rig.client.add(request("a", abort_immediately=True))
    assert rig.links[0].added == ["a"]
    assert rig.client.unfinished == 0
    assert rig.client.load == {0: 0}


# A rank that dies.


def test_what_has_shown_no_output_is_sent_to_another_rank() -> None:
    rig = Rig(2)
    rig.add("a", "b", rank=None)
    (mine,) = rig.links[1].added
    rig.down(1)
    assert mine in rig.links[0].added
    assert rig.outcomes() == []
    assert rig.client.load == {0: 2}


def test_what_has_begun_to_answer_goes_on_elsewhere_with_its_tokens_behind_the_prompt() -> None:
    rig = Rig(2)
    rig.add("a", "b", rank=1)
    rig.client.add(request("c", rank=0))
    rig.client.add(request("d"))
    rank = next(rank for rank in (0, 1) if "d" in rig.links[rank].added)
    rig.answer(rank, output("d"))
    old = rig.down(rank)
    assert rig.failed() == []
    again = rig.links[1 - rank].sent[-1][1]
    assert (again.request_id, again.prompt_token_ids, again.sampling_params.max_tokens) == ("d", [1, 2, 3, 5], 15)
    assert old.sent[-1][1].prompt_token_ids == [1, 2, 3]
    assert rig.client.counters.moved == len(old.added)


def test_with_the_last_rank_gone_what_can_wait_waits_for_the_next() -> None:
    rig = Rig(1)
    rig.add("a", "b")
    rig.down(0, blame=False)
    assert rig.up(0, incarnation=1).added == ["a", "b"]
    assert rig.client.load == {0: 2}


def test_a_link_that_went_down_late_does_not_take_its_successor_with_it() -> None:
    rig = Rig(1)
    old = rig.links[0]
    rig.up(0, incarnation=1)
    rig.client.down(cast(RankLink, old), "late news")
    assert rig.client.ranks == [0]


def test_an_engine_that_says_it_is_dead_is_reported_and_is_no_output() -> None:
    rig = Rig(2)
    frame = Frame(None)
    frame.buffer = wire.ENGINE_DEAD
    rig.client.on_output(cast(RankLink, rig.links[1]), [frame])
    assert rig.engine_errors == [1]
    assert rig.outcomes() == []


# Sessions whose input comes in parts.


def test_the_parts_of_a_session_go_to_one_rank() -> None:
    rig = Rig(2)
    rig.client.add(request("s", resumable=True))
    (holder,) = [link for link in rig.links.values() if link.added]
    rig.add("x", "y", "z")
    rig.client.add(request("s", resumable=True))
    assert holder.added.count("s") == 2
    assert rig.client.unfinished == 4


def test_a_session_ends_when_every_part_is_answered_and_no_more_follow() -> None:
    rig = Rig(1)
    rig.client.add(request("s", resumable=True))
    rig.answer(0, output("s", ends=True))
    assert rig.client.load == {0: 1}  # more may follow
    rig.client.add(request("s", resumable=True))
    rig.client.add(request("s"))
    assert rig.client.load == {0: 1}
    rig.answer(0, output("s", ends=True))
    assert rig.client.load == {0: 0}


def test_a_session_that_is_closed_while_idle_ends_at_once() -> None:
    rig = Rig(1)
    rig.client.add(request("s", resumable=True))
    rig.answer(0, output("s", ends=True))
    rig.client.add(request("s"))
    assert rig.links[0].added == ["s", "s"]
    assert rig.client.unfinished == 0


def test_a_session_that_moves_takes_all_its_parts_along() -> None:
    rig = Rig(1)
    first, second = request("s", resumable=True), request("s", resumable=True)
    rig.client.add(first)
    rig.client.add(second)
    rig.down(0)
    third = request("s")
    rig.client.add(third)
    link = rig.up(0, incarnation=1)
    assert [message for _, message in link.sent] == [first, second, third]


def test_a_session_that_was_lost_stays_lost_until_it_ends() -> None:
    rig = Rig(2)
    rig.client.add(request("s", rank=1, resumable=True))
    rig.answer(1, output("s"))
    rig.down(1)
    rig.client.add(request("s", resumable=True))  # the user has not heard of it yet
    rig.client.add(request("s"))
    assert rig.failed() == ["s"] * 3
    assert rig.links[0].added == []
    assert rig.client.unfinished == 0
    rig.client.add(request("s"))  # another one that happens to have its name
    assert rig.links[0].added == ["s"]


# Utility calls.


async def test_a_call_to_all_is_answered_by_each_in_rank_order() -> None:
    rig = Rig(3)
    call = asyncio.create_task(rig.client.call("list_loras", 7))
    await sent(rig, 3)
    for rank in (2, 0, 1):
        assert rig.links[rank].calls()[0][1:] == ("list_loras", (7,))
        rig.reply(rank, f"from {rank}")
    assert await call == ["from 0", "from 1", "from 2"]


async def test_a_call_to_one_rank_reaches_that_one_alone() -> None:
    rig = Rig(2)
    call = asyncio.create_task(rig.client.call("is_sleeping", rank=1))
    await sent(rig, 1)
    rig.reply(1, False)
    assert await call == [False]
    assert rig.links[0].sent == []


async def test_a_call_to_a_rank_that_is_down_names_those_that_are_up() -> None:
    rig = Rig(2)
    rig.down(1)
    with pytest.raises(UsageError, match="rank 1 is not up") as caught:
        await rig.client.call("is_sleeping", rank=1)
    assert "[0]" in caught.value.hint


async def test_a_method_that_fails_in_a_rank_names_the_rank_and_what_it_said() -> None:
    rig = Rig(2)
    call = asyncio.create_task(rig.client.call("add_lora"))
    await sent(rig, 2)
    rig.reply(0, True)
    rig.reply(1, failure="no such adapter")
    with pytest.raises(RuntimeError, match="rank 1: no such adapter"):
        await call


async def test_a_call_ends_when_its_rank_dies() -> None:
    rig = Rig(2)
    call = asyncio.create_task(rig.client.call("add_lora"))
    await sent(rig, 2)
    rig.reply(0, True)
    rig.down(1)
    with pytest.raises(GroupDeadError, match=r"rank 1 .*SIGKILL\(-9\)"):
        await call


async def test_a_call_over_a_link_that_has_closed_does_not_wait_for_ever() -> None:
    rig = Rig(1)
    link = rig.down(0)
    with pytest.raises(GroupDeadError, match="rank 0"):
        await rig.client.call_link(cast(RankLink, link), "dplaunch_report")


async def test_a_call_without_any_rank_waits_for_the_next() -> None:
    rig = Rig(0)
    call = asyncio.create_task(rig.client.call("is_sleeping"))
    await asyncio.sleep(0)
    assert not call.done()
    rig.up(0)
    await sent(rig, 1)
    rig.reply(0, True)
    assert await call == [True]


async def test_an_answer_whose_caller_has_gone_is_dropped() -> None:
    rig = Rig(1)
    call = asyncio.create_task(rig.client.call("is_sleeping"))
    await sent(rig, 1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    rig.reply(0, True)
    assert rig.outcomes() == []


async def test_a_call_that_returns_nothing_gives_none() -> None:
    rig = Rig(1)
    call = asyncio.create_task(rig.client.call("wake_up"))
    await sent(rig, 1)
    rig.reply(0, None)
    assert await call == [None]


async def sent(rig: Rig, count: int) -> None:
    """Lets the loop run until this many utility calls are out."""
    async with asyncio.timeout(5):
        while sum(len(link.calls()) for link in rig.links.values()) < count:
            await asyncio.sleep(0)


# The end.


async def test_death_ends_everything_with_the_root_cause() -> None:
    rig = Rig(1)
    rig.add("a")
    call = asyncio.create_task(rig.client.call("is_sleeping"))
    await sent(rig, 1)
    error = GroupDeadError("all ranks are gone")
    rig.client.die(error)
    assert rig.outcomes() == [error]
    assert rig.client.unfinished == 0
    for attempt in (call, rig.client.call("is_sleeping"), rig.client.call_link(cast(RankLink, rig.links[0]), "x")):
        with pytest.raises(GroupDeadError) as caught:
            await attempt
        assert caught.value is error
    with pytest.raises(GroupDeadError):
        rig.add("b")


async def test_a_call_that_waits_for_a_rank_ends_with_the_group() -> None:
    rig = Rig(0)
    call = asyncio.create_task(rig.client.call("is_sleeping"))
    await asyncio.sleep(0)
    rig.client.die(GroupClosedError("closed"))
    with pytest.raises(GroupClosedError):
        await asyncio.wait_for(call, 5)


def test_a_second_death_does_not_replace_the_root_cause() -> None:
    rig = Rig(0)
    first: DplaunchError = GroupDeadError("first")
    rig.client.die(first)
    rig.client.die(GroupDeadError("second"))
    assert rig.client.dead is first
    assert rig.outcomes() == [first]
