from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dplaunch.backend import Exit
from dplaunch.diagnose import Failure, describe_failure, likely_cause
from dplaunch.errors import ExitCode, RankFailedError

DIED = Exit(code=1)

NO_FREE_MEMORY = (
    "Free memory on device cuda:0 (1.2/79.1 GiB) on startup is less than desired GPU memory utilization "
    "(0.92, 72.8 GiB)."
)
NO_FREE_HOST_MEMORY = "(2.0/15.0 GiB) on startup is less than desired CPU memory utilization (0.9, 13.5 GiB)"
NO_KV_CACHE = "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
TOO_LONG = "To serve at least one request with the model's max seq len (8192), (4.00 GiB KV cache is needed"
DEAD_WORKER = "ERROR Worker proc VllmWorker-0 died unexpectedly (exit code: -4), shutting down executor."

CASES: list[tuple[str, Exit, list[str], Failure | None, tuple[str, ...]]] = [
    ("SIGILL", Exit(signal=signal.SIGILL), [], None, ("AMX", "--dtype float32")),
    ("SIGILL seen by a shell", Exit(code=132), [], None, ("AMX", "--dtype float32")),
    ("SIGKILL", Exit(signal=signal.SIGKILL), [], None, ("out of memory", "dmesg", "oom_kill", "by hand")),
    ("SIGSEGV", Exit(signal=signal.SIGSEGV), [], None, ("native code crashed", "dplaunch doctor")),
    ("SIGBUS", Exit(signal=signal.SIGBUS), [], None, ("/dev/shm", "full", "--shm-size")),
    ("SIGTERM", Exit(signal=signal.SIGTERM), [], None, ("asked it to end",)),
    ("SIGABRT, silent", Exit(signal=signal.SIGABRT), [], None, ("native code gave up",)),
    ("SIGABRT after a line", Exit(signal=signal.SIGABRT), ["std::bad_alloc"], None, ("host ran out",)),
    ("a worker's SIGILL", DIED, [DEAD_WORKER], ("RuntimeError", "Executor failed."), ("AMX",)),
    ("CUDA memory, by type", DIED, [], ("OutOfMemoryError", "tried"), ("device ran out", "--max-model-len")),
    ("CUDA memory, by line", DIED, ["RuntimeError: CUDA out of memory. Tried"], None, ("device ran out",)),
    ("no free memory", DIED, [], ("ValueError", NO_FREE_MEMORY), ("less memory is free", "lower")),
    ("no free memory, CPU", DIED, [NO_FREE_HOST_MEMORY], None, ("VLLM_CPU_KVCACHE_SPACE",)),
    ("no KV cache", DIED, [], ("ValueError", NO_KV_CACHE), ("too small for the KV cache", "raise")),
    ("model too long", DIED, [], ("ValueError", TOO_LONG), ("too small for the KV cache",)),
    ("host memory", DIED, [], ("MemoryError", ""), ("host ran out of memory", "fewer ranks")),
    ("no model", DIED, [], ("OSError", "Can't load the configuration of '/m'."), ("--model",)),
    ("unknown on the hub", DIED, [], ("RepositoryNotFoundError", "404"), ("--model",)),
    ("not in the cache", DIED, [], ("LocalEntryNotFoundError", "x"), ("local directory",)),
    ("bad weights", DIED, [], ("SafetensorError", "header too large"), ("weights are incomplete",)),
    ("missing module", DIED, [], ("ModuleNotFoundError", "No module named 'x'"), ("dplaunch doctor",)),
    ("torchvision", DIED, [], ("RuntimeError", "operator torchvision::nms does not exist"), ("doctor",)),
    ("port", DIED, [], ("ZMQError", "Address already in use (addr='tcp://127.0.0.1:1')"), ("in use", "ss ")),
    ("port, by line", DIED, ["OSError: [Errno 98] Address already in use"], None, ("in use",)),
    ("shm", DIED, [], ("OSError", "[Errno 28] No space left on device: '/psm_1'"), ("/dev/shm", "full")),
    ("disk", DIED, [], ("OSError", "[Errno 28] No space left on device"), ("df -h",)),
    ("files", DIED, [], ("OSError", "[Errno 24] Too many open files"), ("ulimit -n",)),
    (
        "wrapped",
        DIED,
        ["(Worker) ERROR x.PlanError: two heads"],
        ("Exception", "init failed"),
        ("two heads",),
    ),
]


@pytest.mark.parametrize(("exit", "lines", "failure", "words"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_a_death_is_explained(exit: Exit, lines: list[str], failure: Failure | None, words: tuple[str, ...]) -> None:
    cause = likely_cause(exit, lines, failure)
    assert "\n" not in cause
    for word in words:
        assert word in cause


def test_what_the_rank_reported_counts_more_than_the_signal_that_followed() -> None:
    cause = likely_cause(Exit(signal=signal.SIGKILL), [], ("OutOfMemoryError", "CUDA"))
    assert "device ran out" in cause


def test_a_signal_counts_more_than_a_line_of_the_log() -> None:
    cause = likely_cause(Exit(signal=signal.SIGILL), ["OSError: Address already in use"], None)
    assert "AMX" in cause


def test_an_unknown_death_gets_no_invented_cause() -> None:
    assert likely_cause(DIED, ["INFO loading weights"], ("StrangeError", "no idea")) == ""


def test_an_information_line_about_memory_is_no_cause() -> None:
    line = "INFO Free memory on device (70/79 GiB) on startup. Desired GPU memory utilization is (0.9, 71 GiB)."
    assert likely_cause(DIED, [line], None) == ""


def write_log(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_death_by_signal_is_described_in_the_first_line(tmp_path: Path) -> None:
    log = write_log(tmp_path / "rank1.log", [f"line {number}" for number in range(50)])
    error = describe_failure(1, Exit(signal=signal.SIGILL), log, None)
    assert isinstance(error, RankFailedError)
    assert error.exit_code == ExitCode.RANK_FAILED
    assert error.message.startswith("rank 1 died while starting: SIGILL(-4), likely because the CPU refused")
    assert error.hint.startswith("Use --dtype float32")
    *shown, last = error.detail.splitlines()
    assert shown == [f"    line {number}" for number in range(30, 50)]
    assert last == f"full log: {log}"
    assert "above" not in str(error)


def test_a_reported_exception_is_the_first_line_without_its_further_lines(tmp_path: Path) -> None:
    log = write_log(tmp_path / "rank0.log", ["Traceback (most recent call last):"])
    error = describe_failure(0, DIED, log, ("ValueError", f"\n{NO_KV_CACHE}\nmore\n"))
    assert error.message == f"rank 0 died while starting: ValueError: {NO_KV_CACHE}"
    assert error.hint.startswith("The memory left beside the weights is too small")
    assert error.hint.endswith(".")


def test_an_exception_without_a_message_is_named_by_its_type(tmp_path: Path) -> None:
    error = describe_failure(0, DIED, tmp_path / "none.log", ("KeyboardInterrupt", ""))
    assert error.message == "rank 0 died while starting: KeyboardInterrupt"


def test_a_rank_that_left_in_silence_is_described_too(tmp_path: Path) -> None:
    error = describe_failure(2, Exit(code=0), tmp_path / "none.log", None)
    assert error.message == "rank 2 died while starting: exit code 0 before it was ready"
    assert error.hint == ""
    assert "(its log is empty)" in error.detail
    assert f"full log: {tmp_path / 'none.log'}" in error.detail


def test_a_cause_far_up_in_the_log_is_found_though_not_shown(tmp_path: Path) -> None:
    log = write_log(tmp_path / "rank0.log", [f"(Worker) ValueError: {NO_FREE_MEMORY}"] + ["  frame"] * 60)
    error = describe_failure(0, DIED, log, ("RuntimeError", "Engine core initialization failed."))
    assert "less memory is free" in error.hint.lower()
    assert "Free memory" not in error.detail


def test_what_the_backend_knows_is_in_the_first_line(tmp_path: Path) -> None:
    error = describe_failure(0, Exit(reason="node 10.0.0.7 was lost"), tmp_path / "none.log", None)
    assert error.message == "rank 0 died while starting: exit status unknown: node 10.0.0.7 was lost"
