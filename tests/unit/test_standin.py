from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from dplaunch.backend import Exit
from dplaunch.testing import Fault, StandInPlan, When, expected_tokens, poll_until
from dplaunch.testing.fake_backend import FakeBackend, FakeRank
from dplaunch.testing.standin import LATE_TOKEN
from dplaunch.testing.tokens import RESERVED, VOCAB_SIZE
from tests.contract.boots import make_boot
from tests.contract.raw import RawLauncher

STOP, LENGTH, ABORT = 0, 1, 2

Start = Callable[..., Awaitable[FakeRank]]


@pytest.fixture
def launcher() -> Iterator[RawLauncher]:
    # Not tmp_path: the address of a unix socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="dpl") as directory, RawLauncher(Path(directory)) as raw:
        yield raw


@pytest.fixture
async def start(launcher: RawLauncher) -> AsyncIterator[Start]:
    backend = FakeBackend()

    async def spawn(plan: StandInPlan | None = None, **boot: object) -> FakeRank:
        return await backend.spawn(make_boot(launcher.address, plan=plan, **boot))  # type: ignore[arg-type]

    yield spawn
    await backend.close()


def test_an_answer_continues_the_same_wherever_it_is_cut() -> None:
    prompt = [5, 900, 77]
    whole = expected_tokens(prompt, 20)
    for cut in range(20):
        assert whole[:cut] + expected_tokens(prompt + whole[:cut], 20 - cut) == whole


def test_answers_differ_between_prompts_and_avoid_special_tokens() -> None:
    first, second = expected_tokens([1, 2], 50), expected_tokens([1, 3], 50)
    assert first != second
    assert all(RESERVED <= token < VOCAB_SIZE for token in first + second)


def test_the_engine_imports_neither_vllm_nor_torch() -> None:
    code = "import sys, dplaunch.testing.standin; print(sorted({'vllm', 'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_the_handshake_is_that_of_a_local_engine_core(launcher: RawLauncher, start: Start) -> None:
    await start()
    ready = launcher.handshake()
    launcher.wait_phase("warming")
    assert launcher.hello == {"status": "HELLO", "local": True, "headless": False}
    assert launcher.phases == ["importing", "loading", "warming"]
    assert ready["instance_id"] == "contract_dp3"
    assert (ready["data_parallel_rank"], ready["data_parallel_size"]) == (0, 1)


async def test_requests_are_answered_with_the_tokens_foretold(launcher: RawLauncher, start: Start) -> None:
    await start()
    launcher.handshake()
    launcher.add("a", [1, 2, 3], max_tokens=7)
    launcher.add("b", [9])
    a, b = launcher.finish("a", "b")
    assert (a.tokens, a.finish_reason) == (expected_tokens([1, 2, 3], 7), LENGTH)
    assert b.tokens == expected_tokens([9], 16)


async def test_an_answer_ends_at_the_models_length(launcher: RawLauncher, start: Start) -> None:
    await start(StandInPlan(max_model_len=10))
    launcher.handshake()
    launcher.add("a", [1, 2, 3, 4], max_tokens=100)
    (a,) = launcher.finish("a")
    assert (len(a.tokens), a.finish_reason) == (6, LENGTH)


async def test_more_requests_than_max_num_seqs_wait_their_turn(launcher: RawLauncher, start: Start) -> None:
    await start(StandInPlan(max_num_seqs=2, token_delay_s=0.002))
    launcher.handshake()
    for name in "abc":
        launcher.add(name, [1], max_tokens=10)
    launcher.finish("a", "b")
    assert "c" not in launcher.answers
    launcher.finish("c")


async def test_a_step_takes_the_planned_time(launcher: RawLauncher, start: Start) -> None:
    await start(StandInPlan(token_delay_s=0.02))
    launcher.handshake()
    begun = time.monotonic()
    launcher.add("a", [1], max_tokens=10)
    launcher.finish("a")
    assert time.monotonic() - begun >= 0.2


async def test_finished_requests_are_named_only_where_a_coordinator_would_be(
    launcher: RawLauncher, start: Start
) -> None:
    await start()
    launcher.handshake()
    launcher.add("a", [1], max_tokens=2)
    launcher.finish("a")
    assert launcher.finished == set()


async def test_finished_and_aborted_requests_are_named_when_asked_for(launcher: RawLauncher, start: Start) -> None:
    await start(StandInPlan(report_finished=True, token_delay_s=0.005))
    launcher.handshake()
    launcher.add("short", [1], max_tokens=1)
    launcher.add("long", [1], max_tokens=1000)
    launcher.finish("short")
    launcher.wait_tokens("long", 1)
    launcher.abort(["long"])
    launcher.call("echo")
    assert launcher.finished == {"short", "long"}


async def test_an_aborted_request_gets_no_further_word(launcher: RawLauncher, start: Start) -> None:
    await start(StandInPlan(token_delay_s=0.005))
    launcher.handshake()
    launcher.add("a", [1], max_tokens=1000)
    launcher.wait_tokens("a", 2)
    launcher.abort(["a", "never heard of"])
    launcher.call("echo")
    count = len(launcher.answers["a"].tokens)
    launcher.add("b", [1], max_tokens=3)
    launcher.finish("b")
    assert len(launcher.answers["a"].tokens) == count
    assert launcher.answers["a"].finish_reason is None


async def test_sigterm_aborts_what_is_in_flight_and_exits_zero(launcher: RawLauncher, start: Start) -> None:
    rank = await start(StandInPlan(token_delay_s=0.01))
    launcher.handshake()
    launcher.add("a", [1], max_tokens=1000)
    launcher.wait_tokens("a", 1)
    rank.terminate()
    assert await rank.wait() == Exit(code=0)
    (a,) = launcher.finish("a")
    assert a.finish_reason == ABORT


async def test_a_late_answer_carries_a_token_that_no_answer_has(launcher: RawLauncher, start: Start) -> None:
    rank = await start(StandInPlan(default=Fault(late_answer_s=0.05, token_delay_s=0.01)))
    launcher.handshake()
    launcher.add("a", [1], max_tokens=1000)
    launcher.wait_tokens("a", 1)
    rank.terminate()
    (a,) = launcher.finish("a")
    assert (a.tokens[-1], a.finish_reason) == (LATE_TOKEN, STOP)


async def test_the_report_says_who_the_rank_is(launcher: RawLauncher, start: Start) -> None:
    await start(incarnation=2, env={"CUDA_VISIBLE_DEVICES": "4,5"}, cpus=(0,))
    launcher.handshake()
    report = launcher.call("dplaunch_report")
    assert report["instance_id"] == "contract-r2_dp3"
    assert report["engine_id"] == "kv-r2_dp3"
    assert (report["rank"], report["incarnation"], report["data_parallel_index"]) == (3, 2, 3)
    assert (report["devices"], report["dtype"], report["executor"]) == (["4", "5"], "float32", "uni")
    assert report["env"]["CUDA_VISIBLE_DEVICES"] == "4,5"


async def test_utility_calls_answer_as_vllms_do(launcher: RawLauncher, start: Start) -> None:
    await start()
    launcher.handshake()
    assert launcher.call("get_supported_tasks") == ["generate"]
    assert launcher.call("reset_prefix_cache") is True
    assert launcher.call("is_sleeping") is False
    assert launcher.call("add_lora", ["name", 7, "/path"]) is True
    assert launcher.call("list_loras") == [7]
    assert launcher.call("echo", {"x": [1, None]}) == {"x": [1, None]}
    assert launcher.call("collective_rpc", "f", None, [1], {})[0]["method"] == "f"


async def test_a_call_that_does_not_exist_fails_in_vllms_words(launcher: RawLauncher, start: Start) -> None:
    await start()
    launcher.handshake()
    with pytest.raises(RuntimeError, match=r"^Call to no_such_call method failed: .*no_such_call"):
        launcher.call("no_such_call")


async def test_a_sleeping_engine_aborts_and_answers_again_when_it_wakes(launcher: RawLauncher, start: Start) -> None:
    await start(StandInPlan(token_delay_s=0.005))
    launcher.handshake()
    launcher.add("a", [1], max_tokens=1000)
    launcher.call("sleep", 1, "abort")
    assert launcher.call("is_sleeping") is True
    assert launcher.answers["a"].finish_reason == ABORT
    launcher.add("b", [1], max_tokens=1)
    launcher.call("wake_up", None)
    launcher.finish("b")


async def test_a_fault_strikes_at_the_nth_request_after_so_many_tokens(launcher: RawLauncher, start: Start) -> None:
    rank = await start(fault=Fault(when=When.REQUEST, nth=2, after_tokens=3, returncode=-9))
    launcher.handshake()
    launcher.add("a", [1], max_tokens=5)
    launcher.finish("a")
    launcher.add("b", [1], max_tokens=5)
    assert await rank.wait() == Exit(signal=9)
    launcher.wait_tokens("b", 3)
    launcher.drain()
    assert launcher.answers["b"].tokens == expected_tokens([1], 3)


async def test_a_poison_token_strikes_only_the_request_that_has_it(launcher: RawLauncher, start: Start) -> None:
    rank = await start(fault=Fault(when=When.REQUEST, nth=0, poison_token=666, returncode=4))
    launcher.handshake()
    launcher.add("good", [1], max_tokens=5)
    launcher.finish("good")
    assert rank.poll() is None
    launcher.add("bad", [1, 666], max_tokens=5)
    assert await rank.wait() == Exit(code=4)


async def test_an_engine_that_raises_while_serving_says_that_it_is_dead(
    launcher: RawLauncher, start: Start, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    rank = await start(fault=Fault(when=When.REQUEST, error="a wheel came off"), log_file=log)
    launcher.handshake()
    launcher.add("a", [1])
    launcher.wait_engine_dead()
    assert await rank.wait() == Exit(code=1)
    launcher.hear_out()
    assert launcher.failures == [("RuntimeError", "a wheel came off")]
    assert "a wheel came off" in log.read_text()


async def test_a_killed_rank_that_ignores_sigterm_says_nothing_more(launcher: RawLauncher, start: Start) -> None:
    rank = await start(StandInPlan(default=Fault(ignore_sigterm=True), token_delay_s=0.01))
    launcher.handshake()
    launcher.add("a", [1], max_tokens=10_000)
    launcher.wait_tokens("a", 1)
    rank.terminate()
    count = len(launcher.answers["a"].tokens)
    launcher.wait_tokens("a", count + 2)
    rank.kill()
    assert await rank.wait() == Exit(signal=9)
    launcher.drain()
    assert launcher.answers["a"].finish_reason is None


async def test_a_slow_start_ends_early_at_sigterm(launcher: RawLauncher, start: Start) -> None:
    rank = await start(fault=Fault(slow_start_s=600))
    launcher.say_nothing_until_hello()
    launcher.answer_hello()
    rank.terminate()
    assert await rank.wait() == Exit(code=0)


async def test_a_flood_of_stderr_reaches_the_log(launcher: RawLauncher, start: Start, tmp_path: Path) -> None:
    log = tmp_path / "log"
    await start(fault=Fault(stderr_bytes=50_000), log_file=log)
    launcher.handshake()
    poll_until(lambda: log.stat().st_size >= 50_000)
