"""The commands for running groups, over the real socket and a group that is played."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dplaunch import commands
from dplaunch.cli import main
from dplaunch.control import ControlServer
from dplaunch.control_wire import GROUP_FILE, SOCKET_NAME
from dplaunch.errors import ExitCode, GroupClosedError
from dplaunch.leaving import DRAIN_S
from dplaunch.logs import prepare_log_dir, release_log_dir
from dplaunch.runtime_dir import make_runtime_dir
from dplaunch.testing import poll_until
from tests.unit.statuses import group_status, rank_status

Output = pytest.CaptureFixture[str]


class Played:
    """A group in a thread of its own."""

    def __init__(self, name: str) -> None:
        self.status = group_status(name=name, pid=os.getpid())
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.loop = asyncio.new_event_loop()
        self.stop = asyncio.Event()
        self.up = threading.Event()
        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(self._live()))
        self.thread.start()
        self.up.wait(30)

    async def _live(self) -> None:
        directory = make_runtime_dir()
        server = ControlServer(self._answer)
        server.open(directory / SOCKET_NAME)
        (directory / GROUP_FILE).write_text(json.dumps({"name": self.status["name"], "pid": os.getpid()}))
        self.up.set()
        await self.stop.wait()
        await server.close(1.0)

    async def _answer(self, verb: str, arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        if verb == "status":
            yield {"type": "result", "result": self.status}
            return
        self.asked.append((verb, arguments))
        if arguments.get("ranks") == [7]:
            raise GroupClosedError("another change is under way", hint="Wait for it.")
        for message, phase in (("rank 2 is starting", ""), ("rank 2 loading", "loading"), ("rank 2 is ready", "")):
            yield {"type": "event", "event": {"message": message, "phase": phase}}
        result = {"ends_process": False} if verb == "stop" else self.status
        yield {"type": "result", "result": result}

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], Played]]:
    """Runs played groups, the only ones that the commands see."""
    groups: list[Played] = []

    def start(name: str) -> Played:
        groups.append(Played(name))
        return groups[-1]

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with tempfile.TemporaryDirectory(prefix="dpl") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        monkeypatch.setattr("dplaunch.runtime_dir._own_name", lambda: "dplaunch-test-nobody-has-this")
        yield start
        for group in groups:
            group.close()


Play = Callable[[str], Played]


# Which group.


@pytest.mark.parametrize("argv", ["status", "stop", "scale --dp 3", "restart --all", "logs"])
def test_without_a_group_each_command_says_so(argv: str, play: Play, capsys: Output) -> None:
    assert main(argv.split()) == ExitCode.NO_GROUP
    out, err = capsys.readouterr()
    assert out == ""
    assert "no group is running" in err.splitlines()[0]


@pytest.mark.parametrize("argv", ["stop", "scale --dp 3", "restart --all", "logs"])
def test_with_several_groups_a_command_that_acts_wants_a_name(argv: str, play: Play, capsys: Output) -> None:
    groups = [play("a"), play("b")]
    assert main(argv.split()) == ExitCode.NO_GROUP
    err = capsys.readouterr().err
    assert f"2 groups are running: a (pid {os.getpid()}), b (pid {os.getpid()})" in err
    assert "--group NAME" in err
    assert [group.asked for group in groups] == [[], []]
    assert main(["stop", "--group", "b"]) == 0
    assert [len(group.asked) for group in groups] == [0, 1]


# status.


def test_status_lists_every_group_or_the_one_that_is_named(play: Play, capsys: Output) -> None:
    play("a"), play("b")
    assert main(["status"]) == 0
    both = capsys.readouterr().out
    assert main(["status", "--group", "b"]) == 0
    one = capsys.readouterr().out
    assert "a  ready  2 of 2 ranks ready  up 3m12s" in both
    assert "b  ready" in both
    assert "a  ready" not in one


def test_status_as_json_is_all_that_is_known(play: Play, capsys: Output) -> None:
    group = play("a")
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [group.status]


def test_a_watched_status_is_shown_again_until_ctrl_c(
    play: Play, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, looks = play("a"), 0

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        group.status["address"] = f"http://look-{looks}"
        if looks == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("dplaunch.status_view.time.sleep", sleep)
    assert main(["status", "--watch"]) == 0
    # Off a terminal only the last picture stays.
    assert "http://look-2" in capsys.readouterr().out


def test_status_imports_nothing_heavy_and_so_answers_at_once(play: Play) -> None:
    play("a")
    code = (
        "import sys; from dplaunch.cli import main; main(['status']);"
        "print([m for m in ('torch', 'vllm', 'ray', 'rich', 'transformers', 'zmq', 'uvloop') if m in sys.modules])"
    )
    # The child has the real runtime directories too: the one of this test is told by the environment.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a  ready" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


# stop, scale, restart.


def test_what_happens_during_a_change_is_shown_and_then_how_it_ended(play: Play, capsys: Output) -> None:
    group = play("a")
    assert main(["scale", "--dp", "3", "--drain", "2.5"]) == 0
    assert capsys.readouterr().out == "rank 2 is starting\nrank 2 is ready\n2 of 2 ranks ready\n"
    assert group.asked == [("scale", {"dp": 3, "drain": 2.5})]


def test_restart_is_told_which_ranks(play: Play, capsys: Output) -> None:
    group = play("a")
    assert main(["restart", "--rank", "1", "--rank", "0"]) == 0
    assert main(["restart", "--all", "--rolling"]) == 0
    assert group.asked == [
        ("restart", {"ranks": [1, 0], "rolling": False}),
        ("restart", {"rolling": True}),
    ]
    capsys.readouterr()
    for wrong in (["restart"], ["restart", "--all", "--rank", "1"]):
        assert main(wrong) == ExitCode.USAGE
        assert "--rank R (may be repeated) or --all" in capsys.readouterr().err


def test_the_help_names_the_groups_own_drain_time(capsys: Output) -> None:
    for command in ("scale", "restart"):
        assert main([command, "--help"]) == 0
        assert f"without it, {DRAIN_S:g} s." in " ".join(capsys.readouterr().out.split())


def test_what_the_group_refuses_is_the_commands_error(play: Play, capsys: Output) -> None:
    play("a")
    assert main(["restart", "--rank", "7"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "dplaunch: error: another change is under way\nWait for it.\n"


def test_stop_waits_for_the_launchers_end(play: Play, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    group = play("a")
    waited: list[int] = []
    monkeypatch.setattr(commands, "_await_end", waited.append)
    assert main(["stop", "--drain", "5"]) == 0
    assert group.asked == [("stop", {"drain": 5.0})]
    assert capsys.readouterr().out.splitlines()[-1] == "stopped"
    assert waited == []  # This one lives in a process that does other things too.


def test_the_end_of_a_process_is_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        waiting = threading.Thread(target=commands._await_end, args=(process.pid,))
        waiting.start()
        assert process.stdin is not None
        process.stdin.close()
        waiting.join(60)
        assert not waiting.is_alive()
    commands._await_end(process.pid)


# logs.


def log_files(directory: Path) -> dict[int, Path]:
    files = {rank: directory / f"rank{rank}.log" for rank in (0, 1)}
    for rank, path in files.items():
        path.write_text("".join(f"line {number} of {rank}\n" for number in range(3)))
    return files


def test_logs_are_the_last_lines_of_each_rank_or_of_one(play: Play, capsys: Output, tmp_path: Path) -> None:
    files = log_files(tmp_path)
    play("a").status["ranks"] = [rank_status(rank, log_file=str(path)) for rank, path in files.items()]
    assert main(["logs", "--lines", "1"]) == 0
    assert capsys.readouterr().out == "rank 0 | line 2 of 0\nrank 1 | line 2 of 1\n"
    assert main(["logs", "--rank", "1", "--lines", "2"]) == 0
    assert capsys.readouterr().out == "rank 1 | line 1 of 1\nrank 1 | line 2 of 1\n"
    assert main(["logs", "--rank", "5"]) == ExitCode.USAGE
    assert "there is no log of rank 5" in capsys.readouterr().err


def test_followed_logs_show_what_is_new_and_new_ranks_until_the_group_ends(
    play: Play, capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dplaunch.logs_view.LOOK_S", 0.01)
    files = log_files(tmp_path)
    group = play("a")
    group.status["ranks"] = [rank_status(0, log_file=str(files[0]))]
    codes: list[int] = []
    following = threading.Thread(target=lambda: codes.append(main(["logs", "-f", "--lines", "1"])))
    following.start()
    seen = ""

    def shows(words: str) -> bool:
        nonlocal seen
        seen += capsys.readouterr().out
        return words in seen

    poll_until(lambda: shows("line 2 of 0"), 30)
    with files[0].open("a") as log:
        log.write("more of 0\n")
    poll_until(lambda: shows("more of 0"), 30)
    late = tmp_path / "rank2.log"
    group.status["ranks"] = [*group.status["ranks"], rank_status(2, log_file=str(late))]

    def late_line_shows() -> bool:
        # A new log is followed from where it is when it is first seen.
        with late.open("a") as log:
            log.write("late\n")
        return shows("rank 2 | late")

    poll_until(late_line_shows, 30)
    group.loop.call_soon_threadsafe(group.stop.set)
    following.join(60)
    assert codes == [0]


def test_without_a_running_group_logs_are_those_of_the_newest_one(play: Play, capsys: Output, tmp_path: Path) -> None:
    for name in ("older", "newer"):
        directory = prepare_log_dir(tmp_path / "state" / "dplaunch" / "logs" / name, owned=True)
        (directory / "rank0.log").write_text(f"last words of {name}\n")
        (directory / "frontend.log").write_text("not a rank's\n")
        release_log_dir(directory)
    assert main(["logs"]) == 0
    out, err = capsys.readouterr()
    assert out == "rank 0 | last words of newer\n"
    assert "no group is running; these are the logs of newer" in err
    assert main(["logs", "--group", "older"]) == 0
    assert capsys.readouterr().out == "rank 0 | last words of older\n"
    assert main(["logs", "--group", "../x"]) == ExitCode.NO_GROUP
