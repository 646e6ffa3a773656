"""events.jsonl: what it holds, and that a disk that fails costs events and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dplaunch import event_log
from dplaunch.event_log import FILE_NAME, OLDER_NAME, EventLog
from dplaunch.events import Event, Kind, Level, RankState

MakeLog = Callable[[], EventLog]


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def log(warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> EventLog:
    """A log that tries a failing disk again at once."""
    monkeypatch.setattr(event_log, "RETRY_S", 0.0)
    return EventLog(warnings.append)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def messages(path: Path) -> list[str]:
    return [line["message"] for line in lines(path)]


def test_every_event_is_a_line_with_its_group_and_time(log: EventLog, tmp_path: Path) -> None:
    log.open(tmp_path, "g")
    moved = Event(
        message="3 requests of rank 1 continue on others",
        kind=Kind.MOVED,
        rank=1,
        incarnation=2,
        level=Level.WARNING,
        at=1000.1234,
        data={"requests": 3},
    )
    log(moved)
    log(Event(message="rank 1 is starting", kind=Kind.STATE, rank=1, state=RankState.STARTING))
    log.close()
    first, second = lines(tmp_path / FILE_NAME)
    assert first == {
        "at": 1000.123,
        "time": "1970-01-01T00:16:40.123Z",
        "kind": "moved",
        "level": "warning",
        "rank": 1,
        "incarnation": 2,
        "state": None,
        "phase": "",
        "message": "3 requests of rank 1 continue on others",
        "data": {"requests": 3},
        "group": "g",
    }
    assert (second["kind"], second["state"]) == ("state", "starting")
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_what_happened_before_there_was_a_directory_comes_first(log: EventLog, tmp_path: Path) -> None:
    log(Event(message="the plan is made"))
    log.open(tmp_path, "g")
    log(Event(message="rank 0 is starting"))
    log.close()
    assert messages(tmp_path / FILE_NAME) == ["the plan is made", "rank 0 is starting"]


def test_what_json_cannot_hold_is_written_as_text(log: EventLog, tmp_path: Path) -> None:
    log.open(tmp_path, "g")
    log(Event(message="Grüße \ud800", data={"where": Path("/x")}))
    log.close()
    (line,) = lines(tmp_path / FILE_NAME)
    assert line["data"] == {"where": "/x"}
    assert line["message"].startswith("Grüße")


def test_a_log_that_has_grown_large_begins_anew_and_keeps_the_one_before(
    log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "MAX_BYTES", 1000)
    log.open(tmp_path, "g")
    for number in range(40):
        log(Event(message=f"event {number}"))
    log.close()
    for name in (FILE_NAME, OLDER_NAME):
        assert (tmp_path / name).stat().st_size <= 1000
    kept = messages(tmp_path / OLDER_NAME) + messages(tmp_path / FILE_NAME)
    assert kept == [f"event {number}" for number in range(40 - len(kept), 40)]


def test_a_full_disk_is_told_once_and_how_much_is_missing_when_there_is_room_again(
    log: EventLog, tmp_path: Path, warnings: list[str]
) -> None:
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    log.open(tmp_path, "g")
    for number in range(3):
        log(Event(message=f"event {number}"))
    assert warnings == [f"events cannot be written to {tmp_path / FILE_NAME}: No space left on device; trying again"]
    (tmp_path / FILE_NAME).unlink()
    log(Event(message="event 3"))
    log(Event(message="event 4"))
    log.close()
    assert messages(tmp_path / FILE_NAME) == ["3 events could not be written", "event 3", "event 4"]
    assert len(warnings) == 1


def test_a_disk_that_fails_is_not_asked_at_every_event(
    log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "RETRY_S", 3600.0)
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    log.open(tmp_path, "g")
    log(Event(message="lost"))
    (tmp_path / FILE_NAME).unlink()
    log(Event(message="lost too"))
    log.close()
    assert not (tmp_path / FILE_NAME).exists()


def test_a_directory_that_was_removed_is_told_and_used_again_when_it_is_back(
    log: EventLog, tmp_path: Path, warnings: list[str]
) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    log.open(directory, "g")
    log(Event(message="before"))
    shutil.rmtree(directory)
    log(Event(message="meanwhile"))
    assert "No such file or directory" in warnings[0]
    directory.mkdir()
    log(Event(message="after"))
    log.close()
    assert messages(directory / FILE_NAME) == ["1 event could not be written", "after"]


def test_a_line_that_the_disk_took_in_part_spoils_no_other(
    log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    log.open(tmp_path, "g")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr("dplaunch.event_log.os.write", lambda fd, data: write(fd, data[:10]))
        log(Event(message="torn"))
    log(Event(message="whole"))
    log.close()
    torn, *rest = (tmp_path / FILE_NAME).read_text().splitlines()
    assert len(torn) == 10
    assert [json.loads(line)["message"] for line in rest] == ["1 event could not be written", "whole"]
    assert len(warnings) == 1


def test_its_own_warning_does_not_come_back_to_it(tmp_path: Path) -> None:
    told: list[str] = []

    def warn(words: str) -> None:
        told.append(words)
        log(Event(message=words, level=Level.WARNING))

    log = EventLog(warn)
    log.open(tmp_path / "nowhere", "g")
    log(Event(message="lost"))
    log.close()
    assert len(told) == 1
