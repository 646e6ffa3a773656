from __future__ import annotations

import io
import json
import re
import sys
import threading
from pathlib import Path

import pytest

from dplaunch.events import Event, Level, RankState
from dplaunch.identity import Identity
from dplaunch.live_table import screen
from dplaunch.plan import RankSpec
from dplaunch.progress import LiveReporter, Reporter, ReportKind, make_reporter

T0 = 1000.0


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """All that was ever written, without colours and cursor movements."""
        return [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line).strip() for line in self.getvalue().splitlines()]


def take_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in the place of both standard streams. No fixture: pytest sets the streams after fixtures ran."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def event(
    message: str,
    *,
    rank: int | None = None,
    state: RankState | None = None,
    phase: str = "",
    level: Level = Level.INFO,
    after: float = 0.0,
    incarnation: int = 0,
) -> Event:
    return Event(
        message=message,
        rank=rank,
        state=state,
        phase=phase,
        level=level,
        at=T0 + after,
        incarnation=incarnation,
    )


def ready(rank: int, after: float = 2.0) -> Event:
    return event(
        f"rank {rank} is ready after {after} s, pid {4711 + rank}", rank=rank, state=RankState.READY, after=after
    )


def rank_spec(
    rank: int, device_type: str = "cuda", *, node: str = "here", devices: tuple[str, ...] | None = None
) -> RankSpec:
    return RankSpec(
        identity=Identity("base", rank),
        node=node,
        device_type=device_type,
        devices=(str(rank),) if devices is None else devices,
        env={},
        cpus=(),
        log_file=Path("rank.log"),
    )


def shown(kind: ReportKind, *events: Event) -> list[str]:
    stream = io.StringIO()
    with make_reporter(kind, stream=stream, started_at=T0) as report:
        for one in events:
            report(one)
    return stream.getvalue().splitlines()


def test_off_a_terminal_each_change_is_one_line() -> None:
    loading = event("rank 0 loading", rank=0, state=RankState.STARTING, phase="loading", after=12.34)
    lines = shown(ReportKind.AUTO, event("rank 0 is starting", rank=0, after=0.04), loading, loading)
    assert lines == ["0.0s rank 0 is starting", "12.3s rank 0 loading"]


def test_the_same_change_of_a_later_incarnation_is_told_again() -> None:
    events = [event("rank 0 loading", rank=0, phase="loading", incarnation=number) for number in (0, 1)]
    assert len(shown(ReportKind.LINES, *events)) == 2


def test_warnings_and_errors_are_named_and_never_left_out() -> None:
    warning = event("rank 1 died: SIGKILL(-9)", rank=1, level=Level.WARNING, after=3.0)
    lines = shown(ReportKind.LINES, warning, warning, event("no rank is left", level=Level.ERROR, after=4.0))
    assert lines == ["3.0s warning: rank 1 died: SIGKILL(-9)"] * 2 + ["4.0s error: no rank is left"]


def test_quiet_shows_only_what_went_wrong() -> None:
    lines = shown(ReportKind.QUIET, ready(0), event("fewer cores", level=Level.WARNING))
    assert lines == ["0.0s warning: fewer cores"]


def test_json_logs_are_one_object_a_line() -> None:
    first = event("rank 1 loading", rank=1, state=RankState.STARTING, phase="loading", incarnation=2)
    lines = [json.loads(line) for line in shown(ReportKind.JSON, first, event("Grüße\nan alle"))]
    assert lines[0] == {
        "at": T0,
        "time": "1970-01-01T00:16:40.000Z",
        "kind": "note",
        "level": "info",
        "rank": 1,
        "incarnation": 2,
        "state": "starting",
        "phase": "loading",
        "message": "rank 1 loading",
        "data": {},
    }
    assert lines[1]["message"] == "Grüße\nan alle"
    assert lines[1]["rank"] is None
    assert lines[1]["state"] is None


def test_after_the_start_a_reporter_can_fall_quiet() -> None:
    stream = io.StringIO()
    with make_reporter(ReportKind.LINES, stream=stream, started_at=T0, quiet_after=True) as report:
        report(ready(0))
    report(event("rank 0 stopped", rank=0))
    report(event("rank 1 died", rank=1, level=Level.WARNING))
    assert [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()] == [
        "rank 0 is ready after 2.0 s, pid 4711",
        "warning: rank 1 died",
    ]


@pytest.mark.parametrize("kind", list(ReportKind))
def test_a_closed_stream_does_not_reach_the_group(kind: ReportKind) -> None:
    stream = io.StringIO()
    report = make_reporter(kind, stream=stream)
    stream.close()
    report(event("rank 1 died", level=Level.WARNING))


def test_on_a_terminal_a_table_is_drawn_until_all_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    before = sys.stdout
    with make_reporter(ranks=2, started_at=T0) as report:
        assert isinstance(report, LiveReporter)
        assert "dplaunch-progress" in thread_names()
        report.expect([rank_spec(0), rank_spec(1, "cpu")])
        report(event("rank 0 loading", rank=0, state=RankState.STARTING, phase="loading"))
        report(ready(0, after=2.0))
        assert "dplaunch-progress" in thread_names()
        report(ready(1, after=3.5))
        assert "dplaunch-progress" not in thread_names()
        report(event("rank 0 died", rank=0, level=Level.WARNING, after=9.0))
    assert terminal.lines()[-5:] == [
        "rank  state  phase  seconds  devices  process",
        "0  ready             2.0  cuda 0   pid 4711",
        "1  ready             3.5  core 1   pid 4712",
        "2 of 2 ranks ready, 3.5 s",
        "9.0s warning: rank 0 died",
    ]
    assert sys.stdout is before


def test_the_table_names_the_node_of_each_rank_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    with make_reporter(ranks=2, started_at=T0) as report:
        report.expect([rank_spec(0, node="n7", devices=("any", "any")), rank_spec(1, "cpu", node="n8")])
        report(ready(0, after=2.0))
        report(ready(1, after=3.5))
    assert [line for line in terminal.lines() if " on n" in line][-2:] == [
        "0  ready             2.0  2 x cuda on n7  pid 4711",
        "1  ready             3.5  core 1 on n8    pid 4712",
    ]


def test_a_failed_start_leaves_the_table_and_then_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    with make_reporter(ranks=2, started_at=T0) as report:
        report(event("rank 0 loading", rank=0, state=RankState.STARTING, phase="loading"))
        report(event("rank 1 died", rank=1, state=RankState.FAILED, level=Level.ERROR, after=4.0))
        assert "dplaunch-progress" not in thread_names()
    lines = terminal.lines()
    assert lines[-2:] == ["0 of 2 ranks ready, 4.0 s", "4.0s error: rank 1 died"]
    assert "failed" in lines[-3]


def test_an_exception_during_the_start_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), make_reporter(ranks=2):
        raise KeyboardInterrupt
    assert sys.stderr is terminal
    assert "dplaunch-progress" not in thread_names()
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is visible again
    assert not screen.locked()


def test_what_others_print_appears_whole_above_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    with make_reporter(ranks=1) as report:
        sys.stdout.write("half ")
        sys.stdout.write("a line\n")
        print("x" * 150, file=sys.stderr)  # noqa: T201
        sys.stdout.write("unfinished")
        report(event("fewer cores", level=Level.WARNING))
    text = terminal.getvalue()
    assert "half a line\n" in text
    assert "x" * 150 + "\n" in text
    assert "unfinished\n" in text
    assert "warning: fewer cores\n" in text


def test_a_stream_kept_during_the_start_works_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    with make_reporter(ranks=1):
        kept = sys.stderr
    kept.write("later\n")
    assert terminal.getvalue().endswith("later\n")
    assert kept.isatty()


def test_output_to_a_file_stays_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with make_reporter(ranks=1):
        assert sys.stdout is file
        print("for the file")  # noqa: T201
    assert file.getvalue() == "for the file\n"
    assert "for the file" not in terminal.getvalue()


def test_a_second_table_at_once_becomes_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    with make_reporter(ranks=1), make_reporter(ranks=1, started_at=T0) as second:
        second(event("rank 0 loading", rank=0, after=1.0))
    assert "1.0s rank 0 loading\n" in terminal.getvalue()


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with make_reporter(ranks=1, started_at=T0) as report:
        report(ready(0))
    assert terminal.getvalue() == "2.0s rank 0 is ready after 2.0 s, pid 4711\n"


@pytest.mark.parametrize(
    ("message", "process"),
    [
        ("rank 0 is ready after 3.0 s, pid 4711", "pid 4711"),
        ("rank 0 is ready, actor 0a1b on node2.", "actor 0a1b on node2"),
        ("rank 0 is ready, actor 0a1b", "actor 0a1b"),
    ],
)
def test_the_process_is_taken_from_the_message(monkeypatch: pytest.MonkeyPatch, message: str, process: str) -> None:
    terminal = take_terminal(monkeypatch)
    with make_reporter(ranks=1) as report:
        report(event(message, rank=0, state=RankState.READY))
    row = next(line for line in terminal.lines() if line.startswith("0  ready"))
    assert row.endswith(f"  {process}")


def test_reporters_import_nothing_heavy() -> None:
    import subprocess

    look = "import sys, dplaunch.progress; assert not {'rich', 'torch', 'vllm', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", look], check=True, timeout=60)


def test_a_reporter_off_a_terminal_is_the_plain_one() -> None:
    assert type(make_reporter(stream=io.StringIO())) is Reporter
