"""Threads beside the loop, the directory of the sockets, events, exits and the tree of errors."""

from __future__ import annotations

import asyncio
import contextvars
import os
import resource
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dplaunch import errors
from dplaunch.backend import BACKEND_GROUP, Exit, find_backend, load_backend
from dplaunch.errors import BackendError, DplaunchError, ExitCode, RequestError
from dplaunch.events import Event, Level, RankState
from dplaunch.limits import allow_open_files
from dplaunch.runtime_dir import make_runtime_dir
from dplaunch.sync import new_loop
from dplaunch.testing import poll_until, poll_until_async
from dplaunch.testing.fake_backend import FakeBackend
from dplaunch.threads import in_thread

# Threads.


async def test_a_threads_result_comes_back_to_the_loop() -> None:
    assert await in_thread(lambda: threading.current_thread().name, "work") == "dplaunch-work"


async def test_a_threads_error_comes_back_to_the_loop() -> None:
    def fail() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        await asyncio.wait_for(in_thread(fail, "work"), 5)


async def test_a_thread_sees_the_callers_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    variable.set("mine")
    assert await in_thread(variable.get, "work") == "mine"


async def test_work_that_nobody_waits_for_any_more_does_not_disturb_the_loop() -> None:
    gate = threading.Event()
    future = in_thread(gate.wait, "work")
    future.cancel()
    gate.set()
    await poll_until_async(lambda: "dplaunch-work" not in [thread.name for thread in threading.enumerate()])
    assert future.cancelled()


def test_work_that_outlives_its_loop_ends_quietly() -> None:
    gate = threading.Event()
    loop = new_loop()

    async def begin() -> None:
        in_thread(gate.wait, "work")

    loop.run_until_complete(begin())
    loop.close()
    gate.set()
    poll_until(lambda: "dplaunch-work" not in [thread.name for thread in threading.enumerate()])


def test_a_thread_that_is_busy_does_not_keep_the_interpreter_from_ending() -> None:
    code = (
        "import asyncio, time\n"
        "from dplaunch.threads import in_thread\n"
        "async def main():\n"
        "    in_thread(lambda: time.sleep(60), 'work')\n"
        "asyncio.run(main())\n"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert time.monotonic() - started < 30


# The sockets' directory.


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short XDG_RUNTIME_DIR."""
    with tempfile.TemporaryDirectory(prefix="dpl") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        yield Path(path)


def test_the_sockets_directory_is_private_and_named_after_its_owner(runtime: Path) -> None:
    path = make_runtime_dir()
    assert path.parent == runtime / "dplaunch"
    assert path.name.startswith(f"{os.getpid()}-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert make_runtime_dir() != path


def test_what_a_killed_owner_left_is_removed_and_what_lives_stays(runtime: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = make_runtime_dir()
    dead, foreign = mine.parent / f"{ended.pid}-abc", mine.parent / "something-else"
    for path in (dead, foreign):
        path.mkdir()
        (path / "socket").touch()
    make_runtime_dir()
    assert not dead.exists()
    assert foreign.exists()
    assert mine.exists()


@pytest.mark.parametrize("given", ["", "/there/is/no/such/directory", "/" + "x" * 60])
def test_without_a_usable_runtime_directory_the_temporary_one_serves(
    given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", given)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert make_runtime_dir().parent == tmp_path / f"dplaunch-{os.getuid()}"


def test_a_directory_that_somebody_else_made_first_is_not_used(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (runtime / "dplaunch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("dplaunch.runtime_dir.os.getuid", lambda: os.geteuid() + 1)
    path = make_runtime_dir()
    assert path.parent == tmp_path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_sockets_address_fits_into_what_the_kernel_takes(runtime: Path) -> None:
    assert len(str(make_runtime_dir() / "i1023.99")) <= 107


# Exits.


@pytest.mark.parametrize(
    ("exit_", "text"),
    [
        (Exit(code=0), "exit code 0"),
        (Exit(code=3), "exit code 3"),
        (Exit(signal=9), "SIGKILL(-9)"),
        (Exit(signal=4, reason="node n2 was lost"), "SIGILL(-4): node n2 was lost"),
        (Exit(signal=250), "signal(-250)"),
        (Exit(), "exit status unknown"),
        (Exit.from_returncode(-11), "SIGSEGV(-11)"),
        (Exit.from_returncode(2, "why"), "exit code 2: why"),
    ],
)
def test_an_exit_says_how_a_process_ended(exit_: Exit, text: str) -> None:
    assert str(exit_) == text


# Backends.


def test_backends_are_found_by_name_and_the_ones_for_tests_are_not_advertised() -> None:
    assert find_backend("mp").value == "dplaunch.backends.mp:MpBackend"
    assert isinstance(load_backend("fake"), FakeBackend)
    with pytest.raises(BackendError) as caught:
        find_backend("no-such")
    assert "mp" in caught.value.hint
    assert "fake" not in caught.value.hint


def test_a_misspelt_backend_is_told_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint(name, "m:f", BACKEND_GROUP) for name in ("mp", "ray", "fake")]
    monkeypatch.setattr("dplaunch.backend.entry_points", lambda group: points)
    hints = {}
    for name in ("rya", "slurm"):
        with pytest.raises(BackendError, match=f"unknown backend '{name}'") as caught:
            find_backend(name)
        hints[name] = caught.value.hint
    assert hints["rya"] == "Did you mean ray? Backends on this machine: mp, ray."
    assert hints["slurm"] == "Backends on this machine: mp, ray."


# Events and errors.


def test_an_event_carries_the_time_and_cannot_be_changed() -> None:
    before = time.time()
    event = Event(message="rank 1 is ready", rank=1, state=RankState.READY)
    assert before <= event.at <= time.time()
    assert (event.level, event.phase, event.incarnation) == (Level.INFO, "", 0)
    with pytest.raises(AttributeError):
        event.message = "other"  # type: ignore[misc]


def test_an_error_shows_its_message_first_then_what_to_do_then_the_detail() -> None:
    error = DplaunchError("what happened", hint="what to do", detail="the log")
    assert str(error).splitlines() == ["what happened", "what to do", "the log"]
    assert str(DplaunchError("what happened")) == "what happened"


def test_a_request_error_keeps_its_place_and_whether_to_try_again() -> None:
    error = RequestError("lost", index=3, retryable=True)
    assert (error.index, error.retryable, str(error)) == (3, True, "lost")


def test_every_error_has_an_exit_code_and_says_when_it_is_raised() -> None:
    tree = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DplaunchError)]
    assert len(tree) >= 12
    for kind in tree:
        assert isinstance(kind.exit_code, ExitCode)
        assert kind is DplaunchError or str(kind.__doc__).startswith("Raised when"), kind


def test_exit_codes_do_not_collide() -> None:
    assert len({code.value for code in ExitCode}) == len(ExitCode.__members__)


# Polling.


def test_polling_that_ends_without_a_result_names_what_it_waited_for() -> None:
    with pytest.raises(TimeoutError, match=r"the end of days did not come within 0\.02 s"):
        poll_until(lambda: False, 0.02, "the end of days")


# Limits.


def test_the_command_may_open_as_many_files_as_the_kernel_lets_it() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
