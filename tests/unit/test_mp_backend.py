"""The verbs of the mp backend, and how several of them share one zygote."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from dplaunch.backends import registry as registry_module
from dplaunch.backends.mp import MpBackend, shutdown_zygotes

from dplaunch.backend import Exit, load_backend
from dplaunch.errors import BackendError, ModelError, UsageError
from dplaunch.spec import LaunchSpec
from dplaunch.testing import poll_until, poll_until_async
from tests.unit import zygote_engines
from tests.unit.zygote_rig import Rig, gone, helper_env

ENGINES = zygote_engines.__name__


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with Rig(tmp_path) as rig:
        yield rig


def test_it_is_found_by_its_name() -> None:
    assert isinstance(load_backend("mp"), MpBackend)
    assert isinstance(load_backend("mp"), MpBackend)


def test_importing_it_brings_in_neither_torch_nor_vllm(tmp_path: Path) -> None:
    program = "import sys, dplaunch.backends.mp; print({'torch', 'vllm', 'zmq', 'ray'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr


async def test_the_inventory_is_this_host() -> None:
    inventory = await MpBackend().inventory(LaunchSpec())
    assert [len(node.cores) > 0 for node in inventory.nodes] == [True]


async def test_a_call_returns_bytes(rig: Rig) -> None:
    assert await rig.backend.call(f"{ENGINES}:reverse", b"abc") == b"cba"


async def test_a_call_may_be_large_both_ways(rig: Rig) -> None:
    size = 2**20
    assert len(await rig.backend.call(f"{ENGINES}:reverse", b"x" * 8 * size)) == 8 * size
    assert len(await rig.backend.call(f"{ENGINES}:megabytes", b"xy")) == 2 * size


async def test_a_call_runs_in_a_throw_away_process_with_the_backends_environment(rig: Rig) -> None:
    first, second = [json.loads(await rig.backend.call(f"{ENGINES}:where", b"")) for _ in range(2)]
    assert first["pid"] != second["pid"]
    assert first["parent"] == second["parent"] == rig.zygote_pid
    expected = helper_env()
    # The test runner changes this one between a test's setup and its body.
    del expected["PYTEST_CURRENT_TEST"]
    assert first["env"].items() >= expected.items()
    assert first["cwd"] == os.getcwd()


async def test_a_call_raises_the_same_error_as_its_function(rig: Rig) -> None:
    with pytest.raises(ModelError) as caught:
        await rig.backend.call(f"{ENGINES}:refuse", b"")
    error = caught.value
    assert (error.message, error.hint, error.detail) == (
        "there is no model here",
        "Look elsewhere.",
        "line 1\nline 2",
    )


@pytest.mark.parametrize(
    ("function", "words"),
    [("stumble", "KeyError: 'shoe'"), ("no_such_function", "AttributeError")],
    ids=["a foreign error", "an unknown function"],
)
async def test_a_foreign_error_of_a_call_is_named(rig: Rig, function: str, words: str) -> None:
    with pytest.raises(BackendError) as caught:
        await rig.backend.call(f"{ENGINES}:{function}", b"")
    assert words in caught.value.message
    assert "Traceback" in caught.value.detail


async def test_a_call_that_dies_by_a_signal_says_so_and_shows_its_last_words(rig: Rig) -> None:
    with pytest.raises(BackendError, match=r"without an answer: SIGSEGV\(-11\)") as caught:
        await rig.backend.call(f"{ENGINES}:crash", b"")
    assert caught.value.detail == "all is well\nso far"


async def test_a_cancelled_call_is_killed(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    call = asyncio.ensure_future(rig.backend.call(f"{ENGINES}:hang", str(path).encode()))
    await poll_until_async(lambda: path.exists() and path.read_text(), 60.0, what="the call's process")
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    await poll_until_async(lambda: gone(int(path.read_text())), what="the end of the call's process")


async def test_a_call_outlives_the_zygote(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    call = asyncio.ensure_future(rig.backend.call(f"{ENGINES}:hang", str(path).encode()))
    await poll_until_async(lambda: path.exists() and path.read_text(), 60.0, what="the call's process")
    os.kill(rig.zygote_pid, signal.SIGKILL)
    os.kill(int(path.read_text()), signal.SIGKILL)
    with pytest.raises(BackendError, match="without an answer"):
        await call


async def test_two_backends_share_a_zygote_and_calls_keep_their_own_environment(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    async with Rig(tmp_path) as one, Rig(tmp_path / "other") as other:
        await one.backend.open(LaunchSpec(), {**helper_env(), "WHOSE": "one"})
        first, second = await asyncio.gather(one.start("tell_all"), other.start("tell_all"))
        assert first[1]["parent"] == second[1]["parent"] == one.zygote_pid == other.zygote_pid
        whose = [json.loads(await rig.backend.call(f"{ENGINES}:where", b"")) for rig in (one, other)]
        assert [seen["env"].get("WHOSE") for seen in whose] == ["one", None]


async def test_what_is_loaded_before_a_fork_makes_a_zygote_of_its_own(rig: Rig, tmp_path: Path) -> None:
    other = MpBackend(zygote_engines.PRELOAD)
    await other.open(LaunchSpec(), {**helper_env(), "MALLOC_ARENA_MAX": "2"})
    same = other._nursery().pid
    await other.close()
    await other.open(LaunchSpec(), {**helper_env(), "PYTHONHASHSEED": "1"})
    different = other._nursery().pid
    await other.close()
    assert same == rig.zygote_pid != different
    shutdown_zygotes()
    assert gone(different)


def test_groups_in_several_threads_and_event_loops_use_it_at_once(tmp_path: Path) -> None:
    exits: list[Exit] = []

    def launch(directory: Path) -> None:
        async def run() -> None:
            directory.mkdir()
            async with Rig(directory) as rig:
                started = [await rig.backend.spawn(rig.boot("end_with_7")) for _ in range(3)]
                exits.extend(await asyncio.gather(*(rank.wait() for rank in started)))

        asyncio.run(run())

    threads = [threading.Thread(target=launch, args=(tmp_path / str(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exits == [Exit(code=7)] * 9


async def test_close_kills_what_is_left_keeps_the_zygote_and_may_be_repeated(rig: Rig, tmp_path: Path) -> None:
    rank, saw = await rig.start("have_children")
    zygote = rig.zygote_pid
    await rig.backend.close()
    assert gone(saw["pid"], *saw["children"])
    assert rank.poll() == Exit(signal=signal.SIGKILL)
    await rig.backend.close()
    with pytest.raises(BackendError, match="not open"):
        await rig.backend.spawn(rig.boot("stay"))
    async with Rig(tmp_path) as next_group:
        assert next_group.zygote_pid == zygote


async def test_a_spawn_that_is_cancelled_leaves_no_rank(tmp_path: Path) -> None:
    shutdown_zygotes()
    async with Rig(tmp_path) as rig:
        boot = rig.boot("stay")
        spawn = asyncio.ensure_future(rig.backend.spawn(boot))
        await asyncio.sleep(0)
        spawn.cancel()
        await asyncio.wait([spawn])
        assert spawn.cancelled()
        # The zygote serves in order: after this, it has served the cancelled one.
        assert await rig.backend.call(f"{ENGINES}:reverse", b"ab") == b"ba"
        await poll_until_async(lambda: not rig.backend._nursery().busy, what="the end of the cancelled rank")
    assert not Path(boot.payload.decode()).exists()


async def test_a_rank_without_a_log_file_writes_to_the_launchers_own_output(tmp_path: Path) -> None:
    program = f"""
import asyncio, dataclasses, pathlib
from tests.unit.zygote_rig import Rig
async def main():
    async with Rig(pathlib.Path({str(tmp_path)!r})) as rig:
        boot = dataclasses.replace(rig.boot("speak"), log_file=None)
        await (await rig.backend.spawn(boot)).wait()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        env=helper_env(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert await process.communicate() == (b"out\n", b"err\n")


async def test_an_unused_zygote_ends_after_its_linger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry_module.LINGER_VARIABLE, "0.2")
    async with Rig(tmp_path) as rig:
        await rig.backend.call(f"{ENGINES}:reverse", b"")
        zygote = rig.zygote_pid
    await poll_until_async(lambda: gone(zygote), what="the zygote's end")


async def test_a_linger_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry_module.LINGER_VARIABLE, "a while")
    with pytest.raises(UsageError, match="'a while'"):
        await MpBackend(zygote_engines.PRELOAD).open(LaunchSpec(), helper_env())


async def test_shutdown_waits_for_the_last_rank(rig: Rig) -> None:
    rank, _ = await rig.start("stay")
    zygote = rig.zygote_pid
    await asyncio.to_thread(shutdown_zygotes)
    assert not gone(zygote)
    rank.kill()
    assert await rank.wait() == Exit(signal=signal.SIGKILL)
    await poll_until_async(lambda: gone(zygote), what="the zygote's end")
    assert await rig.backend.call(f"{ENGINES}:reverse", b"ab") == b"ba"
    assert rig.zygote_pid != zygote


async def test_a_forked_copy_of_the_launcher_touches_nothing(rig: Rig) -> None:
    rank, saw = await rig.start("stay")
    zygote = rig.zygote_pid
    copy = os.fork()
    if copy == 0:
        # All that a copy might do at its end.
        asyncio.set_event_loop(None)
        asyncio._set_running_loop(None)
        try:
            asyncio.run(rig.backend.close())
            registry_module.registry().end_all()
            shutdown_zygotes()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 0
    assert not gone(zygote)
    assert not gone(saw["pid"])
    assert await rig.backend.call(f"{ENGINES}:reverse", b"ab") == b"ba"
    assert rank.poll() is None


def test_the_zygote_ends_with_the_interpreter(tmp_path: Path) -> None:
    program = f"""
import asyncio, pathlib
from tests.unit.zygote_rig import Rig
async def main():
    rig = Rig(pathlib.Path({str(tmp_path)!r}))
    await rig.__aenter__()
    rank, saw = await rig.start("stay")
    print(rig.zygote_pid, rank.pid)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], env=helper_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    poll_until(lambda: gone(*pids), what="the end of zygote and rank")
