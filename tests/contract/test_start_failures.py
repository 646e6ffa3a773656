"""A start that cannot succeed: one clear message, and nothing left. The cases are data."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass

import pytest

from dplaunch.errors import DplaunchError, RankFailedError, StartTimeoutError
from dplaunch.testing import Fault, StandInPlan, When, poll_until_async
from tests.contract.conftest import Launch


@dataclass(frozen=True)
class Crash:
    """How rank 1 of two goes wrong, and what its user has to read."""

    fault: Fault
    error: type[DplaunchError]
    words: tuple[str, ...]
    start_timeout_s: float = 60.0


ENDS = "stand-in engine ends on purpose"

CRASHES = {
    "exits before HELLO": Crash(Fault(when=When.BEFORE_HELLO, returncode=3), RankFailedError, ("exit code 3", ENDS)),
    "exits while loading": Crash(Fault(when=When.BEFORE_READY, returncode=42), RankFailedError, ("exit code 42", ENDS)),
    "exits with 0 while loading": Crash(
        Fault(when=When.BEFORE_READY, returncode=0), RankFailedError, ("exit code 0", "before it was ready")
    ),
    "is killed while loading": Crash(
        Fault(when=When.BEFORE_READY, returncode=-signal.SIGKILL),
        RankFailedError,
        ("SIGKILL(-9)", "memory", ENDS),
    ),
    "segfaults while loading": Crash(
        Fault(when=When.BEFORE_READY, returncode=-signal.SIGSEGV),
        RankFailedError,
        ("SIGSEGV(-11)", "native code"),
    ),
    "dies of an instruction": Crash(
        Fault(when=When.BEFORE_READY, returncode=-signal.SIGILL), RankFailedError, ("SIGILL(-4)", "float32")
    ),
    "raises while loading": Crash(
        Fault(when=When.BEFORE_READY, error="no weights here"),
        RankFailedError,
        ("RuntimeError: no weights here", "Traceback"),
    ),
    "floods its log and exits": Crash(
        Fault(when=When.BEFORE_READY, returncode=5, stderr_bytes=300_000),
        RankFailedError,
        ("exit code 5", ENDS),
    ),
    "hangs while loading": Crash(
        Fault(when=When.BEFORE_READY, hang=True),
        StartTimeoutError,
        ("was not ready after 3 s", "--start-timeout"),
        start_timeout_s=3.0,
    ),
    "hangs and ignores SIGTERM": Crash(
        Fault(when=When.BEFORE_READY, hang=True, ignore_sigterm=True),
        StartTimeoutError,
        ("was not ready after 3 s",),
        start_timeout_s=3.0,
    ),
    "is somebody else": Crash(
        Fault(instance_id="contract_dp0"), DplaunchError, ("instance_id", "'contract_dp0'", "'contract_dp1'")
    ),
}


@pytest.mark.parametrize("case", CRASHES)
async def test_a_rank_that_cannot_start_is_named_with_how_why_and_where(case: str, launch: Launch) -> None:
    crash = CRASHES[case]
    begun = time.monotonic()
    with pytest.raises(crash.error) as caught:
        await launch(
            StandInPlan(faults={(1, 0): crash.fault}),
            start_timeout_s=crash.start_timeout_s,
            shutdown_timeout_s=0.5,
        )
    text = str(caught.value)
    assert caught.value.message.startswith("rank 1 ")
    for word in crash.words:
        assert word in text
    if crash.error is not DplaunchError:
        assert "rank1.log" in text
    assert time.monotonic() - begun < crash.start_timeout_s + 20


async def test_the_first_of_several_failures_is_the_root_cause(launch: Launch) -> None:
    plan = StandInPlan(
        faults={
            (0, 0): Fault(slow_start_s=600),
            (1, 0): Fault(when=When.BEFORE_HELLO, returncode=7),
            (2, 0): Fault(when=When.BEFORE_READY, returncode=8, slow_start_s=5),
        }
    )
    with pytest.raises(RankFailedError) as caught:
        await launch(plan, dp=3)
    assert "rank 1" in caught.value.message
    assert "exit code 7" in caught.value.message


async def test_a_start_that_is_given_up_leaves_nothing(launch: Launch) -> None:
    start = asyncio.create_task(launch(StandInPlan(default=Fault(slow_start_s=600))))
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start


async def test_a_start_that_is_given_up_while_ranks_load_leaves_nothing(launch: Launch) -> None:
    start = asyncio.create_task(launch(StandInPlan(default=Fault(slow_start_s=600))))
    await poll_until_async(lambda: launch.launched)
    (watched,) = launch.launched
    await poll_until_async(lambda: all("loading" in watched.phases(rank) for rank in (0, 1)), 60, "two loading ranks")
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
