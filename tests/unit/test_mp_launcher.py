"""A launcher as a process of its own: what ends with it, and what stays as it was in it."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from dplaunch.testing import poll_until
from tests.unit.zygote_rig import gone, run_script

GONE_WITHIN_S = 5.0
"""Seconds in which all must be gone when the launcher was killed: what users are promised."""

LAUNCHER = """
import asyncio, json, os, pathlib, signal, sys
open("executed", "a").write("x")
from tests.unit.zygote_rig import Rig

async def main():
    directory = pathlib.Path(sys.argv[1])
    async with Rig(directory) as rig:
        {body}

asyncio.run(main())
"""

MANY = """
        pids = {"zygote": rig.zygote_pid}
        for engine in ("stay", "have_children", "share_memory", "ignore_sigterm"):
            rank, saw = await rig.start(engine)
            pids[engine] = rank.pid
            if engine == "have_children":
                pids |= {"child": saw["children"][0], "child away": saw["children"][1]}
            if engine == "share_memory":
                name = saw["name"]
        os.kill(pids["ignore_sigterm"], signal.SIGSTOP)
        os.kill(pids["child"], signal.SIGSTOP)
        print(json.dumps([pids, name]), flush=True)
        await asyncio.Event().wait()
"""


@pytest.mark.parametrize("zygote", ["alive", "dead"])
def test_all_are_gone_soon_after_the_launcher_is_killed(tmp_path: Path, zygote: str) -> None:
    # A stopped process can only be ended by another, and without the zygote there is none.
    body = MANY if zygote == "alive" else re.sub(".*SIGSTOP.*", "", MANY)
    launcher = run_script(LAUNCHER.replace("{body}", body), str(tmp_path), directory=tmp_path)
    with launcher:
        assert launcher.stdout is not None
        pids, name = json.loads(launcher.stdout.readline())
        if zygote == "dead":
            os.kill(pids["zygote"], signal.SIGKILL)
            # With nobody else to end it, one in a session of its own has to see by itself that it is alone.
            os.kill(pids.pop("child away"), signal.SIGKILL)
        assert not gone(pids["stay"])
        launcher.kill()
        poll_until(lambda: gone(*pids.values()), GONE_WITHIN_S, what=f"the end of {pids}")
    memory = Path("/dev/shm") / name
    if zygote == "alive":
        poll_until(lambda: not memory.exists(), what="the removal of the shared memory")
    memory.unlink(missing_ok=True)


def test_a_launcher_that_is_killed_while_the_zygote_imports_leaves_nothing(tmp_path: Path) -> None:
    body = "print(rig.zygote_pid, flush=True); await asyncio.Event().wait()"
    with run_script(LAUNCHER.replace("{body}", body), str(tmp_path), directory=tmp_path) as launcher:
        assert launcher.stdout is not None
        zygote = int(launcher.stdout.readline())
        launcher.kill()
        poll_until(lambda: gone(zygote), GONE_WITHIN_S, what="the zygote's end")


@pytest.mark.parametrize("start_method", ["FORK", "SPAWN"])
@pytest.mark.parametrize("by_stdin", [False, True], ids=["script", "stdin"])
def test_no_rank_runs_the_users_main_again(tmp_path: Path, by_stdin: bool, start_method: str) -> None:
    body = """
        rank, saw = await rig.start("tell_all")
        print(await rank.wait(), saw["main"], rig.zygote_pid)
    """
    text = LAUNCHER.replace("{body}", body)
    if start_method == "SPAWN":
        text = text.replace("Rig(directory)", "Rig(directory, 'spawn')")
    launcher = run_script(text, str(tmp_path), by_stdin=by_stdin, directory=tmp_path)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, output
    *said, zygote = output.split()
    assert said == ["exit", "code", "0", "None"]
    assert (tmp_path / "executed").read_text() == "x"
    poll_until(lambda: gone(int(zygote)), what="the zygote's end with its launcher")


def test_the_users_process_stays_as_it_was(tmp_path: Path) -> None:
    body = """
        pass
    before = look()
    async with Rig(directory) as rig:
        await rig.start("stay")
        await rig.backend.call("tests.unit.zygote_engines:reverse", b"")
        assert look() == before, (look(), before)
    """
    look = """
import multiprocessing.forkserver, logging
signal.signal(signal.SIGCHLD, lambda *_: None)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
def look():
    return (
        {number: signal.getsignal(number) for number in signal.valid_signals()},
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
        dict(os.environ), os.getcwd(), sys.path[:],
        multiprocessing.get_start_method(allow_none=True),
        multiprocessing.forkserver._forkserver._forkserver_pid,
        logging.getLogger().handlers[:], asyncio.get_event_loop_policy(),
    )
async def main"""
    text = LAUNCHER.replace("{body}", body).replace("\nasync def main", look)
    launcher = run_script(text, str(tmp_path), directory=tmp_path)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, output
