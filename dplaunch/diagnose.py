"""What a rank most likely died of, and what to do about it: for people, never for decisions."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dplaunch.backend import Exit
from dplaunch.errors import RankFailedError
from dplaunch.logs import tail

Failure = tuple[str, str]
"""What a rank reported before it died: the name of the exception's type, and its message."""


class _Cause(NamedTuple):
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}" if self.advice else self.what


_DEVICE_MEMORY = _Cause(
    "the device ran out of memory",
    "lower --gpu-memory-utilization, --max-model-len or --max-num-seqs, or end what else uses the device",
)
_TOO_LITTLE_FREE = _Cause(
    "less memory is free than --gpu-memory-utilization claims",
    "lower --gpu-memory-utilization (on CPU set VLLM_CPU_KVCACHE_SPACE, in GiB), or end what else uses it",
)
_KV_CACHE = _Cause(
    "the memory left beside the weights is too small for the KV cache",
    "lower --max-model-len, or raise --gpu-memory-utilization (on CPU VLLM_CPU_KVCACHE_SPACE, in GiB)",
)
_HOST_MEMORY = _Cause(
    "the host ran out of memory",
    "use fewer ranks, a smaller --max-model-len or, on CPU, a smaller VLLM_CPU_KVCACHE_SPACE",
)
_NO_MODEL = _Cause(
    "the model could not be read",
    "check --model: a directory with config.json, tokenizer and weights, or the name of a model on the hub",
)
_WEIGHTS = _Cause(
    "the weights are incomplete or do not fit the model's config.json",
    "download the model again, and check --dtype, --quantization and --load-format",
)
_MISSING_MODULE = _Cause(
    "a Python module is missing or broken in the ranks' environment",
    "install it there, then run `dplaunch doctor`",
)
_ADDRESS = _Cause(
    "an address that the rank wanted is in use",
    "end what holds it (`ss -ltnp` lists it), or choose another port",
)
_SHARED_MEMORY = _Cause(
    "the shared memory in /dev/shm is full",
    "look with `df -h /dev/shm`, remove what dead processes left, or enlarge it (docker run --shm-size=8g)",
)
_NO_SPACE = _Cause(
    "a file system is full",
    "look with `df -h`; the caches under ~/.cache and /dev/shm are the usual ones",
)
_FILES = _Cause("too many files are open", "raise the limit before the launch: ulimit -n 65536")
_PERMISSION = _Cause("a file or device may not be used by this user", "look for its name in the rank's log")
_TERMINATED = _Cause(
    "something outside of dplaunch asked it to end",
    "look for a scheduler's time limit, a `kill`, or a container that was stopped",
)

_BY_SIGNAL: dict[int, _Cause] = {
    signal.SIGILL: _Cause(
        "the CPU refused an instruction: bfloat16 attention uses AMX, which some virtual machines announce but forbid",
        "use --dtype float32; `dplaunch doctor` tests it",
    ),
    signal.SIGKILL: _Cause(
        "the host or its cgroup ran out of memory, or someone killed it by hand",
        "check `dmesg` and oom_kill in the cgroup's memory.events, then use fewer ranks, a smaller "
        "--max-model-len or, on CPU, a smaller VLLM_CPU_KVCACHE_SPACE",
    ),
    signal.SIGSEGV: _Cause(
        "native code crashed",
        "run `dplaunch doctor`: torch, vLLM and the driver may not fit each other",
    ),
    signal.SIGBUS: _SHARED_MEMORY,
    signal.SIGFPE: _Cause("native code divided by zero", "report it to vLLM with the rank's log"),
    signal.SIGTERM: _TERMINATED,
    signal.SIGHUP: _TERMINATED,
    signal.SIGINT: _Cause("it was interrupted (Ctrl-C reached it)", "launch again"),
    signal.SIGXCPU: _Cause("its limit on CPU time was reached", "raise it: ulimit -t unlimited"),
}

_BY_TYPE: dict[str, _Cause] = {
    "OutOfMemoryError": _DEVICE_MEMORY,
    "MemoryError": _HOST_MEMORY,
    "ModuleNotFoundError": _MISSING_MODULE,
    "ImportError": _MISSING_MODULE,
    "PermissionError": _PERMISSION,
    "HFValidationError": _NO_MODEL,
    "RepositoryNotFoundError": _NO_MODEL,
    "GatedRepoError": _Cause(
        "the model's owner wants a login before the download", "ask for access, then set HF_TOKEN"
    ),
    "LocalEntryNotFoundError": _Cause(
        "the model is not in the local cache, and the hub was not reached",
        "give --model a local directory, or let the ranks reach the hub (HF_HUB_OFFLINE unset)",
    ),
    "SafetensorError": _WEIGHTS,
    "NotImplementedError": _Cause(
        "vLLM has no code for this model or flag on this device",
        "leave the flag out, or choose a device that vLLM supports for it",
    ),
}

# Only where neither the signal nor the error's type tells. More telling lines come first: a failed rank often
# writes several of these, and the later ones follow from the earlier.
_BY_LINE: tuple[tuple[re.Pattern[str], _Cause], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), cause)
    for pattern, cause in (
        (r"CUDA out of memory|CUDA error: out of memory|torch\.OutOfMemoryError", _DEVICE_MEMORY),
        (r"is less than (desired \w+ memory utilization|the engine's budget)", _TOO_LITTLE_FREE),
        (r"No available memory for the cache blocks|KV cache is needed", _KV_CACHE),
        (r"ModuleNotFoundError|cannot import name|operator \S+ does not exist", _MISSING_MODULE),
        (r"address already in use|EADDRINUSE", _ADDRESS),
        (r"/dev/shm.*No space left|No space left.*(/dev/shm|psm_)", _SHARED_MEMORY),
        (r"No space left on device", _NO_SPACE),
        (r"Too many open files", _FILES),
        (r"Can't load the configuration of|not a valid model identifier|Invalid repository ID", _NO_MODEL),
        (r"does not appear to have a file named|No such file or directory.*config\.json", _NO_MODEL),
        (r"Cannot find any model weights", _NO_MODEL),
        (r"SafetensorError|following weights were not initialized|size mismatch for", _WEIGHTS),
        (r"Cannot allocate memory|can't allocate memory|std::bad_alloc|\bMemoryError\b", _HOST_MEMORY),
    )
)

SEARCHED_LINES = 400
"""How many of the log's last lines are searched for a cause: tracebacks of workers and of the core."""

_ERROR_LINE = re.compile(r"\b(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): \S.*")
_DEAD_WORKER = re.compile(r"died unexpectedly \(exit code: -(\d+)\)")
_UNKNOWN = _Cause("", "")


def likely_cause(exit: Exit, log_tail: Sequence[str], failure: Failure | None) -> str:
    """One sentence: what the rank most likely died of and what to do; "" when nothing tells.

    Args:
        exit: how its process ended.
        log_tail: the last lines of its log.
        failure: what it reported itself, the type's name and the message; None when it died without a word.
    """
    return str(_find(exit, log_tail, failure))


def describe_failure(
    rank: int, exit: Exit, log_path: Path, failure: Failure | None, tail_lines: int = 20
) -> RankFailedError:
    """The error for a rank that died before it was ready, with its likely cause, its last words and its log.

    Args:
        failure: as for `likely_cause`.
        tail_lines: how many lines of the log to show; more of them are searched for the cause.
    """
    lines = tail(log_path, max(tail_lines, SEARCHED_LINES))
    cause = _find(exit, lines, failure)
    early = " before it was ready" if failure is None and exit.code == 0 else ""
    message = f"rank {rank} died while starting: {_headline(exit, failure)}{early}"
    hint = str(cause)
    if failure is None and cause.what:
        message, hint = f"{message}, likely because {cause.what}", cause.advice
    shown = [f"    {line}" for line in lines[-tail_lines:]] or ["    (its log is empty)"]
    return RankFailedError(message, hint=_sentence(hint), detail="\n".join([*shown, f"full log: {log_path}"]))


def describe_death(exit: Exit, log_path: Path, failure: Failure | None) -> tuple[str, str]:
    """What a rank that served died of, with its likely cause, and what to do about it ("" when nothing tells).

    Args:
        failure: as for `likely_cause`.
    """
    if exit.reason and failure is None:
        return str(exit), ""  # It is known, and not to be guessed.
    cause = _find(exit, tail(log_path, SEARCHED_LINES), failure)
    words = str(exit)
    if failure is not None:
        words = f"{words}: {_headline(exit, failure)}"
    elif cause.what:
        words = f"{words}, likely because {cause.what}"
    return words, _sentence(cause.advice)


def _headline(exit: Exit, failure: Failure | None) -> str:
    if failure is None:
        return str(exit)
    kind, text = failure
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{kind}: {first}" if first else kind


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""


def _find(exit: Exit, log_tail: Sequence[str], failure: Failure | None) -> _Cause:
    # What the rank said itself came before its end, which may be no more than the launcher's own kill.
    if failure is not None:
        kind, text = failure
        said = _BY_TYPE.get(kind.rpartition(".")[2]) or _from_lines([text])
        if said is not None:
            return said
    return (
        _BY_SIGNAL.get(_signal_of(exit) or 0)
        or _from_worker(log_tail)
        or _from_lines(log_tail)
        or _from_first_error(log_tail, failure)
        or _from_abort(exit)
        or _UNKNOWN
    )


def _signal_of(exit: Exit) -> int | None:
    # A shell or a container reports a signal as 128 + number.
    if exit.signal is None and exit.code is not None and exit.code > 128:
        return exit.code - 128
    return exit.signal


def _from_worker(lines: Sequence[str]) -> _Cause | None:
    # vLLM's engine core names the worker process that took it down, which itself could say nothing.
    for line in lines:
        if found := _DEAD_WORKER.search(line):
            return _BY_SIGNAL.get(int(found[1]))
    return None


def _from_lines(lines: Iterable[str]) -> _Cause | None:
    text = "\n".join(lines)
    return next((cause for pattern, cause in _BY_LINE if pattern.search(text)), None)


def _from_abort(exit: Exit) -> _Cause | None:
    # SIGABRT says only that native code gave up; why stands in the log, so the lines are asked first.
    if _signal_of(exit) != signal.SIGABRT:
        return None
    return _Cause("native code gave up (abort)", "its last log lines say why")


def _from_first_error(lines: Iterable[str], failure: Failure | None) -> _Cause | None:
    # An engine core reports only that its worker failed; why is the first error in the log that they share.
    reported = _headline(Exit(), failure) if failure is not None else None
    for line in lines:
        if found := _ERROR_LINE.search(line):
            first = found[0].strip()
            return None if first == reported else _Cause(f"the first error in its log is {first}", "")
    return None
