"""The scripts for GPUs: steps with limits, what is kept of them, models, and the driver's answers; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.common import Comparison
from benchmarks.gpu import devices, first, models, moe, notes, ray, recover, start, steps, throughput
from benchmarks.gpu.notes import Note, Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Outcome, Script, Step

ROOT = Path(__file__).resolve().parents[2]

SCRIPTS = [module.SCRIPT for module in (first, start, throughput, recover, moe, ray)]

# A script whose steps hang, fail and leave processes behind; run as `python -m benchmarks.gpu.NAME`, so that its own
# process is what a step's parent is.
SAMPLE = """
import subprocess, sys, time
from benchmarks.common import Comparison
from benchmarks.gpu.steps import Script, Step

def good(setup, notes):
    notes.value("ours", 2.0)
    notes.check("it is so", True, setup.dp)

def hangs(setup, notes):
    notes.value("theirs", 4.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    notes.value("left", child.pid)
    time.sleep(600)

def fails(setup, notes):
    notes.attempt("a part", lambda: 1 / 0)
    raise ValueError("broken")

SCRIPT = Script("NAME", "A sample.", [
    Step(name="hangs", run=hangs, limit_s=LIMIT),
    Step(name="fails", run=fails, limit_s=20),
    Step(name="good", run=good, limit_s=20),
    Step(name="big", run=good, limit_s=20, on_cpu=False),
], [Comparison(title="half", unit="s", base="theirs", ours="ours", goal=0.5)])
if __name__ == "__main__":
    SCRIPT.main()
"""


def rehearse(tmp_path: Path, *args: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Runs the sample; what it printed, and what it left in its directory."""
    package = tmp_path / "tree"
    (package / "benchmarks").mkdir(parents=True)
    for name in ("dplaunch", "benchmarks/common.py", "benchmarks/servers.py", "benchmarks/__init__.py"):
        (package / name).symlink_to(ROOT / name)
    (package / "benchmarks" / "gpu").mkdir()
    for source in (ROOT / "benchmarks" / "gpu").glob("*.py"):
        # A copy: a step is run from the directory that the module lies in.
        (package / "benchmarks" / "gpu" / source.name).write_text(source.read_text())
    sample = SAMPLE.replace("NAME", "sample").replace("LIMIT", "3")
    (package / "benchmarks" / "gpu" / "sample.py").write_text(sample)
    command = [sys.executable, "-m", "benchmarks.gpu.sample", "--cpu-rehearsal", "--out", str(tmp_path / "out"), *args]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=120)
    return done, json.loads((tmp_path / "out" / "sample.json").read_text())


def test_a_step_that_hangs_is_ended_with_all_that_it_started_and_the_others_run(tmp_path: Path) -> None:
    done, result = rehearse(tmp_path)
    states = {outcome["step"]: outcome["state"] for outcome in result["steps"]}
    assert states == {
        "hangs": "FAILED: not done after 3 s",
        "fails": "FAILED with 1",
        "good": "done",
        "big": "skipped: it needs a device",
    }
    told = {note["name"]: note for outcome in result["steps"] for note in outcome["notes"]}
    assert not psutil.pid_exists(int(told["left"]["value"]))
    # What a step told before it ended badly counts too.
    assert result["ratios"] == [{"title": "half", "ratio": 0.5, "verdict": "<= 0.50 met"}]
    assert told["a part"]["good"] is False
    assert "ZeroDivisionError" in told["a part"]["found"]
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "sample: NOT WELL: hangs, fails"
    assert "ValueError: broken" in done.stderr
    assert "ValueError: broken" in (tmp_path / "out" / "sample.log").read_text()


def test_only_the_steps_that_were_named_are_run_and_none_when_no_time_is_left(tmp_path: Path) -> None:
    done, result = rehearse(tmp_path, "--only", "good", "--limit-s", "60")
    assert [(outcome["step"], outcome["state"]) for outcome in result["steps"]] == [("good", "done")]
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "sample: all well")


def test_no_step_is_begun_for_which_no_time_is_left(tmp_path: Path) -> None:
    outcome = SCRIPTS[0]._outcome(Step(name="a", run=_nothing, limit_s=9), _setup(1), time.monotonic(), tmp_path)
    assert outcome.state == "skipped: no time is left"
    assert not steps.good(outcome)


def test_a_step_that_needs_more_devices_is_skipped_and_that_is_well(tmp_path: Path) -> None:
    step = Step(name="a", run=_nothing, limit_s=9, devices=4)
    outcome = SCRIPTS[0]._outcome(step, _setup(2), time.monotonic() + 99, tmp_path)
    assert outcome.state == "skipped: it needs 4 devices, 2 are here"
    assert steps.good(outcome)


def _nothing(setup: Setup, told: Notes) -> None: ...


def _setup(number: int) -> Setup:
    return Setup(dp=max(1, number), devices=number, directory="work")


def test_without_a_device_a_script_says_so_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "uuids", list)
    monkeypatch.setattr(sys, "argv", ["first"])
    with pytest.raises(SystemExit) as ended:
        first.SCRIPT.main()
    assert ended.value.code == 2
    assert "--cpu-rehearsal" in capsys.readouterr().err


def test_a_step_that_there_is_not_is_refused_with_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["first", "--only", "stock,gruop"])
    with pytest.raises(SystemExit):
        first.SCRIPT.main()
    assert "no step is called 'gruop'; there are unpacked, stock, group, http" in capsys.readouterr().err


def test_a_failed_check_is_not_well_and_a_measured_value_is() -> None:
    bad, fine = Note(step="a", name="b", good=False), Note(step="a", name="b", value=0.0)
    assert not steps.good(Outcome(step="a", state="done", notes=[fine, bad]))
    assert steps.good(Outcome(step="a", state="done", notes=[fine]))


def test_notes_are_found_in_a_steps_output_among_other_lines(capsys: pytest.CaptureFixture[str]) -> None:
    told = Notes("a step")
    told.value("rate", 5, "tokens/s")
    told.check("right", [] == [], "x" * 999)
    found = notes.read("noise\n" + capsys.readouterr().out + "\nmore NOTE of others\nNOTE {torn")
    assert found == [
        Note(step="a step", name="rate", value=5.0, unit="tokens/s"),
        Note(step="a step", name="right", good=True, found="x" * 300),
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_each_script_is_found_under_its_name_and_its_comparisons_have_different_titles(script: Script) -> None:
    assert (ROOT / "benchmarks" / "gpu" / f"{script.name}.py").is_file()
    titles = [line.title for line in script.comparisons]
    assert len(set(titles)) == len(titles)


def test_in_a_rehearsal_all_models_are_tiny_and_else_both_sides_get_the_same_arguments() -> None:
    assert _setup(0).settings("large").model == _setup(0).settings("small").model == models.model("tiny")
    assert _setup(0).settings("moe").model.name == "tiny-moe"
    flags = _setup(2).settings("small").engine_flags
    assert flags[flags.index("--load-format") + 1] == "dummy"
    assert "--enforce-eager" not in flags


def test_every_token_of_a_model_has_a_text() -> None:
    from tokenizers import Tokenizer

    path = models.model("tiny")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == models.CONFIGS["tiny"]["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("Seven sheep").ids) == "Seven sheep"
    assert tokenizer.decode([models.CONFIGS["tiny"]["vocab_size"] - 1]).strip()


def test_where_there_is_no_driver_no_device_is_named_and_nobody_holds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (devices.uuids(), devices.held(), devices.used()) == ([], {}, {})
    seconds, left = devices.wait_until_free()
    assert seconds < 5
    assert left == {}
    assert not devices.has_cuda(os.getpid())


class FakeNvml(SimpleNamespace):
    """Two devices; process 7 is on both, process 8 on the second."""

    def __init__(self) -> None:
        on: list[list[tuple[int, int | None]]] = [[(7, 100)], [(7, 50), (8, None)]]
        super().__init__(
            NVMLError=RuntimeError,
            nvmlInit=lambda: None,
            nvmlShutdown=lambda: None,
            nvmlDeviceGetCount=lambda: 2,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetUUID=lambda index: [b"GPU-AB", "GPU-cd"][index],
            nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(used=1000 + index),
            nvmlDeviceGetComputeRunningProcesses=lambda index: [
                SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in on[index]
            ],
        )


def test_who_holds_which_device_is_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert devices.uuids() == ["GPU-AB", "GPU-cd"]
    assert devices.held() == {7: {"GPU-AB": 100, "GPU-cd": 50}, 8: {"GPU-cd": 0}}
    assert devices.held_by([7, 9]) == 150
    assert devices.used() == {"GPU-AB": 1000, "GPU-cd": 1001}
    # A context that holds next to nothing is one that was not given back.
    assert devices.wait_until_free([8], timeout_s=0)[1] == {8: {"GPU-cd": 0}}
    assert devices.has_cuda(7)
    assert devices.plain("GPU-AB") == "ab"


def test_ranks_that_share_a_compiled_graph_count_as_one(tmp_path: Path) -> None:
    setup = Setup(dp=2, devices=2, directory=str(tmp_path))
    root = Path(start.caches(setup, "stock", 2)["VLLM_CACHE_ROOT"]) / "torch_compile_cache"
    for name in ("h1/rank_0_0/backbone", "torch_aot_compile/h2/rank_0_0"):
        (root / name).mkdir(parents=True)
    assert start.kept(setup, "stock", 2) == 1
    (root / "h1/rank_0_1").mkdir()
    assert start.kept(setup, "stock", 2) == 2
    assert start.kept(setup, "dplaunch", 2) == 0


def test_ranks_that_compiled_are_counted_by_what_they_say(tmp_path: Path) -> None:
    said = {
        0: "INFO [decorators.py:745] saved AOT compiled function to /cache/rank_0_0/model",
        1: "dplaunch: rank 1 waits for rank 0 (pid 7) to compile\nDirectly load AOT compilation from path /cache",
    }
    for number, text in said.items():
        (tmp_path / f"rank{number}.log").write_text(text)
    assert start.compiled(tmp_path) == 1
    (tmp_path / "rank1.log").write_text("[backbone] Cache the graph of compile range (1, 8192) for later use")
    assert start.compiled(tmp_path) == 2


def test_a_line_of_a_table_is_only_there_when_both_sides_were_measured() -> None:
    line = Comparison(title="t", unit="s", base="a", ours="b")
    script = Script("first", "", [], [line])
    script._outcomes.append(Outcome(step="s", state="done", notes=[Note(step="s", name="a", value=1.0)]))
    assert script._compared() == []
    script._outcomes[0].notes.append(Note(step="s", name="b", value=3.0))
    assert [each.ratio(values) for each, values in script._compared()] == [3.0]
