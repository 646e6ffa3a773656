"""Engines that are asked in turn: the child that answers again and again, and whose turn it is. No GPU is needed."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest

from benchmarks.child import Child
from benchmarks.common import DPLAUNCH, STOCK
from benchmarks.gpu import devices, notes, turns
from benchmarks.gpu.models import shapes
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.turns import ALL, FEWER, ONE, SINGLE, Party

GIB = 2**30


def test_a_child_answers_as_often_as_it_is_asked_and_ends_with_what_it_has_started() -> None:
    with Child("tests.unit.answering", {"forks": True}, os.environ) as child:
        left = int(child.answer()["left"])
        assert psutil.pid_exists(left)
        assert [child.ask(word)["letters"] for word in ("a", "three", "of it")] == [1, 5, 5]
    assert not psutil.pid_exists(left)


@pytest.mark.parametrize("forks", [False, True])
def test_a_child_that_ends_without_an_answer_is_an_error_that_says_how(forks: bool) -> None:
    with Child("tests.unit.answering", {"forks": forks}, os.environ) as child:
        left = int(child.answer()["left"])
        for word in ("end", "and again"):
            with pytest.raises(RuntimeError, match=r"tests\.unit\.answering ended with 3 and no answer"):
                child.ask(word)
        if forks:
            os.kill(left, signal.SIGKILL)


class _Engine:
    """In place of a child with an engine."""

    log: list[str]

    def __init__(self, side: str, settings: Any, load: Any, executor: str | None) -> None:
        self._name = side
        self.log.append(f"{side} starts with {settings.dp}, {load.clients} clients, {executor}")

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"{self._name} ends")

    def answer(self) -> dict[str, float]:
        return {"from_start": 7.0}

    def ask(self, kind: str) -> dict[str, float]:
        self.log.append(f"{self._name} {kind}")
        return {"rate": float(len(self.log)), "cores": 0.5}


def test_engines_work_in_turn_and_in_every_second_round_the_other_way_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    _Engine.log = []
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(turns, "start_child", _Engine)
    monkeypatch.setattr(turns, "IDLE_S", 0.0)
    setup = Setup(dp=2, devices=0, directory=str(tmp_path / "work"))
    turns.in_turn("small", ALL)(setup, Notes("all"))
    assert _Engine.log[:2] == ["stock starts with 2, 8 clients, None", "dplaunch starts with 2, 8 clients, None"]
    forth = ["stock engine", "dplaunch engine", "stock batch", "dplaunch batch"]
    back = ["dplaunch engine", "stock engine", "dplaunch batch", "stock batch"]
    assert _Engine.log[2:] == [*forth, *back, *forth, "dplaunch ends", "stock ends"]
    told = notes.read(capsys.readouterr().out)
    assert [note.value for note in told if note.name == "small stock engine in turn"] == [3.0, 8.0, 11.0]


def test_each_engine_has_a_name_of_its_own_and_all_that_is_compared_is_measured() -> None:
    everybody = [(model, party) for model in ("small", "large") for party in (*ALL, SINGLE, *FEWER, *ONE)]
    names = [party.name(model, kind) for model, party in everybody for kind in turns.KINDS]
    assert len(set(names)) == len(names)
    assert Party(DPLAUNCH, 1, "mp").name("small", "batch") == "small dplaunch mp dp=1 batch in turn"
    assert {name for line in turns.SCRIPT.comparisons for name in (line.base, line.ours)} <= set(names)


@pytest.mark.parametrize(("model", "weights"), [("small", 1.2e9), ("large", 16.4e9)])
def test_engines_share_a_device_and_none_has_to_find_out_what_is_left(
    model: str, weights: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "size", lambda: 140 * GIB)
    args = turns._room(model, 2)
    assert args["gpu_memory_utilization"] == turns.SHARE / 2
    assert args["kv_cache_memory_bytes"] == pytest.approx(140 * turns.SHARE / 2 * GIB - weights, rel=0.02)
    assert len(shapes(model)) > 100


def test_stock_is_asked_as_it_is_and_one_rank_with_each_executor() -> None:
    assert [(party.side, party.dp, party.executor) for party in ONE] == [
        (STOCK, 1, None),
        (DPLAUNCH, 1, "mp"),
        (DPLAUNCH, 1, "uni"),
    ]
