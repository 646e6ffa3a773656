"""What every backend keeps, below any policy: processes are made, watched, ended and collected."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from dplaunch.backend import Backend, Exit, RankHandle
from dplaunch.errors import BackendError, ModelError
from dplaunch.spec import LaunchSpec
from dplaunch.testing import Fault, When, expected_tokens, poll_until, poll_until_async
from tests.contract.boots import make_boot
from tests.contract.conftest import Spawner
from tests.contract.raw import RawLauncher

SOON_S = 10.0
"""Seconds within which a rank that was told to end has ended, on a busy machine."""


async def ended(handle: RankHandle) -> Exit:
    return await asyncio.wait_for(handle.wait(), SOON_S)


# How a rank ends, what has to be heard of it. The moment is one of `When`.
EXITS = {
    "an exit code before HELLO": (Fault(when=When.BEFORE_HELLO, returncode=3), Exit(code=3)),
    "an exit code while loading": (Fault(when=When.BEFORE_READY, returncode=7), Exit(code=7)),
    "exit code 0 while loading": (Fault(when=When.BEFORE_READY, returncode=0), Exit(code=0)),
    "an exit code when ready": (Fault(when=When.AFTER_READY, returncode=255), Exit(code=255)),
    "SIGKILL": (Fault(when=When.BEFORE_READY, returncode=-signal.SIGKILL), Exit(signal=signal.SIGKILL)),
    "SIGSEGV": (Fault(when=When.AFTER_READY, returncode=-signal.SIGSEGV), Exit(signal=signal.SIGSEGV)),
    "SIGILL": (Fault(when=When.BEFORE_READY, returncode=-signal.SIGILL), Exit(signal=signal.SIGILL)),
    "SIGABRT": (Fault(when=When.BEFORE_HELLO, returncode=-signal.SIGABRT), Exit(signal=signal.SIGABRT)),
    "an exception": (Fault(when=When.BEFORE_READY, error="no weights"), Exit(code=1)),
}


@pytest.mark.parametrize("how", EXITS)
async def test_how_a_rank_ended_is_told_as_it_was(how: str, spawn: Spawner, launcher: RawLauncher) -> None:
    fault, expected = EXITS[how]
    handle = await spawn(fault)
    if fault.when is not When.BEFORE_HELLO:
        launcher.say_nothing_until_hello()
        launcher.answer_hello()
    assert await ended(handle) == expected
    assert handle.poll() == expected


async def test_a_rank_serves_and_is_who_the_boot_says(
    backend: Backend, launcher: RawLauncher, has_processes: bool, tmp_path: Path
) -> None:
    core = max(os.sched_getaffinity(0))
    boot = make_boot(
        launcher.address,
        rank=11,
        incarnation=2,
        env={"CUDA_VISIBLE_DEVICES": "6,7", "MADE": "not inherited"},
        cpus=(core,),
        log_file=tmp_path / "log",
    )
    handle = await backend.spawn(boot)
    assert launcher.handshake()["instance_id"] == "contract-r2_dp11"
    report = launcher.call("dplaunch_report")
    assert (report["instance_id"], report["engine_id"]) == ("contract-r2_dp11", "kv-r2_dp11")
    assert (report["rank"], report["incarnation"], report["data_parallel_index"]) == (11, 2, 11)
    assert (report["devices"], report["cpus"]) == (["6", "7"], [core])
    assert report["env"] == dict(boot.env)
    assert report["process_title"].startswith("dplaunch::contract-r2_dp11")
    if has_processes:
        assert report["pid"] == handle.pid
        assert report["pid"] != os.getpid()
        assert str(handle.pid) in handle.describe()
    launcher.add("a", [4, 5], max_tokens=9)
    (answer,) = launcher.finish("a")
    assert answer.tokens == expected_tokens([4, 5], 9)


async def test_a_rank_writes_to_its_own_log(spawn: Spawner) -> None:
    await spawn.ready()
    poll_until(lambda: "stand-in engine of rank 3 is ready" in spawn.log_file.read_text())


async def test_the_next_incarnation_writes_behind_the_last_one(spawn: Spawner, launcher: RawLauncher) -> None:
    first = await spawn(Fault(when=When.BEFORE_HELLO, returncode=1))
    await ended(first)
    await spawn.ready(incarnation=1)
    poll_until(lambda: "is ready" in spawn.log_file.read_text())
    text = spawn.log_file.read_text()
    assert text.index("ends on purpose") < text.index("is ready")


async def test_a_flood_on_stderr_holds_nobody_up(spawn: Spawner) -> None:
    # More than any pipe holds: a launcher that should read it, and does not, would hang the rank.
    await spawn.ready(Fault(stderr_bytes=1_000_000))
    assert spawn.log_file.stat().st_size >= 1_000_000


async def test_a_running_rank_polls_as_none(spawn: Spawner) -> None:
    handle = await spawn.ready()
    assert handle.poll() is None


async def test_everyone_who_waits_is_told_and_giving_up_waiting_harms_nobody(spawn: Spawner) -> None:
    handle = await spawn.ready()
    waits = [asyncio.ensure_future(handle.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waits[0].cancel()
    handle.terminate()
    assert await asyncio.wait_for(asyncio.gather(*waits[1:]), SOON_S) == [Exit(code=0)] * 2
    assert await ended(handle) == Exit(code=0)


async def test_terminate_ends_a_rank_in_order(spawn: Spawner, launcher: RawLauncher) -> None:
    handle = await spawn.ready(Fault(token_delay_s=0.01))
    launcher.add("a", [1], max_tokens=1000)
    launcher.wait_tokens("a", 1)
    handle.terminate()
    assert await ended(handle) == Exit(code=0)
    (answer,) = launcher.finish("a")
    assert answer.finish_reason == 2


async def test_kill_ends_a_rank_that_ignores_terminate(spawn: Spawner, launcher: RawLauncher) -> None:
    handle = await spawn.ready(Fault(ignore_sigterm=True))
    handle.terminate()
    assert launcher.call("echo", "still here") == "still here"
    assert handle.poll() is None
    handle.kill()
    assert await ended(handle) == Exit(signal=signal.SIGKILL)


async def test_kill_ends_a_rank_that_hangs_while_it_starts(spawn: Spawner, launcher: RawLauncher) -> None:
    handle = await spawn(Fault(when=When.BEFORE_READY, hang=True, ignore_sigterm=True))
    launcher.say_nothing_until_hello()
    launcher.answer_hello()
    handle.kill()
    assert await ended(handle) == Exit(signal=signal.SIGKILL)


async def test_ending_a_rank_that_has_ended_is_harmless(spawn: Spawner) -> None:
    handle = await spawn.ready()
    handle.terminate()
    first = await ended(handle)
    handle.terminate()
    handle.kill()
    handle.kill()
    assert await ended(handle) == handle.poll() == first


async def test_a_late_kill_does_not_reach_the_next_incarnation(
    backend: Backend, spawn: Spawner, launcher: RawLauncher
) -> None:
    old = await spawn(Fault(when=When.BEFORE_HELLO, returncode=9))
    await ended(old)
    new = await spawn.ready(incarnation=1)
    old.kill()
    assert launcher.call("echo", 1) == 1
    assert new.poll() is None


@pytest.mark.parametrize("how", ["kill", "terminate", "crash"])
async def test_what_a_rank_left_running_is_gone_after_the_kill(
    how: str, spawn: Spawner, launcher: RawLauncher, has_processes: bool
) -> None:
    if not has_processes:
        pytest.skip("its ranks have no processes below them")
    crash = Fault(grandchild=True, when=When.REQUEST, returncode=-signal.SIGSEGV)
    handle = await spawn.ready(crash)
    below = psutil.Process(launcher.call("dplaunch_report")["grandchild"])
    assert below.is_running()
    if how == "terminate":
        handle.terminate()
    elif how == "crash":
        launcher.add("a", [1])
    if how != "kill":
        await ended(handle)
    handle.kill()
    await ended(handle)
    await poll_until_async(lambda: _is_gone(below), what="the end of the rank's child")


async def test_many_ranks_start_side_by_side_and_keep_apart(backend: Backend, sockets: Path) -> None:
    count = 6
    address = await backend.address()
    launchers = [RawLauncher(sockets, f"r{rank}", address) for rank in range(count)]
    try:
        boots = [make_boot(raw.address, rank=rank) for rank, raw in enumerate(launchers)]
        handles = await asyncio.gather(*(backend.spawn(boot) for boot in boots))
        ids = [raw.handshake()["instance_id"] for raw in launchers]
        assert ids == [f"contract_dp{rank}" for rank in range(count)]
        handles[2].kill()
        assert await ended(handles[2]) == Exit(signal=signal.SIGKILL)
        for rank in set(range(count)) - {2}:
            assert launchers[rank].call("dplaunch_report")["rank"] == rank
    finally:
        for raw in launchers:
            raw.__exit__(None, None, None)


async def test_a_call_returns_what_its_function_does(backend: Backend) -> None:
    assert await backend.call("dplaunch.testing.calls:reverse", b"abc") == b"cba"


async def test_calls_run_side_by_side(backend: Backend) -> None:
    calls = (backend.call("dplaunch.testing.calls:reverse", b"%d!" % i) for i in range(4))
    assert await asyncio.gather(*calls) == [b"!%d" % i for i in range(4)]


async def test_a_large_answer_arrives_whole(backend: Backend) -> None:
    payload = os.urandom(3_000_000)
    assert await backend.call("dplaunch.testing.calls:reverse", payload) == payload[::-1]


async def test_an_error_of_ours_is_raised_as_it_was(backend: Backend) -> None:
    with pytest.raises(ModelError) as caught:
        await backend.call("dplaunch.testing.calls:refuse", b"the detail")
    error = caught.value
    assert (error.message, error.hint, error.detail) == (
        "there is no such model",
        "Try another.",
        "the detail",
    )


async def test_another_error_is_a_backend_error_that_names_it(backend: Backend) -> None:
    with pytest.raises(BackendError, match=r"ValueError: cannot read b'x'"):
        await backend.call("dplaunch.testing.calls:stumble", b"x")


async def test_a_call_whose_process_dies_is_a_backend_error_that_says_how(
    backend: Backend, has_processes: bool
) -> None:
    with pytest.raises(BackendError, match=r"SIGKILL\(-9\)") as caught:
        await backend.call("dplaunch.testing.calls:die", str(os.getpid()).encode())
    if has_processes:
        assert "the last words of a helper" in str(caught.value)


async def test_a_call_leaves_no_trace_in_the_launcher(backend: Backend, has_processes: bool) -> None:
    pid = await backend.call("dplaunch.testing.calls:dirty_environment", b"trace")
    assert "DPLAUNCH_TEST_TRACE" not in os.environ
    assert (int(pid) != os.getpid()) is has_processes


async def test_the_inventory_names_the_launchers_own_host_first(backend: Backend) -> None:
    node = (await backend.inventory(LaunchSpec())).nodes[0]
    assert node.cores
    assert 0 < node.memory_free <= node.memory_total


async def test_close_ends_what_still_runs(backend: Backend, spawn: Spawner) -> None:
    handle = await spawn.ready(Fault(ignore_sigterm=True))
    await asyncio.wait_for(backend.close(), SOON_S)
    assert handle.poll() == Exit(signal=signal.SIGKILL)
    assert await ended(handle) == Exit(signal=signal.SIGKILL)


async def test_close_may_be_called_again(backend: Backend) -> None:
    await backend.close()
    await backend.close()


async def test_ending_a_rank_after_close_is_harmless(backend: Backend, spawn: Spawner) -> None:
    handle = await spawn.ready()
    await backend.close()
    handle.terminate()
    handle.kill()


def _is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
