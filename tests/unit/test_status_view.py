"""How a group's status is shown."""

from __future__ import annotations

import re

import pytest

from dplaunch.status_view import as_text, duration
from tests.unit.statuses import group_status, rank_status

DIED = {"code": None, "signal": 9, "reason": "the node was lost", "text": "SIGKILL(-9): the node was lost"}


def shown(width: int, **facts: object) -> list[str]:
    return re.sub(r"\x1b\[[\d;]*m", "", as_text([group_status(**facts)], width=width)).splitlines()  # type: ignore[arg-type]


def test_a_group_has_its_facts_and_a_row_for_each_rank() -> None:
    ranks = [
        rank_status(0, in_flight=12, tokens_per_s=431.4),
        rank_status(1, state="down", incarnation=2, process="", restarts=2, last_exit=DIED, instance_id="g-r2_dp1"),
    ]
    lines = shown(
        200, ranks=ranks, state="degraded", requests={"in_flight": 12, "queued": 3, "finished": 90, "moved": 4}
    )
    text = "\n".join(lines)
    assert lines[0] == "g  degraded  1 of 2 ranks ready  up 3m12s"
    for words in (
        "http://127.0.0.1:8000",
        "mp, independent, weights 0, pid 4700",
        "12 in flight, 3 queued, 90 finished, 4 moved, 431 tokens/s",
        "/logs/g",
    ):
        assert words in text
    table = lines[lines.index("") + 1 :]
    assert table[0].split("  ")[0] == "rank"
    assert "ready" in table[1]
    assert "pid 4710" in table[1]
    for words in ("down", "SIGKILL(-9)", "g-r2_dp1", "rank1.log"):
        assert words in table[2]
    assert "not shown" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_nothing_is_wider_than_the_terminal_and_what_is_left_out_is_named(width: int) -> None:
    ranks = [rank_status(n, node=f"node-{n}", last_exit=DIED, instance_id=f"dpl-07e832d7c4f4-r1_dp{n}") for n in (0, 1)]
    lines = shown(
        width, name="dpl-07e832d7c4f4", ranks=ranks, model="/models/" + "x" * 200, log_dir="/logs/" + "y" * 200
    )
    assert max(map(len, lines)) <= width
    assert any(line.startswith("not shown") for line in lines)
    for title in ("rank", "state", "in flight", "tok/s", "process"):
        assert title in lines[lines.index("") + 1]


def test_a_group_without_a_server_weights_or_running_ranks_is_shown_too() -> None:
    waiting = rank_status(0, state="waiting", since=None, process="", devices=["any", "any"])
    text = "\n".join(shown(120, ranks=[waiting], address=None, weights=None, state="starting", error="it died"))
    for words in ("no HTTP server", "weights 0", "waiting", "2 x cuda", "it died"):
        assert words in text


def test_a_group_that_sleeps_and_a_rank_that_is_stale_are_told_of() -> None:
    stale = rank_status(1, state="stale", stale="the tensors were written to after the update")
    weights = {"version": "step-9", "checksum": "", "lost": "", "loras": []}
    text = "\n".join(shown(120, ranks=[rank_status(0), stale], weights=weights, stance="asleep"))
    for words in ("weights step-9", "asleep: requests wait", "the tensors were written to after the update"):
        assert words in text


def test_a_group_whose_ranks_are_all_gone_is_shown() -> None:
    assert shown(80, ranks=[])[0] == "g  ready  0 of 0 ranks ready  up 3m12s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m00s"), (192, "3m12s"), (18_120, "5h02m"), (273_600, "3d04h")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
