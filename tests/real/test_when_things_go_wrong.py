"""Whatever goes wrong at the start ends soon, in one clear message and a named exit code, and leaves nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dplaunch.backends import mp

from dplaunch import seam
from dplaunch.errors import ExitCode
from dplaunch.inventory import Device, Node
from dplaunch.testing import Fault, StandInPlan, When
from tests.real.conftest import run_command
from tests.real.standins import Outcome, check_message, launch_flags, run_here

pytestmark = pytest.mark.usefixtures("no_socket_is_left", "vllm_is_imported")

GIB = 2**30

AT_ONCE_S = 10.0
"""Seconds for what is refused before anything is imported; half a second is usual."""

SOON_S = 60.0
"""Seconds for what only vLLM can refuse, in a process that has imported it: three are usual."""


# Refused before anything starts.

REFUSED: dict[str, tuple[str, ExitCode, tuple[str, ...]]] = {
    "an unknown model path": (
        "--model {tmp}/modle",
        ExitCode.MODEL,
        ("model path {tmp}/modle does not exist", "Did you mean {tmp}/model?"),
    ),
    "a config.json that is no model's": (
        "--model {tmp}/model",
        ExitCode.MODEL,
        ("{tmp}/model/config.json is no model's", "save_pretrained"),
    ),
    "a config.json that is no JSON": ("--model {tmp}/text", ExitCode.MODEL, ("cannot be read as JSON",)),
    "a directory without config.json": ("--model {tmp}", ExitCode.MODEL, ("{tmp} holds no config.json",)),
    "no rank": ("--dp 0", ExitCode.USAGE, ("dp must be at least 1, not 0", "For example dp=2")),
    "minus one rank": ("--dp -1", ExitCode.USAGE, ("dp must be at least 1, not -1", "For example dp=2")),
    "ranks in words": ("--dp two", ExitCode.USAGE, ("whole number of ranks, not 'two'", "For example dp=2")),
    "a core that is not there": (
        "--model {smollm} --dp 2 --devices 0;4711",
        ExitCode.RESOURCES,
        ("rank 1 was given core 4711, this process may use 0", "Leave --devices out"),
    ),
    "more ranks than groups of devices": (
        "--model {smollm} --dp 3 --devices 0;1",
        ExitCode.USAGE,
        ("devices names 2 ranks, but dp=3", "Give one group of devices a rank"),
    ),
    "too little host memory": (
        "--model {smollm} --dp 2 --gpu-memory-utilization 0.9",
        ExitCode.RESOURCES,
        ("does not fit: it wants", "GiB of host memory", "GiB are free", "--gpu-memory-utilization"),
    ),
    "a port that is taken": (
        "--model {smollm} --port {port}",
        ExitCode.ADDRESS,
        ("cannot listen on 127.0.0.1:{port}: Address already in use", "--port 0"),
    ),
    # A file in the way, for root may write to any directory.
    "a log directory that cannot be written": (
        "--model {smollm} --port 0 --log-dir {tmp}/text/config.json/logs",
        ExitCode.LOG_DIR,
        ("cannot write logs to {tmp}/text/config.json/logs: Not a directory", "--log-dir"),
    ),
    "an unknown backend": (
        "--model {smollm} --port 0 --backend rai",
        ExitCode.BACKEND,
        ("unknown backend 'rai'", "mp"),
    ),
}
"""What is wrong: the flags, what the command exits with, what it has to say."""


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_at_once(what: str, places: dict[str, object]) -> None:
    flags, code, words = REFUSED[what]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dplaunch", *(flag.format(**places) for flag in flags.split())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - began)
    check_message(outcome, code, *(word.format(**places) for word in words))
    assert outcome.out == ""
    assert outcome.seconds < AT_ONCE_S


def devices(count: int, *, free: int) -> Node:
    """A host with accelerators of 80 GiB."""
    made = [
        Device(id=str(n), uuid=f"GPU-{n}", name="H80", memory_total=80 * GIB, memory_free=free * GIB)
        for n in range(count)
    ]
    return Node(name="host", cores=(0, 1), memory_total=64 * GIB, memory_free=60 * GIB, devices=tuple(made))


@pytest.mark.parametrize(
    ("node", "flags", "words"),
    [
        (devices(2, free=79), "--dp 3", ("dp=3 needs 3 devices, this machine has 2", "--dp 2")),
        (devices(4, free=79), "--dp 3 -tp 2", ("dp=3 with 2 devices a rank needs 6 devices, this machine has 4",)),
        (devices(2, free=79), "--dp 2 --devices 0;5", ("rank 1 was given device 5, this machine has 0, 1",)),
        (
            devices(2, free=30),
            "--dp 2",
            ("rank 0 does not fit on device 0 (H80): it wants 73.6 GiB, 0.92 of 80.0, and 30.0 GiB are free",),
        ),
    ],
)
def test_too_few_devices_or_too_little_of_their_memory_is_refused_with_the_numbers(
    node: Node, flags: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, smollm: str
) -> None:
    monkeypatch.setattr(mp, "local_node", lambda: node)
    outcome = run_here("--model", smollm, "--port", "0", *flags.split())
    check_message(outcome, ExitCode.RESOURCES, *words)
    assert outcome.seconds < AT_ONCE_S


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, ("vLLM is not installed", "pip install 'dplaunch[cuda]'", "'dplaunch[cpu]'")),
        ("0.9.1", ("vLLM 0.9.1 is installed, but this dplaunch works with 0.", "pip install 'vllm==")),
    ],
)
def test_a_missing_or_unsupported_vllm_is_named_with_the_install_line(
    found: str | None, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, smollm: str
) -> None:
    monkeypatch.setattr(seam, "installed_version", lambda: found)
    outcome = run_here("--model", smollm, "--port", "0")
    check_message(outcome, ExitCode.VLLM, *words)
    assert outcome.seconds < AT_ONCE_S


def test_the_installed_distribution_is_what_counts_as_vllms_version(tmp_path: Path, smollm: str) -> None:
    (tmp_path / "vllm-0.9.1.dist-info").mkdir()
    (tmp_path / "vllm-0.9.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.9.1\n")
    command = run_command("--model", smollm, "--port", "0", env={"PYTHONPATH": str(tmp_path)})
    assert command.end() == ExitCode.VLLM, command.output
    assert "vLLM 0.9.1 is installed" in command.output


# What only vLLM can refuse.


def test_an_unknown_flag_is_refused_with_the_nearest_one(smollm: str, tmp_path: Path) -> None:
    outcome = run_here(*launch_flags(smollm, tmp_path), "--max-modle-len", "4096")
    check_message(outcome, ExitCode.USAGE, "unknown flag --max-modle-len", "Did you mean --max-model-len?")
    assert outcome.seconds < SOON_S


@pytest.mark.parametrize("kind", ["nosuch", "llama"])
def test_a_model_that_vllm_has_no_code_for_is_refused_in_a_few_words(kind: str, tmp_path: Path) -> None:
    config = f'{{"architectures": ["NoSuchForCausalLM"], "model_type": "{kind}"}}'
    (tmp_path / "config.json").write_text(config)
    outcome = run_here("--model", str(tmp_path), "--port", "0", "--log-dir", str(tmp_path / "logs"))
    check_message(
        outcome, ExitCode.MODEL, f"vLLM cannot run the model {tmp_path}", kind if kind != "llama" else "NoSuch"
    )
    assert len(outcome.err.splitlines()[-1]) < 500


# A rank that dies, or never gets ready, while it starts.

FLOOD = 100 * 50
"""Fifty lines."""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            Fault(when=When.BEFORE_READY, returncode=-signal.SIGILL, stderr_bytes=FLOOD),
            ("rank 1 died while starting: SIGILL(-4)", "AMX", "--dtype float32", "stand-in engine ends on purpose: -4"),
        ),
        (
            Fault(when=When.BEFORE_HELLO, returncode=42, stderr_bytes=FLOOD),
            ("rank 1 died while starting: exit code 42", "stand-in engine ends on purpose: 42"),
        ),
        (
            Fault(when=When.BEFORE_READY, error="there are no weights", stderr_bytes=FLOOD),
            ("rank 1 died while starting: RuntimeError: there are no weights", "Traceback"),
        ),
    ],
    ids=["a signal", "an exit code", "an exception"],
)
def test_a_rank_that_dies_while_starting_ends_the_launch_with_its_last_words(
    fault: Fault, words: tuple[str, ...], smollm: str, tmp_path: Path
) -> None:
    # The other one would take a minute.
    plan = StandInPlan(faults={(1, 0): fault}, default=Fault(slow_start_s=60))
    outcome = run_here(*launch_flags(smollm, tmp_path), plan=plan)
    check_message(outcome, ExitCode.RANK_FAILED, *words, f"full log: {tmp_path}/rank1.log")
    shown = [line for line in outcome.err.splitlines() if line.startswith("    ")]
    log = (tmp_path / "rank1.log").read_text().splitlines()
    assert [line.strip() for line in shown] == [line.strip() for line in log[-20:]]
    assert outcome.seconds < SOON_S


def test_a_rank_that_never_becomes_ready_ends_the_launch_at_the_start_timeout(smollm: str, tmp_path: Path) -> None:
    plan = StandInPlan(faults={(1, 0): Fault(when=When.BEFORE_READY, hang=True)})
    outcome = run_here(*launch_flags(smollm, tmp_path, "--start-timeout", "4"), plan=plan)
    check_message(
        outcome,
        ExitCode.START_TIMEOUT,
        "rank 1 was not ready after 4 s",
        "--start-timeout",
        f"full log: {tmp_path}/rank1.log",
    )
    assert outcome.seconds < SOON_S
