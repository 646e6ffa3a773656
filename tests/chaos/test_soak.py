"""The soak run for half a minute, always with the same seed; `make soak` is the long one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.engines import Options
from tests.chaos.load import End
from tests.chaos.report import Report
from tests.chaos.resources import FD_GROWTH, Resources, Sample
from tests.chaos.soak import soak

SEED = 20


@pytest.mark.leaves("looks for what is left by itself")
async def test_half_a_minute_of_harm_loses_nothing(vllm_imported: None, tmp_path: Path) -> None:
    report = await soak(Options(seed=SEED, minutes=0.5, streams=16), tmp_path)
    assert report.violations == [], report.text()
    assert sum(report.faults.values()) >= 3, report.text()
    assert report.deaths >= 3, report.text()
    assert report.outcomes[End.EXACT] >= 50, report.text()


def report(**more: object) -> Report:
    return Report(seed=1, backend="mp", engine="stand-in", ranks=2, minutes=1.0, **more)  # type: ignore[arg-type]


def test_a_report_says_what_was_violated_with_the_seed_and_the_last_events() -> None:
    text = report(violations=["3 requests failed: error"], last_events=["1.0 rank 1 died"]).text()
    for words in ("seed 1", "VIOLATION          3 requests failed: error", "rank 1 died"):
        assert words in text


def test_a_report_is_json_too() -> None:
    assert json.loads(report(faults={"kill": 2}).json())["faults"] == {"kill": 2}


def test_what_grows_behind_the_warm_up_is_seen_and_what_grows_before_is_not() -> None:
    def run(*fds: int) -> list[str]:
        return Resources([Sample(at=float(at), rss=0, fds=count, shm=0) for at, count in enumerate(fds)]).growth()

    assert run(*range(40), *[40] * 200) == []
    (words,) = run(*[40] * 100, *[40 + FD_GROWTH + 1] * 100)
    assert words.startswith("file descriptors grew")
