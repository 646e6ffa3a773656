"""The benchmark of batches: the lengths that it draws, what each way asks, and that each line gets its samples."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import batches, bench_batch
from benchmarks.batches import ORDERS, Amount, longest_first
from benchmarks.common import Settings


@pytest.mark.parametrize("order", ORDERS)
def test_lengths_are_skewed_within_their_bounds_and_the_same_for_both_ways(order: str) -> None:
    draw = ORDERS[order]
    lengths = draw(4096, random.Random(3))
    assert lengths == draw(4096, random.Random(3))
    assert (min(lengths), max(lengths)) == (batches.SHORTEST, batches.LONGEST)
    assert statistics.mean(lengths) > 1.4 * statistics.median(lengths)


def test_answers_of_one_task_stand_together_and_are_alike() -> None:
    def spread(lengths: list[int]) -> float:
        return statistics.stdev(statistics.mean(lengths[at : at + 32]) for at in range(0, len(lengths), 32))

    drawn = [(ORDERS["by task"](256, random.Random(n)), ORDERS["shuffled"](256, random.Random(n))) for n in range(20)]
    assert statistics.mean(spread(a) for a, _ in drawn) > 2 * statistics.mean(spread(b) for _, b in drawn)
    assert longest_first(64, random.Random(1)) == sorted(ORDERS["shuffled"](64, random.Random(1)), reverse=True)


def test_answers_that_are_given_again_are_somewhat_longer_or_shorter() -> None:
    lengths = ORDERS["shuffled"](512, random.Random(5))
    again = batches.changed(lengths, random.Random(6))
    assert lengths != again == batches.changed(lengths, random.Random(6))
    factors = [new / old for new, old in zip(again, lengths, strict=True) if 60 < old < 200]
    assert 0.2 < statistics.stdev(map(math.log, factors)) < 0.4


class PlayedGroup:
    """Two ranks that answer as many tokens as are asked for."""

    def __init__(self) -> None:
        self.client = SimpleNamespace(ranks=[0, 1], load={0: 0, 1: 0})
        self.asked: list[tuple[int | None, list[Any]]] = []

    async def generate(
        self, prompts: Any, params: Any, *, data_parallel_rank: int | None = None, progress: bool
    ) -> list[Any]:
        self.asked.append((data_parallel_rank, list(prompts)))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * one)]) for one in params]


async def test_chunks_are_equal_contiguous_and_pinned_and_ours_is_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "final_params", lambda tokens: tokens)
    group = PlayedGroup()
    lengths = [8, 9, 10, 11, 12]
    assert [await batches._ask(group, way, list("abcde"), lengths) for way in batches.WAYS] == [50, 50]
    assert group.asked == [(0, ["a", "b", "c"]), (1, ["d", "e"]), (None, list("abcde"))]


async def test_idle_is_the_time_since_the_first_rank_had_nothing_left() -> None:
    group = PlayedGroup()

    async def work() -> int:
        for load in ({0: 1, 1: 1}, {0: 1, 1: 0}):
            group.client.load = load
            await asyncio.sleep(0.2)
        return 100

    rate, idle = await batches.timed(group, work)
    assert 0 < rate < 100 / 0.4
    assert 25 < idle < 75


def test_every_line_of_the_table_has_samples_and_each_round_draws_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[bool, int]] = []

    def measured(standin: bool, turn: int, amount: Amount, settings: Settings) -> dict[str, float]:
        asked.append((standin, turn))
        return {
            f"{way} {order} {what}": 2.0 if way == "chunks" else 3.0
            for way in batches.WAYS
            for order in batches.BATCHES
            for what in ("rate", "idle")
        }

    monkeypatch.setattr(bench_batch, "measure_batches", measured)
    monkeypatch.setattr("sys.argv", ["bench", "--rounds", "2", "--model", "model"])
    bench_batch.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["ratios"].values()) == {1.5}
    assert set(result["goals"].values()) == {1.25}
    assert (len(result["ratios"]), len(result["goals"])) == (20, 10)
    assert asked == [(True, 0), (False, 0), (False, 1), (True, 1)]
