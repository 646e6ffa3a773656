"""The scripts for GPUs: steps with limits, what is kept of them, models, and the driver's answers; no GPU is needed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.common import Comparison
from benchmarks.gpu import devices, first, large, models, moe, notes, ray, rest, sides, small, steps, turns, weights
from benchmarks.gpu.notes import Note, Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Outcome, Script, Step

ROOT = Path(__file__).resolve().parents[2]

SCRIPTS = [module.SCRIPT for module in (first, small, large, rest, moe, ray, turns, weights)]

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


def test_only_the_steps_that_were_named_are_run_and_the_others_are_as_they_were(tmp_path: Path) -> None:
    before = [
        Outcome(step="hangs", state="done", notes=[Note(step="hangs", name="theirs", value=8.0)]),
        Outcome(step="good", state="skipped: no time is left"),
    ]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample.json").write_text(json.dumps({"steps": [asdict(outcome) for outcome in before]}))
    done, result = rehearse(tmp_path, "--only", "good", "--limit-s", "60")
    states = [(outcome["step"], outcome["state"]) for outcome in result["steps"]]
    assert states == [("hangs", "done"), ("good", "done")]
    assert result["ratios"][0]["ratio"] == 0.25
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
    assert "--no-enable-prefix-caching" in flags


def test_every_token_of_a_model_has_a_text() -> None:
    from tokenizers import Tokenizer

    path = models.model("tiny")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == models.CONFIGS["tiny"]["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("Seven sheep").ids) == "Seven sheep"
    assert tokenizer.decode([models.CONFIGS["tiny"]["vocab_size"] - 1]).strip()


def test_where_there_is_no_driver_no_device_is_named_and_nobody_holds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (devices.uuids(), devices.held(), devices.used(), devices.size()) == ([], {}, {}, 0)
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
            nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(used=1000 + index, total=9000 - index),
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
    assert devices.size() == 8999
    # A context that holds next to nothing is one that was not given back.
    assert devices.wait_until_free([8], timeout_s=0)[1] == {8: {"GPU-cd": 0}}
    assert devices.has_cuda(7)
    assert devices.plain("GPU-AB") == "ab"


def test_a_start_in_which_something_was_compiled_is_cold_and_ranks_that_share_it_count_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    setup = Setup(dp=2, devices=2, directory=str(tmp_path / "work-small"))
    for folders, state in (([], "warm"), (["h1/rank_0_0/a", "aot/h2/rank_0_0"], "cold"), (["h1/rank_0_1"], "cold")):
        with sides.compiling(setup, Notes("a"), "stock", "small") as found:
            root = Path(os.environ["VLLM_CACHE_ROOT"]) / "torch_compile_cache"
            for name in folders:
                (root / name).mkdir(parents=True)
            assert found() == state
    with sides.compiling(setup, Notes("a"), "stock", "small") as found:
        kernel = Path(os.environ["TRITON_HOME"]) / ".triton" / "cache" / "h3" / "k.cubin"
        kernel.parent.mkdir(parents=True)
        kernel.touch()
        assert found() == "second", "kernels alone"
    assert [note.value for note in notes.read(capsys.readouterr().out)] == [1.0, 1.0]
    # Each side has its own, and the next script on the machine the same ones.
    assert sides.compiled(setup, "dplaunch") == set()
    again = Setup(dp=2, devices=2, directory=str(tmp_path / "work-rest"))
    assert len(sides.compiled(again, "stock")) == 3


def test_a_cold_server_is_started_once_more_and_each_start_is_used_for_all_that_it_can_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []
    # As stock does it: the kernels of its first start are not there at its second.
    compiled = ["VLLM_CACHE_ROOT torch_compile_cache/h/rank_0_0", "TRITON_HOME k.cubin"]
    took = iter((7.0, 6.0, 5.0, 5.0))

    @contextlib.contextmanager
    def serve(settings: Any) -> Iterator[tuple[Any, float]]:
        if compiled:
            variable, name = compiled.pop(0).split()
            (Path(os.environ[variable]) / name).mkdir(parents=True)
        log.append("start")
        yield SimpleNamespace(address="http://here"), next(took)
        log.append("stop")

    async def measure(*_: Any) -> float:
        log.append("load")
        return 9.0

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sides, "SIDES", {"stock": serve})
    monkeypatch.setattr(sides, "http_tokens_per_second", measure)
    monkeypatch.setattr(sides, "_KILLS", {"stock": lambda *_: log.append("kill")})
    setup = Setup(dp=2, devices=0, directory=str(tmp_path / "work"))
    sides.over_http("stock", "small", kill=True)(setup, Notes("a"))
    assert log == ["start", "stop", "start", "stop", "start", "load", "kill", "stop"]
    told = {note.name: note.value for note in notes.read(capsys.readouterr().out)}
    assert told == {
        "small stock http cold start": 7.0,
        "small stock: ranks that compiled": 1.0,
        "small stock http second start": 6.0,
        "small stock http warm start": 5.0,
        "small stock http": 9.0,
    }
    log.clear()
    sides.over_http("stock", "small", 1)(setup, Notes("a"))
    assert log == ["start", "stop"]


def test_what_is_measured_beside_stock_fits_into_a_call_of_ten_minutes() -> None:
    for script in (small.SCRIPT, large.SCRIPT):
        assert all(0 < step.about_s < step.limit_s for step in script.steps.values())
        assert sum(step.about_s for step in script.steps.values()) <= 590


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_steps_are_listed_with_what_they_take_and_none_is_run(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--list"])
    script.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(script.steps)


def test_a_line_of_a_table_is_only_there_when_both_sides_were_measured() -> None:
    line = Comparison(title="t", unit="s", base="a", ours="b")
    script = Script("first", "", [], [line])
    script._outcomes.append(Outcome(step="s", state="done", notes=[Note(step="s", name="a", value=1.0)]))
    assert script._compared() == []
    script._outcomes[0].notes.append(Note(step="s", name="b", value=3.0))
    assert [each.ratio(values) for each, values in script._compared()] == [3.0]
