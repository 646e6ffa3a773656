"""lm-evaluation-harness over real ranks: the answers of transformers, on mp and on ray, and when a rank is killed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dplaunch
from benchmarks.compare_lm_eval import ROOT, TASK_DIR, TASKS, Answers, answers, difference, evaluate, kill_amid, scores
from dplaunch.testing import poll_until
from tests.conftest import shared_pids
from tests.leaks import Snapshot, left_of_a_shared_group
from tests.ray_for_tests import RayForTests
from tests.real.conftest import ENGINE_ARGS

pytest.importorskip("lm_eval")

pytestmark = pytest.mark.leaves("the harness and its data sets keep threads and descriptors of their own")

SAMPLES = 8
"""Of each task; `make compare-lm-eval` takes them all."""

NEAR = 1e-3
"""How far log-likelihoods in float32 may be apart that another engine, or another batch, has computed."""


@pytest.fixture(scope="module", autouse=True)
def _at_the_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where the tasks' files are looked for; and no data set is looked for elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def of_transformers(smollm: str) -> dict[str, Any]:
    """What the harness's own model for transformers finds."""
    return evaluate("hf", {"pretrained": smollm, "dtype": "float32", "device": "cpu", "batch_size": 8}, SAMPLES)


def assert_same(found: dict[str, Any], other: dict[str, Any]) -> None:
    ours, theirs = scores(found), scores(other)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert (ours["acc"], ours["exact match"]) == (theirs["acc"], theirs["exact match"])
    assert_same_answers(answers(found), answers(other))


def assert_same_answers(ours: Answers, theirs: Answers) -> None:
    assert {task: len(each) for task, each in ours.items()} == {task: len(each) for task, each in theirs.items()}
    differing, apart = difference(ours, theirs)
    assert differing == 0
    assert apart < NEAR


def test_a_group_that_runs_answers_as_transformers_does_and_stays(
    group: dplaunch.Group, of_transformers: dict[str, Any], tmp_path: Path
) -> None:
    from dplaunch.integrations.lm_eval import DplaunchLM

    counters = group._group.client.rank_counters
    before = {rank: counters[rank].tokens for rank in (0, 1)}
    resume = tmp_path / "answers.jsonl"
    with DplaunchLM(group=group, resume=str(resume)) as lm:
        found = evaluate(lm, limit=SAMPLES)
    assert_same(found, of_transformers)
    assert 0 < scores(found)["acc"] <= 1
    assert found["config"]["dp"] == 2
    assert all(counters[rank].tokens > before[rank] for rank in (0, 1))

    # Once more: all answers are in the file, and no rank is asked.
    after = {rank: counters[rank].tokens for rank in (0, 1)}
    assert answers(evaluate(DplaunchLM(group=group, resume=str(resume)), limit=SAMPLES)) == answers(found)
    assert {rank: counters[rank].tokens for rank in (0, 1)} == after
    assert len(group.generate(["Still here?"])) == 1


class Borrowed:
    """A group that was launched, as far as whoever launched it can see."""

    def __init__(self, group: dplaunch.Group) -> None:
        self._borrowed = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._borrowed, name)


def test_a_model_that_is_named_launches_what_it_is_told_to_and_nobody_holds_it_after_the_run(
    group: dplaunch.Group, smollm: str, of_transformers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dplaunch.integrations.lm_eval

    launched: list[dict[str, Any]] = []
    alive: list[weakref.ref[Borrowed]] = []

    def launch(**options: Any) -> Any:
        launched.append(options)
        made = Borrowed(group)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(dplaunch, "launch", launch)
    dplaunch.integrations.lm_eval.register()
    options = {"dp": 2, "backend": "ray", "devices": "0;1", "dtype": "float32", "min_ranks": 2, "enforce_eager": True}
    found = evaluate("dplaunch", {"pretrained": smollm, "batch_size": 1, **options}, limit=SAMPLES)
    assert_same(found, of_transformers)
    (told,) = launched  # Once, for three tasks.
    assert told["model"] == smollm
    assert {name: told[name] for name in options} == {**options, "devices": (("0",), ("1",))}
    assert None not in told.values()
    # A group that nobody holds is closed.
    assert [ref() for ref in alive] == [None]


def test_what_cannot_be_said_beside_a_group_is_refused(group: dplaunch.Group) -> None:
    from dplaunch.integrations.lm_eval import DplaunchLM

    no_group: Any = "mine"
    with pytest.raises(dplaunch.UsageError, match="dtype, max_num_seqs cannot be changed in a group that runs"):
        DplaunchLM(group=group, max_num_seqs=3, dtype="float32", batch_size=4)
    with pytest.raises(dplaunch.UsageError, match="data_parallel_size is dplaunch's work"):
        DplaunchLM(data_parallel_size=2)
    with pytest.raises(dplaunch.UsageError, match=r"group is a str, not a dplaunch\.Group"):
        DplaunchLM(group=no_group)


def test_a_rank_that_is_killed_amid_an_evaluation_changes_no_answer(
    smollm: str, of_transformers: dict[str, Any]
) -> None:
    from dplaunch.integrations.lm_eval import DplaunchLM

    before = Snapshot.take()
    # Few at a time, so that the evaluation has a middle.
    with DplaunchLM(smollm, dp=2, max_num_seqs=4, progress=False, **ENGINE_ARGS) as lm:
        killer = kill_amid(lm.group, 1)
        found = evaluate(lm, limit=SAMPLES)
        killer.join()
        assert lm.group._group.client.rank_counters[1].moved_away > 0
    assert_same(found, of_transformers)
    assert left_of_a_shared_group(before, shared_pids) == []


def test_the_command_evaluates_on_ray_and_ends_its_ranks(
    smollm: str, of_transformers: dict[str, Any], tmp_path: Path, ray_cluster: RayForTests
) -> None:
    engine = ",".join(f"{name}={value}" for name, value in ENGINE_ARGS.items())
    command = [
        *(sys.executable, "-m", "dplaunch", "lm-eval", "--model", "dplaunch"),
        *("--model_args", f"pretrained={smollm},dp=2,backend=ray,ray_address={ray_cluster.address},{engine}"),
        *("--tasks", ",".join(TASKS), "--include_path", TASK_DIR, "--limit", str(SAMPLES)),
        *("--output_path", str(tmp_path), "--log_samples"),
    ]
    environ = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert "dplaunch_capitals" in done.stdout
    assert_same_answers(answers_in(tmp_path), answers(of_transformers))
    poll_until(lambda: ray_cluster.actors() == [], 30, "the end of its actors")


def answers_in(directory: Path) -> Answers:
    """What `--log_samples` wrote; it writes numbers as words."""
    found: Answers = {}
    for task in TASKS:
        (file,) = directory.rglob(f"samples_{task}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        found[task] = [[_value(answer) for (answer,) in sample["resps"]] for sample in samples]
    return found


def _value(answer: Any) -> Any:
    if isinstance(answer, list):
        return [ast.literal_eval(part) for part in answer]
    try:
        return float(answer)
    except ValueError:
        return answer
