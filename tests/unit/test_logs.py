from __future__ import annotations

import io
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dplaunch import tee as tees
from dplaunch.errors import ExitCode, LogDirError
from dplaunch.logs import OWNER_FILE, clean, newest, prepare_log_dir, prune_old, release_log_dir, tail
from dplaunch.tee import Tee

BAR = "Loading:  50%|#####     | 1/2 [00:01<00:01,  1.2it/s]"


def poll_until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        pause.wait(0.01)


def test_a_new_log_directory_is_private(tmp_path: Path) -> None:
    path = prepare_log_dir(tmp_path / "a" / "b")
    assert path.is_absolute()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert list(path.iterdir()) == []


def test_an_existing_log_directory_keeps_its_mode_and_content(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "mine.txt").write_text("x")
    prepare_log_dir(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("path", ["/proc/logs", "/dev/null/logs", "/dev/null"])
def test_a_directory_that_cannot_be_written_is_named_with_the_flag_to_pass(path: str) -> None:
    with pytest.raises(LogDirError) as caught:
        prepare_log_dir(Path(path))
    assert path in caught.value.message
    assert "--log-dir" in caught.value.hint
    assert caught.value.exit_code == ExitCode.LOG_DIR


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LogDirError):
        prepare_log_dir(tmp_path)


def launches(parent: Path, count: int, *, live: int = -1) -> list[Path]:
    """Owned directories, the oldest first; the one numbered `live` is still in use."""
    paths = []
    for number in range(count):
        path = prepare_log_dir(parent / f"launch-{number}", owned=True)
        if number != live:
            release_log_dir(path)
        owner = json.loads((path / OWNER_FILE).read_text())
        (path / OWNER_FILE).write_text(json.dumps(owner | {"created": 1000.0 + number}))
        paths.append(path)
    return paths


def test_pruning_keeps_the_newest_launches(tmp_path: Path) -> None:
    paths = launches(tmp_path, 5)
    assert sorted(prune_old(tmp_path, keep=2)) == paths[:3]
    assert sorted(tmp_path.iterdir()) == paths[3:]


def test_pruning_spares_what_a_live_launcher_uses(tmp_path: Path) -> None:
    paths = launches(tmp_path, 3, live=0)
    assert prune_old(tmp_path, keep=1) == [paths[1]]
    assert paths[0].exists()


def test_pruning_removes_what_a_dead_launcher_left(tmp_path: Path) -> None:
    launcher = (
        "import pathlib, sys\n"
        "from dplaunch.logs import prepare_log_dir\n"
        "prepare_log_dir(pathlib.Path(sys.argv[1]), owned=True)\n"
    )
    subprocess.run([sys.executable, "-c", launcher, str(tmp_path / "dead")], check=True)
    assert prune_old(tmp_path, keep=0) == [tmp_path / "dead"]


def test_a_pid_that_is_used_again_does_not_keep_a_directory(tmp_path: Path) -> None:
    (path,) = launches(tmp_path, 1, live=0)
    owner = json.loads((path / OWNER_FILE).read_text())
    (path / OWNER_FILE).write_text(json.dumps(owner | {"started": owner["started"] - 3600}))
    assert prune_old(tmp_path, keep=0) == [path]


def test_pruning_never_touches_what_dplaunch_did_not_make(tmp_path: Path) -> None:
    user = prepare_log_dir(tmp_path / "user")
    (target,) = launches(tmp_path / "elsewhere", 1)
    (tmp_path / "link").symlink_to(target)
    foreign = prepare_log_dir(tmp_path / "foreign", owned=True)
    owner = json.loads((foreign / OWNER_FILE).read_text())
    (foreign / OWNER_FILE).write_text(json.dumps(owner | {"host": f"not-{socket.gethostname()}", "pid": 0}))
    assert prune_old(tmp_path, keep=0) == []
    assert user.exists()
    assert target.exists()
    assert foreign.exists()


def test_the_newest_launch_is_told_apart_from_what_else_lies_there(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    (tmp_path / "user").mkdir()
    assert newest(tmp_path) is None
    launches(tmp_path, 3)
    assert newest(tmp_path) == tmp_path / "launch-2"


def test_pruning_a_directory_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    assert prune_old(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("plain", "plain"),
        ("\x1b[36m(EngineCore)\x1b[0;0m INFO up", "(EngineCore) INFO up"),
        ("\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "link"),
        (f"\r{BAR}\r{BAR}", ""),
        ("Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00,  3.3it/s]", ""),
        (f"\r{BAR}Traceback (most recent call last):", "Traceback (most recent call last):"),
        (f"Traceback (most recent call last):\r{BAR}", "Traceback (most recent call last):"),
        ("Working ━━━━━━━━━━╸━━━━━  64% 0:00:03", ""),
        ("windows line\r", "windows line"),
        ("accepted 50% | of it", "accepted 50% | of it"),
    ],
)
def test_a_line_is_cleaned(line: str, text: str) -> None:
    assert clean(line) == text


def test_the_tail_is_the_last_lines_that_say_something(tmp_path: Path) -> None:
    log = tmp_path / "rank.log"
    log.write_bytes(b"one\n\ntwo \xff\n\r 50%|## | 1/2 [00:00<00:01, 1it/s]\nthree\n   \nfour")
    assert tail(log, 3) == ["two \ufffd", "three", "four"]
    assert tail(log) == ["one", "two \ufffd", "three", "four"]
    assert tail(log, 0) == []


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert tail(tmp_path / "none.log") == []


def test_the_tail_of_a_big_file_reads_little_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "rank.log"
    with log.open("wb") as file:
        file.truncate(8 << 30)  # sparse: reading all of it would take far too long
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(b"line %d\n" % number for number in range(100)))
    assert tail(log, 2) == ["line 98", "line 99"]


def test_a_bar_redrawn_for_megabytes_does_not_hide_what_came_before(tmp_path: Path) -> None:
    log = tmp_path / "rank.log"
    log.write_text("before\n" + f"\r{BAR}" * 5000 + "\nafter\n")
    assert tail(log, 2) == ["before", "after"]
    log.write_text(f"\r{BAR}" * 50000)
    assert tail(log, 2) == []


def test_tee_shows_new_lines_with_their_rank(tmp_path: Path) -> None:
    paths = {rank: tmp_path / f"rank{rank}.log" for rank in (0, 1)}
    paths[0].write_text("from an earlier launch\n")
    out = io.StringIO()
    with Tee(paths, out) as tee:
        with paths[0].open("a") as log:
            log.write("zero\n")
        paths[1].write_text("\x1b[31mone\x1b[0m\nunfinished")
        poll_until(lambda: "zero" in out.getvalue() and "one" in out.getvalue())
        assert "unfinished" not in out.getvalue()
        tee.add(2, tmp_path / "rank2.log")
        (tmp_path / "rank2.log").write_text("two\n")
    assert sorted(out.getvalue().splitlines()) == [
        "rank 0 | zero",
        "rank 1 | one",
        "rank 1 | unfinished",
        "rank 2 | two",
    ]


def test_tee_can_begin_with_the_last_lines_and_misses_none_that_follow(tmp_path: Path) -> None:
    log = tmp_path / "rank0.log"
    log.write_text("one\ntwo\nthree\nunfini")
    out = io.StringIO()
    with Tee({0: log}, out, history=2):
        poll_until(lambda: "three" in out.getvalue())
        with log.open("a") as file:
            file.write("shed\n")
    assert out.getvalue().splitlines() == ["rank 0 | two", "rank 0 | three", "rank 0 | unfinished"]


def test_tee_leaves_no_thread_and_stops_twice(tmp_path: Path) -> None:
    tee = Tee({0: tmp_path / "rank0.log"}, io.StringIO())
    tee.start()
    assert "dplaunch-tee" in [thread.name for thread in threading.enumerate()]
    tee.stop()
    tee.stop()
    assert "dplaunch-tee" not in [thread.name for thread in threading.enumerate()]


def test_tee_follows_a_file_that_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tees, "TEE_INTERVAL_S", 0.01)
    log = tmp_path / "rank0.log"
    log.write_text("a long line of an earlier launch\n")
    out = io.StringIO()
    with Tee({0: log}, out):
        log.write_text("new\n")
        poll_until(lambda: "new" in out.getvalue())
    assert out.getvalue() == "rank 0 | new\n"


def test_tee_colours_ranks_differently_when_asked(tmp_path: Path) -> None:
    out = io.StringIO()
    paths = {rank: tmp_path / f"rank{rank}.log" for rank in (0, 1)}
    with Tee(paths, out, color=True):
        for path in paths.values():
            path.write_text("x\n")
    first, second = sorted(out.getvalue().splitlines(), key=lambda line: "rank 1" in line)
    assert first == "\x1b[36mrank 0 | \x1b[0mx"
    assert second == "\x1b[33mrank 1 | \x1b[0mx"


def test_tee_without_a_stream_writes_to_stderr_as_it_is_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tee = Tee({0: tmp_path / "rank0.log"})
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    with tee:
        (tmp_path / "rank0.log").write_text("x\n")
    assert later.getvalue() == "rank 0 | x\n"


def test_tee_ends_quietly_when_its_stream_is_closed(tmp_path: Path) -> None:
    out = io.StringIO()
    with Tee({0: tmp_path / "rank0.log"}, out):
        out.close()
        (tmp_path / "rank0.log").write_text("x\n")
