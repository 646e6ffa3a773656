"""What the benchmarks share, and that each line of their tables gets its samples; nothing is measured."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_dispatch, bench_launch, child, common, dispatch, own_ray, ray_launch, servers
from benchmarks.common import Comparison, Samples, Settings
from benchmarks.load import Load

SETTINGS = Settings(model=Path("model"), dp=2, dtype="float32", rounds=2, quick=False)
LINE = Comparison(title="the start", unit="s", base="theirs", ours="ours", goal=0.5)


# Ratios and goals.


def test_a_ratio_is_that_of_the_medians() -> None:
    assert LINE.ratio({"theirs": [10.0, 20.0, 900.0], "ours": [5.0, 1.0, 800.0]}) == 0.25


@pytest.mark.parametrize(
    ("more_is_better", "ours", "verdict"),
    [
        (False, 5.0, "<= 0.50 met"),
        (False, 5.1, "<= 0.50 MISSED"),
        (True, 5.0, ">= 0.50 met"),
        (True, 4.9, ">= 0.50 MISSED"),
    ],
)
def test_a_goal_is_met_up_to_the_ratio_itself(more_is_better: bool, ours: float, verdict: str) -> None:
    line = Comparison(title="", unit="", base="theirs", ours="ours", goal=0.5, more_is_better=more_is_better)
    assert line.verdict({"theirs": [10.0], "ours": [ours]}) == verdict


def test_a_line_without_a_goal_has_no_verdict() -> None:
    line = Comparison(title="", unit="", base="theirs", ours="ours")
    assert line.verdict({"theirs": [10.0], "ours": [9.0]}) == ""


def test_a_goal_of_none_is_missed_by_one() -> None:
    line = Comparison(title="", unit="", base="all", ours="lost", goal=0.0)
    assert line.verdict({"all": [40.0], "lost": [0.0]}) == "<= 0.00 met"
    assert line.verdict({"all": [40.0], "lost": [1.0]}) == "<= 0.00 MISSED"
    assert line.verdict({"all": [0.0], "lost": [1.0]}) == "<= 0.00 MISSED"


def test_every_other_round_runs_backwards_and_keeps_all_samples() -> None:
    ran: list[str] = []

    def contender(name: str) -> Callable[[], Mapping[str, float]]:
        def run() -> Mapping[str, float]:
            ran.append(name)
            return {name: float(len(ran))}

        return run

    samples = common.run_rounds(3, {name: contender(name) for name in "abc"})
    assert "".join(ran) == "abccbaabc"
    assert samples == {"a": [1.0, 6.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 4.0, 9.0]}


def test_the_last_line_of_a_report_is_json_with_all_samples(capsys: pytest.CaptureFixture[str]) -> None:
    samples: Samples = {"theirs": [10.0, 12.0], "ours": [4.0, 4.8], "beside": [1.0, 2.0]}
    common.report("launch", SETTINGS, [LINE], samples, ("mp", "ray"))
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert (result["benchmark"], result["ratio"], result["ratios"]) == ("launch", 0.4, {"the start": 0.4})
    assert result["samples"] == samples
    assert result["goals"] == {"the start": 0.5}
    assert [line.split() for line in table[-2:]] == [
        ["median", "of", "2", "mp", "ray", "ratio", "goal"],
        ["the", "start", "(s)", "11.0", "4.4", "0.400", "<=", "0.50", "met"],
    ]


# Children.


def test_a_child_answers_what_it_was_asked(tmp_path: Path) -> None:
    code = "from benchmarks import child\nprint('noise')\nchild.answer({'twice': 2 * child.question()['number']})\n"
    assert _ask(tmp_path, code, number=21) == {"twice": 42}


def test_a_child_that_gives_no_answer_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)asked_child ended with 3 and no answer\n.*no room for it"):
        _ask(tmp_path, "import sys\nprint('no room for it')\nsys.exit(3)\n")


def _ask(directory: Path, code: str, **asked: Any) -> dict[str, float]:
    (directory / "asked_child.py").write_text(code)
    return child.ask_child("asked_child", asked, os.environ | {"PYTHONPATH": str(directory)})


def test_a_measured_process_is_led_to_no_cluster_that_runs_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "RAY_ADDRESS" not in servers.environment()


def test_a_cluster_of_the_benchmarks_own_is_on_loopback_and_ends_with_its_block() -> None:
    pytest.importorskip("ray")
    with own_ray.ray_head() as address:
        host, port = address.split(":")
        socket.create_connection((host, int(port)), 5).close()
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), 5)


# Tables.


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What the launch benchmark for Ray started, in place of starting it."""
    started: list[tuple[str, ...]] = []

    @contextlib.contextmanager
    def server(settings: Settings, backend: str = "mp", flags: Sequence[str] = ()) -> Iterator[Any]:
        started.append((backend, *flags))
        yield None, 10.0

    def lives(backend: str, settings: Settings) -> dict[str, float]:
        return dict.fromkeys(("first", "second", "restart"), 1.3 if backend == "ray" else 1.0)

    monkeypatch.setattr(ray_launch, "stock_server", lambda settings: server(settings, "stock"))
    monkeypatch.setattr(ray_launch, "dplaunch_server", server)
    monkeypatch.setattr(ray_launch, "ray_head", lambda: contextlib.nullcontext("127.0.0.1:7"))
    monkeypatch.setattr(ray_launch, "measure_lives", lives)
    return started


def test_every_line_for_ray_has_samples_and_the_goal_is_mps_time_and_a_third(
    launched: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    ray_launch.run(SETTINGS)
    goals = json.loads(capsys.readouterr().out.splitlines()[-1])["goals"]
    assert set(goals.values()) == {1.3}
    assert len(goals) == 2
    assert launched[:4] == [("stock",), ("mp",), ("ray",), ("ray", "--ray-address", "127.0.0.1:7")]


@pytest.mark.parametrize(("option", "started", "lines"), [([], 4, 7), (["--python-only"], 0, 3)])
def test_the_backend_and_its_part_are_chosen_by_options(
    option: list[str],
    started: int,
    lines: int,
    launched: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--backend", "ray", "--rounds", "1", "--model", "model", *option])
    bench_launch.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["benchmark"], len(result["ratios"]), len(launched)) == ("launch-ray", lines, started)


def test_every_line_of_the_dispatch_table_has_samples_and_each_backend_starts_first_as_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    firsts: list[tuple[bool, str]] = []

    def measured(standin: bool, first: str, amount: dispatch.Amount, settings: Settings) -> dict[str, float]:
        firsts.append((standin, first))
        names = [f"{backend} {what}" for backend in ("mp", "ray") for what in ("latency", "p95", "call", "rate")]
        return {**dict.fromkeys(names, 2.0), "ray own cpu": 1.0}

    monkeypatch.setattr(bench_dispatch, "measure_dispatch", measured)
    monkeypatch.setattr("sys.argv", ["bench", "--rounds", "2", "--model", "model"])
    bench_dispatch.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["ratios"].values()) == {1.0}
    assert result["goals"]["vllm: a request of one token, alone"] == 1.05
    a_round = [(False, "mp"), (False, "ray"), (True, "mp"), (True, "ray")]
    assert firsts == [*a_round, *reversed(a_round)]


@pytest.mark.parametrize(
    "options", [["--backend", "slurm"], ["--python-only"], ["--backend", "ray", "--with-default"]], ids=" ".join
)
def test_options_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--model", "model", *options])
    with pytest.raises(SystemExit, match="2"):
        bench_launch.main()


def test_settings_give_both_sides_the_same_arguments() -> None:
    given = argparse.Namespace(model=Path("model"), dp=3, dtype="bfloat16", rounds=5, quick=True)
    settings = common.settings_of(given)
    assert settings.rounds == 1
    assert settings.engine_flags[:3] == ["--dtype", "bfloat16", "--enforce-eager"]
    assert [flag for flag in settings.engine_flags if flag.startswith("--")] == [
        f"--{name.replace('_', '-')}" for name in settings.engine_args
    ]


# Dispatch.


def test_blocks_go_there_and_back_again() -> None:
    assert "".join(dispatch.turns("ab", 4)) == "abbaabba"


async def test_both_backends_are_asked_the_same_and_each_time_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[tuple[Any, int]]] = {"mp": [], "ray": []}
    clock = 0.0

    async def ask(engine: str, number: int, prompt: Any, tokens: int) -> int:
        asked[engine].append((prompt, tokens))
        return tokens

    async def timed(work: Callable[[], Awaitable[Any]]) -> float:
        nonlocal clock
        before = sum(map(len, asked.values()))
        await work()
        clock += 1e-3
        return clock if sum(map(len, asked.values())) > before else 5e-6

    monkeypatch.setattr(dispatch, "ask_engine", ask)
    monkeypatch.setattr(dispatch, "_timed", timed)
    amount = dispatch.Amount(requests=4, calls=4, blocks=2, load=Load(clients=2, requests=4, tokens=3))
    groups: Any = {name: _StandInGroup(name) for name in asked}
    measured = await dispatch._ask_all(groups, amount, tokens=False)
    assert asked["mp"] == asked["ray"]
    assert [tokens for _, tokens in asked["mp"]].count(1) == amount.load.clients + amount.requests
    assert groups["mp"].called == groups["ray"].called == [0, 1, 0, 1]
    assert measured["mp call"] == pytest.approx(5.0)
    # After two warm-ups each: mp's two, ray's two with the calls between, ray's again, mp's again.
    mp = [5.0, 6.0, 17.0, 18.0]
    assert measured["mp latency"] == pytest.approx(statistics.median(mp))
    assert measured["ray latency"] == pytest.approx(statistics.median([9.0, 10.0, 13.0, 14.0]))


class _StandInGroup:
    """What the benchmark uses of a group."""

    def __init__(self, name: str) -> None:
        self.engine = name
        self.client = SimpleNamespace(ranks=[0, 1])
        self.called: list[int] = []

    async def call(self, method: str, *, rank: int) -> list[Any]:
        self.called.append(rank)
        return [{}]
