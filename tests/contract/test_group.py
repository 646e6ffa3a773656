"""What a group keeps on every backend, once its ranks are ready."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from typing import Any

import pytest

from dplaunch.errors import GroupClosedError, GroupDeadError, RequestError
from dplaunch.spec import RestartPolicy
from dplaunch.testing import Fault, StandInPlan, When, expected_tokens, poll_until_async
from tests.contract.conftest import Launch

SLOW = StandInPlan(token_delay_s=0.02)
"""So slow that a request is still in flight when the test has seen it."""


def params(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, detokenize=False)


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


async def test_every_rank_is_who_it_should_be_seen_from_inside(launch: Launch) -> None:
    watched = await launch(dp=3)
    group = watched.group
    reports = await group.call("dplaunch_report")
    assert [report["instance_id"] for report in reports] == [f"contract_dp{rank}" for rank in range(3)]
    assert [report["data_parallel_index"] for report in reports] == [0, 1, 2]
    for report, spec in zip(reports, group.plan.ranks, strict=True):
        assert tuple(report["cpus"]) == spec.cpus
        assert report["process_title"].startswith(f"dplaunch::contract_dp{report['rank']}")


async def test_a_kv_connectors_engine_id_has_the_same_suffix_once(launch: Launch) -> None:
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "engine_id": "kv_dp7"}
    watched = await launch(dp=2, engine_args={"kv_transfer_config": connector})
    reports = await watched.group.call("dplaunch_report")
    assert [report["engine_id"] for report in reports] == ["kv_dp0", "kv_dp1"]


async def test_the_only_rank_of_a_group_keeps_its_plain_name(launch: Launch) -> None:
    watched = await launch(dp=1)
    (report,) = await watched.group.call("dplaunch_report")
    assert report["instance_id"] == "contract"


async def test_two_hundred_answers_come_in_order_and_complete_from_all_ranks(launch: Launch) -> None:
    group = (await launch(dp=3)).group
    prompts = [[index + 1, 7, index % 13] for index in range(200)]
    outputs = await group.generate(prompts, params(12))
    assert [tokens(output) for output in outputs] == [expected_tokens(prompt, 12) for prompt in prompts]
    assert group.client.unfinished == 0
    assert dict(group.client.load) == {0: 0, 1: 0, 2: 0}


@pytest.mark.parametrize("internal", [True, False], ids=["by vLLM's name", "by the caller's name"])
@pytest.mark.parametrize("count", [1, 2], ids=["one answer", "two answers"])
async def test_an_aborted_answer_has_every_token_that_came(launch: Launch, internal: bool, count: int) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    group = (await launch(StandInPlan(token_delay_s=0.005), dp=1)).group
    asked = SamplingParams(n=count, max_tokens=1000, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)

    async def ask() -> list[Any]:
        return [output async for output in group.engine.generate({"prompt_token_ids": [1, 2, 3]}, asked, "mine")]

    asking = asyncio.create_task(ask())
    # No multiple of what the frontend gets at a time.
    await poll_until_async(lambda: group.client.rank_counters[0].tokens >= 90 * count, what="tokens")
    came = group.client.rank_counters[0].tokens
    await group.engine.abort(next(iter(group.engine.output_processor.request_states)) if internal else "mine", internal)
    if internal and count > 1:
        await group.engine.abort("mine")
    *_, last = await asking
    answers = [list(answer.token_ids) for answer in last.outputs]
    assert [answer.finish_reason for answer in last.outputs] == ["abort"] * count
    assert answers == [expected_tokens([1, 2, 3], len(answer)) for answer in answers]
    assert sum(map(len, answers)) >= came
    assert group.client.unfinished == 0


async def test_a_pinned_batch_stays_on_its_rank(launch: Launch) -> None:
    # Rank 0 would die of it.
    plan = StandInPlan(faults={(0, 0): Fault(when=When.REQUEST, returncode=3)})
    watched = await launch(plan)
    outputs = await watched.group.generate([[1]] * 6, params(4), data_parallel_rank=1)
    assert [tokens(output) for output in outputs] == [expected_tokens([1], 4)] * 6
    assert watched.states(0) == [("starting", 0), ("ready", 0)]


async def test_a_call_reaches_every_rank_or_the_one_that_is_named(launch: Launch) -> None:
    group = (await launch(dp=3)).group
    assert await group.call("echo", 5) == [5, 5, 5]
    assert [report["rank"] for report in await group.call("dplaunch_report", rank=2)] == [2]


async def test_a_call_that_fails_names_the_rank_and_says_why(launch: Launch) -> None:
    group = (await launch()).group
    with pytest.raises(RuntimeError, match=r"rank 1: Call to no_such_call method failed"):
        await group.call("no_such_call", rank=1)
    assert await group.call("echo", 1) == [1, 1]


async def test_a_cancelled_batch_is_aborted_and_leaves_the_group_usable(launch: Launch) -> None:
    group = (await launch(SLOW)).group
    batch = asyncio.create_task(group.generate([[1], [2], [3]], params(400)))
    await poll_until_async(lambda: group.client.unfinished == 3)
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    await poll_until_async(lambda: group.client.unfinished == 0)
    (output,) = await group.generate([[4]], params(3))
    assert tokens(output) == expected_tokens([4], 3)


async def test_a_rank_that_dies_while_serving_comes_back_and_the_others_never_notice(launch: Launch) -> None:
    death = Fault(when=When.REQUEST, nth=5, returncode=-signal.SIGKILL)
    watched = await launch(StandInPlan(faults={(1, 0): death}), dp=3)
    group = watched.group
    pinned = asyncio.create_task(group.generate([[i] for i in range(1, 30)], params(30), data_parallel_rank=0))
    prompts = [[index + 1] for index in range(60)]
    outputs = await group.generate(prompts, params(30), on_error="return")
    assert [tokens(output) for output in await pinned] == [expected_tokens([i], 30) for i in range(1, 30)]
    for prompt, output in zip(prompts, outputs, strict=True):
        # One that had begun to answer may be lost, by name; no answer is ever another than it would have been.
        if isinstance(output, RequestError):
            assert output.retryable
        else:
            assert tokens(output) == expected_tokens(prompt, 30)
    await poll_until_async(lambda: group.client.ranks == [0, 1, 2], what="the return of rank 1")
    assert watched.states(1) == [("starting", 0), ("ready", 0), ("down", 0), ("starting", 1), ("ready", 1)]
    assert watched.states(0) == watched.states(2) == [("starting", 0), ("ready", 0)]
    report = (await group.call("dplaunch_report", rank=1))[0]
    assert (report["instance_id"], report["incarnation"]) == ("contract-r1_dp1", 1)
    assert any("SIGKILL(-9)" in event.message and event.rank == 1 for event in watched.events)


async def test_requests_that_have_shown_nothing_move_to_another_rank(launch: Launch) -> None:
    death = Fault(when=When.REQUEST, nth=3, returncode=-signal.SIGSEGV, token_delay_s=60.0)
    group = (await launch(StandInPlan(faults={(0, 0): death}))).group
    prompts = [[index + 1] for index in range(8)]
    outputs = await group.generate(prompts, params(10))
    assert [tokens(output) for output in outputs] == [expected_tokens(prompt, 10) for prompt in prompts]


async def test_what_an_old_incarnation_says_never_reaches_a_live_request(launch: Launch) -> None:
    import zmq

    from dplaunch.testing import wire

    death = Fault(when=When.REQUEST, nth=1, returncode=-signal.SIGKILL)
    watched = await launch(StandInPlan(faults={(0, 0): death}, token_delay_s=0.02), dp=1)
    group = watched.group
    old = group.supervisor.ranks[0].link
    assert old is not None
    with zmq.Context() as context, context.socket(zmq.PUSH) as ghost:
        ghost.setsockopt(zmq.LINGER, 0)
        ghost.connect(old._output_address)
        answer = asyncio.create_task(group.generate([[9]], params(20)))
        await poll_until_async(lambda: ("ready", 1) in watched.states(0), what="the next incarnation")
        (request_id,) = group.engine.output_processor.request_states
        forged = wire.encode_outputs([wire.Output(request_id, [1], finish_reason=wire.FINISH_STOP)])
        for _ in range(20):
            ghost.send(forged, zmq.NOBLOCK)
        (output,) = await answer
    assert tokens(output) == expected_tokens([9], 20)


async def test_a_rank_that_dies_again_and_again_is_given_up_and_the_group_goes_on(launch: Launch) -> None:
    plan = StandInPlan(faults={(1, n): Fault(when=When.AFTER_READY, returncode=4) for n in range(1, 9)})
    plan.faults[1, 0] = Fault(when=When.REQUEST, returncode=4)  # type: ignore[index]
    watched = await launch(plan, restart=RestartPolicy(limit=2, backoff_s=0.01))
    group = watched.group
    outputs = await group.generate([[index + 1] for index in range(6)], params(5), on_error="return")
    assert Counter(type(output).__name__ for output in outputs)["RequestOutput"] >= 3
    await poll_until_async(lambda: watched.states(1)[-1][0] == "failed", what="the end of rank 1")
    assert group.client.ranks == [0]
    assert not group.dead.done()
    (output,) = await group.generate([[3]], params(5))
    assert tokens(output) == expected_tokens([3], 5)


async def test_a_group_with_too_few_ranks_left_is_dead_and_says_of_what(launch: Launch) -> None:
    plan = StandInPlan(faults={(1, 0): Fault(when=When.REQUEST, returncode=9)})
    watched = await launch(plan, min_ranks=2, restart=RestartPolicy(limit=0))
    group = watched.group
    batch = asyncio.create_task(group.generate([[1], [2], [3], [4]], params(5), on_error="return"))
    error = await asyncio.wait_for(asyncio.shield(group.dead), 10)
    assert isinstance(error, GroupDeadError)
    text = str(error)
    for word in ("1 of 2 ranks", "rank 1", "exit code 9", "rank1.log", "ends on purpose"):
        assert word in text
    await batch
    with pytest.raises(GroupDeadError):
        group.client.add(None)


async def test_a_group_closes_with_requests_in_flight(launch: Launch) -> None:
    group = (await launch(SLOW)).group
    batch = asyncio.create_task(group.generate([[1], [2], [3]], params(400), on_error="return"))
    await poll_until_async(lambda: group.client.unfinished == 3)
    await asyncio.wait_for(group.close(), 10)
    results = await asyncio.wait_for(batch, 10)
    assert all(isinstance(result, Exception) for result in results)


async def test_a_rank_that_ignores_sigterm_is_killed_at_the_shutdown_deadline(launch: Launch) -> None:
    plan = StandInPlan(faults={(0, 0): Fault(ignore_sigterm=True)})
    watched = await launch(plan, shutdown_timeout_s=0.3)
    await asyncio.wait_for(watched.group.close(), 10)
    assert watched.states(0)[-1] == watched.states(1)[-1] == ("stopped", 0)


async def test_a_closed_group_says_so(launch: Launch) -> None:
    group = (await launch(dp=1)).group
    await group.close()
    await group.close()
    with pytest.raises(GroupClosedError):
        await group.generate([[1]], params(1))


async def test_two_groups_live_side_by_side(launch: Launch) -> None:
    first = await launch(dp=2)
    second = await launch(dp=2, base_id="other")
    mine, other = await asyncio.gather(
        first.group.generate([[1]] * 20, params(10)), second.group.generate([[2]] * 20, params(10))
    )
    assert {tuple(tokens(output)) for output in mine} == {tuple(expected_tokens([1], 10))}
    assert {tuple(tokens(output)) for output in other} == {tuple(expected_tokens([2], 10))}
    await first.group.close()
    assert await second.group.call("echo", 1) == [1, 1]
    assert (await second.group.call("dplaunch_report"))[1]["instance_id"] == "other_dp1"


async def test_the_same_group_is_launched_again_and_again(launch: Launch) -> None:
    for _ in range(3):
        group = (await launch(dp=2)).group
        (output,) = await group.generate([[5]], params(2))
        assert tokens(output) == expected_tokens([5], 2)
        await group.close()
