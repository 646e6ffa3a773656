"""The processes behind the mp backend: who ends with whom, and who does not."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dplaunch.backend import Exit
from dplaunch.errors import BackendError
from dplaunch.spec import StartMethod
from dplaunch.testing import poll_until_async
from tests.unit import zygote_engines
from tests.unit.zygote_rig import Rig, end_zygotes, gone


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with Rig(tmp_path) as rig:
        yield rig


async def test_a_rank_is_a_forked_torch_process_of_its_own(rig: Rig, tmp_path: Path) -> None:
    rank, saw = await rig.start("tell_all", {"ONLY": "mine"})
    assert saw["pid"] == rank.pid == saw["group"]
    assert saw["parent"] == rig.zygote_pid
    assert saw["preloaded_in"] == [rig.zygote_pid]
    assert saw["torch"]
    assert saw["in_main_thread"]
    assert saw["name"] == "EngineCore_DP1"
    assert saw["env"].keys() <= {"PATH", "ONLY", "LC_CTYPE"}
    assert saw["cwd"] == os.getcwd()
    assert saw["main"] is None
    assert await rank.wait() == rank.poll() == Exit(code=0)
    assert rank.describe() == f"pid {rank.pid}"


async def test_a_rank_has_the_signals_of_a_fresh_process_and_nothing_of_the_zygotes_files(rig: Rig) -> None:
    others = [await rig.start("stay") for _ in range(2)]
    _, saw = await rig.start("tell_all")
    assert len(others) == 2
    assert saw["handlers"] == [signal.SIGINT]
    assert saw["blocked"] == []
    pidfds = [name for name in saw["files"] if "pidfd" in name]
    assert len(pidfds) <= 1, "only its own watch over the launcher"
    assert not [name for name in saw["files"] if "zygote-log" in name]


async def test_an_engine_is_imported_once_for_all_ranks(tmp_path: Path) -> None:
    # A zygote that has imported nothing of ours.
    async with Rig(tmp_path, preload="gc:collect") as rig:
        saw = [(await rig.start("tell_all"))[1] for _ in range(2)]
        assert [each["imported_in"] for each in saw] == [rig.zygote_pid] * 2


async def test_an_engine_that_cannot_be_imported_ends_its_rank_and_not_the_zygote(rig: Rig) -> None:
    before = rig.zygote_pid
    boot = dataclasses.replace(rig.boot("end_well"), engine="no_such_module:run")
    assert await (await rig.backend.spawn(boot)).wait() == Exit(code=1)
    await rig.start("end_well")
    assert rig.zygote_pid == before


async def test_the_zygote_has_one_thread(rig: Rig) -> None:
    await rig.start("end_well")
    assert os.listdir(f"/proc/{rig.zygote_pid}/task") == [str(rig.zygote_pid)]
    assert rig.backend._nursery().other_threads == ()


@pytest.mark.parametrize(
    ("engine", "expected"), [("end_well", Exit(code=0)), ("end_with_7", Exit(code=7))], ids=["0", "7"]
)
async def test_an_exit_code_is_reported(rig: Rig, engine: str, expected: Exit) -> None:
    rank = await rig.backend.spawn(rig.boot(engine))
    assert await rank.wait() == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
async def test_a_signal_is_reported(rig: Rig, number: signal.Signals) -> None:
    rank, saw = await rig.start("stay")
    assert rank.poll() is None
    os.kill(saw["pid"], number)
    assert await rank.wait() == Exit(signal=number)


async def test_terminate_asks_and_kill_does_not(rig: Rig) -> None:
    polite, _ = await rig.start("stay")
    stubborn, _ = await rig.start("ignore_sigterm")
    polite.terminate()
    stubborn.terminate()
    assert await polite.wait() == Exit(signal=signal.SIGTERM)
    assert stubborn.poll() is None
    stubborn.kill()
    assert await stubborn.wait() == Exit(signal=signal.SIGKILL)
    stubborn.kill()
    stubborn.terminate()


async def test_kill_takes_grandchildren_too_even_in_sessions_of_their_own(rig: Rig) -> None:
    rank, saw = await rig.start("have_children")
    assert not gone(*saw["children"][:1])
    assert not gone(*saw["children"][1:])
    rank.kill()
    await rank.wait()
    await poll_until_async(lambda: gone(*saw["children"]), what="the end of the grandchildren")


async def test_what_a_dead_rank_leaves_behind_is_killed(rig: Rig) -> None:
    rank, saw = await rig.start("leave_a_child")
    assert await rank.wait() == Exit(code=3)
    await poll_until_async(lambda: gone(*saw["children"]), what="the end of the orphan")


@pytest.mark.parametrize("way", ["kill", "terminate"])
async def test_shared_memory_of_an_ended_rank_is_removed(rig: Rig, way: str) -> None:
    rank, saw = await rig.start("share_memory")
    name = Path("/dev/shm") / saw["name"]
    assert name.exists()
    getattr(rank, way)()
    await rank.wait()
    await poll_until_async(lambda: not name.exists(), what="the removal of the shared memory")


async def test_shared_memory_of_a_serving_rank_that_is_killed_by_others_is_removed(rig: Rig) -> None:
    rank, saw = await rig.start("share_memory")
    name = Path("/dev/shm") / saw["name"]
    rank.settled()
    os.kill(saw["pid"], signal.SIGKILL)
    assert await rank.wait() == Exit(signal=signal.SIGKILL)
    await poll_until_async(lambda: not name.exists(), what="the removal of the shared memory")


async def test_a_dead_zygote_is_replaced_by_the_next_spawn_and_its_ranks_live_on(rig: Rig) -> None:
    old, saw = await rig.start("have_children")
    first = rig.zygote_pid
    os.kill(first, signal.SIGKILL)
    await poll_until_async(lambda: gone(first), what="the zygote's end")
    new, _ = await rig.start("stay")
    assert rig.zygote_pid != first
    assert old.poll() is None
    assert not gone(saw["pid"])
    os.kill(saw["pid"], signal.SIGKILL)
    exit_ = await old.wait()
    assert exit_.code is None
    assert exit_.signal is None
    assert "helper process" in exit_.reason
    in_group, away = saw["children"]
    os.kill(away, signal.SIGKILL)
    await poll_until_async(lambda: gone(in_group), what="the end of the orphan")
    assert new.poll() is None


async def test_a_rank_of_a_dead_zygote_can_be_ended(rig: Rig) -> None:
    polite, _ = await rig.start("stay")
    stubborn, saw = await rig.start("have_children")
    os.kill(rig.zygote_pid, signal.SIGKILL)
    polite.terminate()
    stubborn.kill()
    await asyncio.gather(polite.wait(), stubborn.wait())
    await poll_until_async(lambda: gone(*saw["children"]), what="the end of the grandchildren")


async def test_spawns_survive_the_zygotes_sudden_death(rig: Rig) -> None:
    await rig.start("stay")
    spawns = [asyncio.ensure_future(rig.backend.spawn(rig.boot("stay"))) for _ in range(8)]
    await asyncio.sleep(0)
    os.kill(rig.zygote_pid, signal.SIGKILL)
    ranks = await asyncio.gather(*spawns)
    assert len({rank.pid for rank in ranks}) == 8


async def test_a_zygote_that_cannot_import_says_why(tmp_path: Path) -> None:
    async with Rig(tmp_path, preload=zygote_engines.BROKEN_PRELOAD) as rig:
        with pytest.raises(BackendError, match="ImportError: no such wonder") as caught:
            await rig.backend.spawn(rig.boot("stay"))
    assert "broken_preload" in caught.value.detail


async def test_a_zygote_that_dies_importing_is_not_tried_again_and_its_last_words_are_shown(
    tmp_path: Path,
) -> None:
    async with Rig(tmp_path, preload=f"{zygote_engines.__name__}:dying_preload") as rig:
        with pytest.raises(BackendError, match=r"SIGKILL\(-9\)") as caught:
            await rig.backend.spawn(rig.boot("stay"))
    assert caught.value.detail == "last words"


async def test_twenty_spawns_leave_no_file_descriptor(rig: Rig) -> None:
    def count(pid: int | str) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    async def spawn_one() -> None:
        rank, _ = await rig.start("end_well")
        await rank.wait()

    await spawn_one()
    before = count("self"), count(rig.zygote_pid)
    for _ in range(20):
        await spawn_one()
    await poll_until_async(lambda: (count("self"), count(rig.zygote_pid)) <= before, what="as few files as before")


async def test_spawn_makes_a_fresh_interpreter_with_the_ranks_own_environment(tmp_path: Path) -> None:
    async with Rig(tmp_path, StartMethod.SPAWN) as rig:
        rank, saw = await rig.start("tell_all", {"MALLOC_ARENA_MAX": "3"})
        assert await rank.wait() == Exit(code=0)
        assert saw["preloaded_in"] == []
        assert saw["main"] is None
        assert saw["pid"] == rank.pid == saw["group"]
        assert saw["name"] == "EngineCore_DP1"
        assert saw["env"]["MALLOC_ARENA_MAX"] == "3"
        assert await rig.backend.call(f"{zygote_engines.__name__}:reverse", b"abc") == b"cba"
        staying, saw = await rig.start("have_children")
        staying.kill()
        assert await staying.wait() == Exit(signal=signal.SIGKILL)
        await poll_until_async(lambda: gone(*saw["children"]), what="the end of the grandchildren")
        zygote = rig.zygote_pid
    await asyncio.to_thread(end_zygotes)
    assert gone(zygote)
