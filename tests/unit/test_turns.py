"""Whose turn it is, among real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dplaunch.testing import poll_until
from dplaunch.turns import is_made, turn

ONE = """
import os, sys
from pathlib import Path
from dplaunch.turns import turn

directory, name, forks = Path(sys.argv[1]), sys.argv[2], len(sys.argv) > 3
with turn(directory, "key", name, lambda other: print("waits for", other, flush=True)) as mine:
    if forks and os.fork() == 0:
        os.execvp("cat", ["cat"]) if sys.argv[3] == "exec" else os.read(0, 1)
        os._exit(0)
    print("ours" if mine.ours else "made", flush=True)
    if mine.ours and sys.stdin.readline():
        (directory / "thing").touch()
        mine.made([str(directory / "thing")])
"""
"""A process that wants the thing: says what it does, and makes it when it is told to; without a word it leaves it."""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that want one thing; they are gone afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", ONE, str(tmp_path), name, *options]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:  # waits, and closes its pipes
            pass


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()


def test_one_makes_it_and_those_that_waited_find_it_made(tmp_path: Path, start: Start) -> None:
    first = start("rank 2")
    assert says(first) == "ours"
    others = [start(f"rank {number}") for number in (0, 1, 3)]
    assert [says(each) for each in others] == ["waits for rank 2"] * 3
    tell(first)
    assert [says(each) for each in others] == ["made"] * 3
    assert is_made(tmp_path / "key.json")


def test_who_comes_when_it_is_made_waits_for_nobody(tmp_path: Path, start: Start) -> None:
    first = start("rank 0")
    assert says(first) == "ours"
    mark, thing = tmp_path / "key.json", tmp_path / "thing"
    thing.touch()
    mark.write_text(f'["{thing}"]')
    second = start("rank 1")
    assert says(second) == "made", "the lock is held, and does not matter"
    assert first.poll() is None


@pytest.mark.parametrize("child", ["fork", "exec"])
def test_the_next_has_its_turn_when_the_holder_is_killed_and_a_child_of_it_lives_on(start: Start, child: str) -> None:
    first = start("rank 0", child)
    assert says(first) == "ours"
    second = start("rank 1")
    assert says(second) == "waits for rank 0"
    first.kill()
    first.wait()
    assert says(second) == "ours"
    third = start("rank 2")
    assert says(third) == "waits for rank 1", "who waits is told of the new holder"


def test_the_next_has_its_turn_when_one_fails(start: Start) -> None:
    first = start("rank 0")
    assert says(first) == "ours"
    second = start("rank 1")
    assert says(second) == "waits for rank 0"
    assert first.stdin is not None
    first.stdin.close()
    assert says(second) == "ours"


def test_what_was_removed_is_made_again(tmp_path: Path) -> None:
    thing = tmp_path / "thing"
    thing.touch()
    with turn(tmp_path, "key", "rank 0", pytest.fail) as mine:
        mine.made([str(thing)])
    with turn(tmp_path, "key", "rank 1", pytest.fail) as mine:
        assert not mine.ours
        mine.made(["/no/such/place"])
    assert is_made(tmp_path / "key.json"), "who has not made it has nothing to say"
    thing.unlink()
    with turn(tmp_path, "key", "rank 1", pytest.fail) as mine:
        assert mine.ours


def test_what_left_nothing_on_the_disk_is_made_by_all(tmp_path: Path) -> None:
    with turn(tmp_path, "key", "rank 0", pytest.fail) as mine:
        mine.made([])
    with turn(tmp_path, "key", "rank 1", pytest.fail) as mine:
        assert not mine.ours, "a model without compiled code: nobody waits for it the next time"


def test_other_keys_have_other_turns(tmp_path: Path, start: Start) -> None:
    assert says(start("rank 0")) == "ours"
    with turn(tmp_path, "other", "rank 1", pytest.fail) as mine:
        assert mine.ours


def test_a_directory_without_room_for_a_lock_is_told_before_the_block(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), turn(tmp_path / "file", "key", "rank 0", pytest.fail):
        pytest.fail("nobody holds anything here")


def test_nothing_but_the_lock_and_the_mark_is_left(tmp_path: Path) -> None:
    descriptors = set(os.listdir("/proc/self/fd"))
    with turn(tmp_path, "key", "rank 0", pytest.fail) as mine:
        mine.made([])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["key.json", "key.lock"]
    poll_until(lambda: set(os.listdir("/proc/self/fd")) == descriptors)
