"""The same launch on mp and on Ray with vLLM's own engines, and the same command: what is seen is the same."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

import dplaunch
from dplaunch.errors import ExitCode
from dplaunch.testing import Fault, StandInPlan, When
from tests.contract.parity import without_accidents
from tests.ray_for_tests import RayForTests
from tests.real.conftest import ENGINE_ARGS
from tests.real.standins import READY, Outcome, Screen, launch_flags, run_here
from tests.real.test_when_things_go_wrong import REFUSED

pytest.importorskip("ray")

pytestmark = pytest.mark.usefixtures("no_socket_is_left", "vllm_is_imported")

BACKENDS = ("mp", "ray")

PROMPTS = [f"{n}. The opposite of {word} is" for n in range(20) for word in ("hot", "old", "up", "wet", "far")] * 2
TOKENS = 16


@pytest.fixture(scope="module")
def twins(group: dplaunch.Group, smollm: str, ray_cluster: RayForTests) -> Iterator[Mapping[str, dplaunch.Group]]:
    """Two ranks of the built-in model on each backend."""
    with dplaunch.launch(model=smollm, dp=2, backend="ray", **ENGINE_ARGS) as other:
        yield {"mp": group, "ray": other}


MADE = {"OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"}
"""The variables that the plan makes for a rank on CPU."""


DRAWN = {"$VLLM_DIST_IDENT", "$VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME"}
"""What vLLM draws at random for each engine."""


def drifted(twins: Mapping[str, dplaunch.Group]) -> set[str]:
    """The variables that the launcher had otherwise when it made the second group: other tests ran in between."""
    mp, ray = (twins[backend].plan.ranks[0].env for backend in BACKENDS)
    return {name for name in {*mp, *ray} if mp.get(name) != ray.get(name)}


def reports(group: dplaunch.Group, drifted: set[str]) -> list[dict[str, Any]]:
    """What the engines say of themselves, without what is drawn for each launch."""
    found = []
    for report in group.call("dplaunch_report"):
        assert report.pop("pid") > 0
        for name in ("instance_id", "process_title"):
            report[name] = report[name].replace(group.plan.base_id, "BASE")
        env = {f"${name}": value for name, value in report.pop("env").items() if name not in drifted}
        found.append({**report, **env})
    return found


def test_the_engines_are_the_same_seen_from_inside(twins: Mapping[str, dplaunch.Group]) -> None:
    changed = drifted(twins)
    assert not changed & MADE
    mp, ray = (reports(twins[backend], changed) for backend in BACKENDS)
    assert [report["instance_id"] for report in mp] == ["BASE_dp0", "BASE_dp1"]
    assert [report["data_parallel_index"] for report in mp] == [0, 1]
    assert {"$PATH", "$OMP_NUM_THREADS", "dtype", "executor", "cpus", "devices"} <= set(mp[0])
    for name in DRAWN:
        drawn = [report.pop(name) for report in (*mp, *ray)]
        assert len(set(drawn)) == len(drawn), name
    for report in (*mp, *ray):
        # Where torch's compiler is in memory: ranks have it of the process that they were forked from.
        report.pop("$_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", None)
    for ours, theirs in zip(mp, ray, strict=True):
        assert {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)} == set()


def test_two_hundred_answers_are_the_same_in_order_and_content(twins: Mapping[str, dplaunch.Group]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    answers = {name: twin.generate(PROMPTS, params, progress=False) for name, twin in twins.items()}
    mp, ray = ([list(output.outputs[0].token_ids) for output in answers[name]] for name in BACKENDS)
    assert len(mp) == 200
    assert {len(tokens) for tokens in mp} == {TOKENS}
    assert len({tuple(tokens) for tokens in mp}) > 20
    assert mp == ray
    texts = ([output.outputs[0].text for output in answers[name]] for name in BACKENDS)
    assert next(texts) == next(texts)


LINE = re.compile(r"\((\w+) pid=\d+\) (\w+) \d\d-\d\d \d\d:\d\d:\d\d (\[[\w/.]+:\d+\])")
"""A line of vLLM's in a rank's log: process, level, source."""


def test_the_ranks_logs_have_the_same_lines(twins: Mapping[str, dplaunch.Group]) -> None:
    for rank in (0, 1):
        logs = [twins[backend].plan.ranks[rank].log_file.read_text() for backend in BACKENDS]
        mp, ray = ([match.groups() for match in LINE.finditer(log)] for log in logs)
        assert len(ray) > 5
        assert {name for name, _, _ in ray} == {f"EngineCore_DP{rank}"}
        # The first group has served other tests since, and may have said more.
        assert mp[: len(ray)] == ray


# The command.


def told(outcome: Outcome, directory: Path) -> tuple[int, list[str]]:
    """The exit code, and what it said."""
    return outcome.code, [without_accidents(line, directory) for line in outcome.err.splitlines()]


@pytest.mark.parametrize("what", sorted(set(REFUSED) - {"an unknown backend", "a core that is not there"}))
def test_what_cannot_be_is_refused_in_the_same_words(
    what: str, places: dict[str, object], tmp_path: Path, ray_cluster: RayForTests
) -> None:
    flags, code, _ = REFUSED[what]
    argv = [flag.format(**places) for flag in flags.split()]
    mp, ray = (told(run_here(*argv, "--backend", backend), tmp_path) for backend in BACKENDS)
    assert mp[0] == code
    assert mp == ray


def test_on_ray_devices_are_not_the_users_to_choose(smollm: str, ray_cluster: RayForTests) -> None:
    outcome = run_here("--model", smollm, "--backend", "ray", "--dp", "2", "--devices", "0;4711")
    assert outcome.code == ExitCode.USAGE
    assert "devices (--devices) cannot be chosen here: Ray gives them out" in outcome.err


def test_a_death_at_the_start_is_told_in_the_same_words(smollm: str, tmp_path: Path, ray_cluster: RayForTests) -> None:
    fault = Fault(when=When.BEFORE_READY, returncode=-signal.SIGILL, stderr_bytes=5000)
    plan = StandInPlan(faults={(1, 0): fault}, default=Fault(slow_start_s=60))
    mp, ray = (
        told(run_here(*launch_flags(smollm, tmp_path / backend, "--backend", backend), plan=plan), tmp_path / backend)
        for backend in BACKENDS
    )
    assert mp[0] == ExitCode.RANK_FAILED
    assert errors(mp[1]) == errors(ray[1])
    assert any("SIGILL(-4)" in line for line in errors(mp[1]))


def errors(lines: list[str]) -> list[str]:
    """The message and what follows it: what came before is the progress of two ranks, in any order."""
    (start,) = [index for index, line in enumerate(lines) if line.startswith("dplaunch: error: ")]
    return lines[start:]


def test_a_server_offers_the_same_metrics_and_ends_with_the_same_code(
    smollm: str, tmp_path: Path, ray_cluster: RayForTests
) -> None:
    metrics: dict[str, list[str]] = {}

    def serve(backend: str) -> Outcome:
        def visit(screen: Screen) -> None:
            screen.wait_for(READY)
            address = re.search(r"http://127\.0\.0\.1:\d+", screen.out.getvalue())
            assert address is not None
            text = httpx.get(f"{address[0]}/metrics").text
            metrics[backend] = sorted(set(re.findall(r'^([\w:]+(?:\{.*engine="\d+")?)', text, re.MULTILINE)))
            os.kill(os.getpid(), signal.SIGTERM)

        flags = launch_flags(smollm, tmp_path / backend, "--backend", backend, "--name", "twin")
        return run_here(*flags, meanwhile=visit)

    outcomes = [serve(backend) for backend in BACKENDS]
    assert [outcome.code for outcome in outcomes] == [ExitCode.OK, ExitCode.OK]
    assert any('engine="1"' in name for name in metrics["mp"])
    assert metrics["mp"] == metrics["ray"]
