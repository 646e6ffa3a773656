"""The examples, in a shorter form: they train for real, and their ranks are real engines."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

STEPS, PHASES = 120, 3

# All in one process: from the second launch on, vLLM is there already.
PROGRAM = f"""
import dataclasses, json, sys
from examples import trainer_callback, train_eval_loop

def loop(*flags):
    words = ["--steps", "{STEPS}", "--phases", "{PHASES}", "--problems", "64", *flags]
    return [dataclasses.asdict(row) for row in train_eval_loop.run(train_eval_loop.parse(words))]

found = {{
    "plain": loop(),
    "killed": loop("--kill-a-rank"),
    "trainer": trainer_callback.run(trainer_callback.parse("--steps {STEPS} --every 60 --problems 64".split())),
}}
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the examples found, and what they printed."""
    place = tmp_path_factory.mktemp("examples")
    command = [sys.executable, "-c", PROGRAM, str(place / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((place / "found.json").read_text())
    return {**found, "printed": done.stdout}


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows[1:]]


def test_the_score_follows_the_training(found: dict[str, Any]) -> None:
    rows = found["plain"]
    assert [row["step"] for row in rows] == [0, 40, 80, 120]
    assert [row["weights"] for row in rows] == ["0", "40", "80", "120"]
    assert math.isnan(rows[0]["loss"])
    losses = [row["loss"] for row in rows[1:]]
    assert losses == sorted(losses, reverse=True)
    assert rows[0]["score"] == 0.0
    assert rows[-1]["score"] > 0.5


def test_a_rank_that_is_killed_amid_an_evaluation_changes_no_number_of_the_table(found: dict[str, Any]) -> None:
    assert "rank 1 was killed with 63 answers to come" in found["printed"]
    assert without_times(found["killed"]) == without_times(found["plain"])


def test_the_trainers_log_has_the_scores_of_the_weights_of_those_steps(found: dict[str, Any]) -> None:
    scores = {each["step"]: each["eval_score"] for each in found["trainer"] if "eval_score" in each}
    assert set(scores) == {60, 120}
    assert scores[60] < scores[120]
    assert scores[120] > 0.3
