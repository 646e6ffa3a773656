"""Many ranks: what is measured of them, and the goals; no group is started."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from benchmarks import bench_scale, scale
from dplaunch.events import RankState


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, [1]), (2, [1, 2]), (16, [1, 2, 4, 8, 16]), (24, [1, 2, 4, 8, 16, 24])],
)
def test_sizes_double_up_to_the_largest(largest: int, sizes: list[int]) -> None:
    assert bench_scale.sizes_up_to(largest) == sizes


@pytest.mark.parametrize(("power", "back", "missed"), [(1.0, 2, 0), (1.5, 2, 1), (1.0, 1, 1)])
def test_growth_beyond_linear_and_ranks_that_stay_away_miss_their_goals(
    power: float,
    back: int,
    missed: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    def measured(sizes: Sequence[int], **options: Any) -> dict[str, float]:
        asked.append((list(sizes), options["kill"]))
        names = ("cold start", "idle launcher", "idle zygote", "back seconds")
        found = dict.fromkeys(names, 1.0) | {"killed": 2, "back": back}
        for size in sizes[1:]:
            found |= {f"{size} start": 1 + 0.05 * size**power}
            found |= dict.fromkeys((f"{size} {column}" for column in ("close", "routing", "request")), 1.0)
        return found

    monkeypatch.setattr(bench_scale, "measure_scale", measured)
    monkeypatch.setattr("sys.argv", ["bench", "--largest", "16", "--rounds", "2"])
    bench_scale.main()
    output = capsys.readouterr().out
    assert asked == [([16, 1, 2, 4, 8, 16], 2)] * 2
    assert output.count("MISSED") == missed
    assert json.loads(output.splitlines()[-1])["samples"]["16 close"] == [1.0, 1.0]


def test_the_routers_cost_is_measured_with_as_many_requests_as_were_asked_for() -> None:
    assert scale.routing_us(3, count=50) > 0


async def test_the_way_of_each_request_is_timed_and_the_client_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Client:
        added: ClassVar[list[Any]] = []

        def add(self, request: Any) -> None:
            self.added.append(request)

    async def ask(engine: Any, number: int, prompt: Any, tokens: int) -> int:
        group.client.add((number, tokens))
        return tokens

    monkeypatch.setattr(scale, "ask_engine", ask)
    group: Any = SimpleNamespace(client=Client(), engine=None)
    assert await scale._adding_us(group, 3) > 0
    assert Client.added == [(0, 1), (1, 1), (2, 1)]
    assert vars(group.client) == {}


async def test_as_many_ranks_are_killed_as_asked_and_counted_when_they_are_back() -> None:
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    ranks = [
        SimpleNamespace(
            handle=SimpleNamespace(pid=process.pid), state=RankState.READY, identity=SimpleNamespace(incarnation=0)
        )
        for process in processes
    ]

    async def restart(at: int) -> None:
        await asyncio.to_thread(processes[at].wait)
        ranks[at].identity.incarnation = 1

    group: Any = SimpleNamespace(supervisor=SimpleNamespace(ranks=ranks))
    try:
        restarts = asyncio.gather(restart(0), restart(1))
        measured = await scale._kill(group, 2)
        await restarts
        assert (measured["killed"], measured["back"]) == (2, 2)
        assert processes[2].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_largest_group_asks_for_no_memory_that_a_machine_of_its_ranks_would_need(tmp_path: Path) -> None:
    spec = scale._group(str(tmp_path), 256).spec
    assert (spec.dp, spec.backend, spec.engine_args["kv_cache_memory_bytes"]) == (256, "mp", 2**20)
