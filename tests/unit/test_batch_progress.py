"""How far a batch is: the bar, the lines and the function that tell it."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Mapping

import pytest

from dplaunch import bars, batch_progress
from dplaunch.bars import NotebookBar, TerminalBar, choose_bar
from dplaunch.batch_progress import BatchProgress, BatchState, Progress
from dplaunch.live_table import screen
from dplaunch.progress import make_reporter
from tests.unit.test_progress import take_terminal


class Clock:
    """time.monotonic by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batch_progress, "time", clock)
    return clock


def work(clock: Clock, prompts: int, seconds: float, progress: Progress = None) -> None:
    """A batch that takes so long, ten tokens a prompt."""
    with BatchProgress(prompts, progress) as bar:
        for _ in range(prompts):
            clock.now += seconds / prompts
            bar.advance(10)


def test_a_batch_of_seconds_gets_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal = take_terminal(monkeypatch)
    work(clock, 40, 4.0)
    text = terminal.getvalue()
    assert "20/40 prompts  100 tokens/s  ETA 0:00:02" in text
    assert "40/40 prompts  100 tokens/s  ETA 0:00:00" in text
    assert " 5/40" not in text
    assert not screen.locked()


def test_a_batch_of_less_than_a_second_shows_nothing(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal = take_terminal(monkeypatch)
    work(clock, 40, 0.9)
    assert terminal.getvalue() == ""


def test_a_bar_that_is_not_wanted_is_not_drawn(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal = take_terminal(monkeypatch)
    work(clock, 40, 4.0, False)
    assert terminal.getvalue() == ""


def test_off_a_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("FORCE_COLOR", "1")
    work(clock, 40, 4.0)
    assert stream.getvalue() == ""


def test_an_empty_batch_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    with BatchProgress(0):
        pass
    assert terminal.getvalue() == ""


def test_a_bar_is_drawn_at_most_four_times_a_second(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal = take_terminal(monkeypatch)
    work(clock, 4000, 4.0)
    assert terminal.getvalue().count("tokens/s") <= 16


def test_a_bar_waits_while_a_table_has_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    take_terminal(monkeypatch)
    with make_reporter(ranks=1):
        assert choose_bar(3) is None
    bar = choose_bar(3)
    assert isinstance(bar, TerminalBar)
    bar.close()


def test_a_terminal_that_goes_away_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal = take_terminal(monkeypatch)
    with BatchProgress(10) as bar:
        clock.now = 2.0
        bar.advance()
        terminal.close()
        clock.now = 4.0
        bar.advance()
    assert not screen.locked()


def state(done: int, tokens: int, *, left_s: float | None, shares: Mapping[int, float] | None = None) -> BatchState:
    """One second into a batch of four."""
    return BatchState(total=4, done=done, resumed=0, tokens=tokens, seconds=1.0, left_s=left_s, shares=shares or {})


def test_in_a_notebook_one_line_is_overwritten() -> None:
    stream = io.StringIO()
    bar = NotebookBar(4, stream)
    bar.draw(state(1, 12, left_s=None))
    bar.draw(state(4, 1234, left_s=0.0))
    bar.close()
    _, first, last = stream.getvalue().split("\r")
    assert first.startswith("█" * 7 + "░" * 23 + " 1/4 prompts  12 tokens/s  ETA -:--:--")
    assert last.startswith("█" * bars.BAR_WIDTH + " 4/4 prompts  1,234 tokens/s  ETA 0:00:00")
    assert last.endswith("\n")


def test_in_a_pipe_lines_are_written_now_and_then_and_at_the_end_if_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    work(clock, 50, 25.0, True)
    assert stream.getvalue().splitlines() == [
        "20/50 prompts  20 tokens/s  ETA 0:00:15",
        "40/50 prompts  20 tokens/s  ETA 0:00:05",
        "50/50 prompts  20 tokens/s  ETA 0:00:00",
    ]


@pytest.mark.parametrize(
    ("shares", "shown"),
    [
        ({0: 1.0}, "12 tokens/s  ETA"),
        ({0: 0.514, 1: 0.486}, "12 tokens/s  ranks 51/49%  ETA"),
        ({rank: 0.1 + 0.01 * rank for rank in range(8)}, "12 tokens/s  ranks 10-17%  ETA"),
    ],
    ids=["one rank", "few", "many"],
)
def test_each_ranks_share_is_shown_where_there_are_several(shares: Mapping[int, float], shown: str) -> None:
    stream = io.StringIO()
    NotebookBar(4, stream).draw(state(1, 12, left_s=None, shares=shares))
    assert shown in stream.getvalue()


def test_a_function_is_told_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal, told = take_terminal(monkeypatch), list[BatchState]()
    work(clock, 40, 4.0, told.append)
    assert terminal.getvalue() == ""
    assert 12 <= len(told) <= 17
    assert (told[-1].done, told[-1].total, told[-1].tokens, told[-1].left_s) == (40, 40, 400, 0.0)
    assert told[-1].tokens_per_s == pytest.approx(100)


def test_a_function_is_told_of_a_batch_of_a_moment_too(clock: Clock) -> None:
    told: list[BatchState] = []
    work(clock, 2, 0.0, told.append)
    assert [(state.done, state.tokens_per_s) for state in told] == [(2, 0.0)]


def test_what_came_from_a_file_counts_as_done_and_not_for_the_pace(clock: Clock) -> None:
    told: list[BatchState] = []
    with BatchProgress(10, told.append, resumed=6) as bar:
        clock.now += 2.0
        bar.advance(50)
    (state,) = told
    assert (state.done, state.resumed, state.tokens_per_s, state.left_s) == (7, 6, 25.0, 6.0)


def test_a_batch_that_is_all_there_is_told_once(clock: Clock) -> None:
    told: list[BatchState] = []
    with BatchProgress(3, told.append, resumed=3):
        pass
    assert [(state.done, state.tokens) for state in told] == [(3, 0)]


def test_a_share_is_of_the_tokens_since_the_batch_began(clock: Clock) -> None:
    counted = {0: 1000, 1: 10}
    with BatchProgress(2, False, rank_tokens=lambda: counted) as bar:
        assert bar.state.shares == {}
        counted |= {0: 1030, 1: 20, 2: 60}
        assert bar.state.shares == {0: 0.3, 1: 0.1, 2: 0.6}


def test_what_watches_a_batch_imports_nothing_heavy() -> None:
    look = "import sys, dplaunch.batch_progress; assert not {'rich', 'torch', 'vllm', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", look], check=True, timeout=60)
