from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dplaunch.backend import RankBoot
from dplaunch.channel import RankChannel
from dplaunch.rank_main import EXIT_ENGINE_FAILED, load_function
from dplaunch.testing import Fault, When, poll_until
from tests.contract.boots import make_boot
from tests.contract.raw import RawLauncher

BECOME_RANK = "import pickle, sys; from dplaunch.rank_main import rank_main; rank_main(pickle.load(sys.stdin.buffer))"

Popen = subprocess.Popen[bytes]


@pytest.fixture
def launcher() -> Iterator[RawLauncher]:
    with tempfile.TemporaryDirectory(prefix="dpl") as directory, RawLauncher(Path(directory)) as raw:
        yield raw


@pytest.fixture
def become() -> Iterator[Callable[[RankBoot], Popen]]:
    """Runs rank_main in a fresh interpreter, which has a process group of its own."""
    started: list[Popen] = []

    def start(boot: RankBoot) -> Popen:
        command = [sys.executable, "-c", BECOME_RANK]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=None)
        started.append(process)
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(boot))
        process.stdin.close()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_rank_takes_its_environment_cores_and_title_from_the_boot(
    launcher: RawLauncher,
    become: Callable[[RankBoot], Popen],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    core = min(os.sched_getaffinity(0))
    become(make_boot(launcher.address, env={"ONLY": "this"}, cpus=(core,), log_file=tmp_path / "log"))
    launcher.handshake()
    report = launcher.call("dplaunch_report")
    assert report["env"]["ONLY"] == "this"
    assert "MASTER_PORT" not in report["env"]
    assert report["cpus"] == [core]
    assert report["process_title"].startswith("dplaunch::contract_dp3")


def test_a_rank_writes_all_that_it_says_to_its_log(
    launcher: RawLauncher, become: Callable[[RankBoot], Popen], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("from the incarnation before\n")
    become(make_boot(launcher.address, log_file=log))
    launcher.handshake()
    assert log.read_text().splitlines() == [
        "from the incarnation before",
        "stand-in engine of rank 3 is ready",
    ]


def test_a_rank_that_is_asked_to_end_exits_with_zero(
    launcher: RawLauncher, become: Callable[[RankBoot], Popen]
) -> None:
    process = become(make_boot(launcher.address))
    launcher.handshake()
    process.terminate()
    assert process.wait(10) == 0


def test_an_engine_that_raises_ends_the_rank_and_says_why_in_message_and_log(
    launcher: RawLauncher, become: Callable[[RankBoot], Popen], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    fault = Fault(when=When.AFTER_READY, error="no such weights")
    process = become(make_boot(launcher.address, fault=fault, log_file=log))
    launcher.handshake()
    assert process.wait(10) == EXIT_ENGINE_FAILED
    launcher.hear_out()
    assert launcher.failures == [("RuntimeError", "no such weights")]
    assert "Traceback" in log.read_text()
    assert "RuntimeError: no such weights" in log.read_text()


def test_of_a_worker_that_ray_holds_the_workers_own_error_is_told() -> None:
    ray_errors = pytest.importorskip("ray.exceptions")
    error = ray_errors.RayTaskError("initialize", "Traceback ...", OSError("address already in use"))
    sent: list[dict[str, object]] = []
    channel = RankChannel.__new__(RankChannel)
    channel._send = sent.append  # type: ignore[assignment, method-assign]
    channel.failed(error.as_instanceof_cause())
    assert sent == [{"status": "FAILED", "type": "OSError", "message": "address already in use"}]


def test_an_engine_that_cannot_be_imported_is_a_failure_like_any_other(
    launcher: RawLauncher, become: Callable[[RankBoot], Popen], tmp_path: Path
) -> None:
    boot = make_boot(launcher.address, engine="no_such_module:run", log_file=tmp_path / "log")
    process = become(boot)
    assert process.wait(10) == EXIT_ENGINE_FAILED
    launcher.hear_out()
    assert launcher.failures == [("ModuleNotFoundError", "No module named 'no_such_module'")]


def test_a_rank_whose_launcher_is_gone_still_ends_in_seconds(
    become: Callable[[RankBoot], Popen], tmp_path: Path
) -> None:
    boot = make_boot(f"ipc://{tmp_path}/nobody", engine="no_such_module:run", log_file=tmp_path / "log")
    assert become(boot).wait(10) == EXIT_ENGINE_FAILED


def test_the_launchers_import_path_is_added_behind_the_ranks_own(
    launcher: RawLauncher, become: Callable[[RankBoot], Popen], tmp_path: Path
) -> None:
    (tmp_path / "private_engine.py").write_text("from dplaunch.testing.standin import run\n")
    boot = make_boot(launcher.address, engine="private_engine:run", log_file=tmp_path / "log")
    become(replace(boot, sys_path=(*boot.sys_path, str(tmp_path))))
    launcher.handshake()


WATCHER = """
import os, sys, time
from dplaunch.channel import RankChannel
from dplaunch.rank_main import die_with
watched = int(sys.argv[1])
if not os.fork():
    time.sleep(600)  # a worker: in the group, and without a watch of its own
die_with(watched)
print("watching", flush=True)
time.sleep(600)
"""


def test_a_watched_process_takes_the_whole_group_with_it() -> None:
    with subprocess.Popen(["sleep", "600"]) as watched:
        command = [sys.executable, "-c", WATCHER, str(watched.pid)]
        with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as watcher:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == b"watching\n"
            watched.kill()
            assert watcher.wait(5) == -signal.SIGKILL
            poll_until(lambda: not _group_lives(watcher.pid), 5, "the end of the worker")


def test_watching_a_process_that_is_already_gone_ends_the_group_at_once() -> None:
    with subprocess.Popen(["true"]) as watched:
        watched.wait()
    command = [sys.executable, "-c", WATCHER, str(watched.pid)]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as watcher:
        assert watcher.wait(5) == -signal.SIGKILL


def test_a_function_is_found_by_module_and_name() -> None:
    assert load_function("os.path:join") is os.path.join


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
