"""The main rows of the table with vLLM's own engines: one group, greedy answers compared with the undisturbed ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.chaos import acts
from tests.chaos.engines import Options, real_engines
from tests.chaos.load import End, Load
from tests.chaos.rig import Rig
from tests.conftest import shared_pids
from tests.leaks import Snapshot, left_of_a_shared_group

pytestmark = [
    pytest.mark.real,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaves("the group, which all tests here share; its fixture looks for what is left"),
]

Harm = Callable[[Callable[[Rig], Awaitable[None]]], Awaitable[str]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def harmed(vllm_imported: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Harm]:
    """Does something to two ranks that answer all the time, and gives what was said of it."""
    before = Snapshot.take()
    directory: Path = tmp_path_factory.mktemp("chaos-real")
    engines = await real_engines(Options(seed=1, ranks=2, real=True), directory)
    rig = Rig(engines.spec)

    async def harm(act: Callable[[Rig], Awaitable[None]]) -> str:
        await rig.whole()
        count = len(rig.events)
        async with Load(rig.group, engines.next_ask, streams=6) as load:
            await load.flows(6)
            await act(rig)
            await rig.whole()
            await load.flows(6)
        said = "\n".join(event.message for event in rig.events[count:])
        assert load.tally.wrong == [], said
        # One in ten clients goes away by itself.
        assert set(load.tally.ends) <= {End.EXACT, End.LEFT}, f"{load.tally}\n{said}"
        return said

    try:
        await rig.group.open()
        await engines.prepare(rig.group)
        yield harm
    finally:
        await rig.group.close()
    if left := left_of_a_shared_group(before, shared_pids):
        pytest.fail("left behind by the group:\n  " + "\n  ".join(left), pytrace=False)


async def test_a_killed_rank(harmed: Harm) -> None:
    assert "rank 1 died while serving: SIGKILL(-9)" in await harmed(acts.kill)


async def test_a_segmentation_fault(harmed: Harm) -> None:
    assert "rank 1 died while serving: SIGSEGV(-11)" in await harmed(acts.segfault)


async def test_a_rank_that_is_asked_to_end_by_somebody_else(harmed: Harm) -> None:
    assert "rank 1 died while serving" in await harmed(acts.terminate)


async def test_a_rank_that_stands_still(harmed: Harm) -> None:
    assert "rank 1 has not answered for" in await harmed(acts.freeze)


async def test_all_ranks_at_once(harmed: Harm) -> None:
    said = await harmed(acts.kill_all)
    assert "rank 0 is back" in said
    assert "rank 1 is back" in said
