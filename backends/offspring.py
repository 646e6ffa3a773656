"""What a process does that the zygote made: it becomes a process of its own, then a rank or a call."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from dplaunch.rank_main import die_with, load_function, rank_main

from .messages import Answer, CallJob, Failure, RankJob

EXIT_UNBORN = 70
"""Exit code of a process whose zygote died before it could tell the launcher: another one takes its place."""

ORPHAN_GRACE_S = 1.0
"""Seconds that a rank leaves the zygote to end it when the launcher is gone: only the zygote tidies up
shared memory, and needs milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inheritance:
    """What a new process gets from the zygote, and what it must let go of.

    Args:
        launcher_pid: the launcher.
        gate: says when to go on: the launcher knows of the process. Closed means that it never will.
        stdout: becomes standard output.
        stderr: becomes standard error.
        answer: takes the `Answer`, for a call.
        foreign: open file descriptors that are the zygote's own. None are when the interpreter is fresh.
        environ: what was put into the environment while modules were imported.
    """

    launcher_pid: int
    gate: Connection
    stdout: Connection
    stderr: Connection
    answer: Connection | None = None
    foreign: frozenset[int] = frozenset()
    environ: Mapping[str, str] = field(default_factory=dict)


def run_rank(job: RankJob, inheritance: Inheritance) -> None:
    """The body of a rank's process. Returns when the engine ends in order."""
    _become(job.cwd, inheritance)
    die_with(inheritance.launcher_pid, ORPHAN_GRACE_S)
    for pid in job.keepers:
        die_with(pid)
    rank_main(job.boot)


def run_call(job: CallJob, inheritance: Inheritance) -> None:
    """The body of a call's process: whatever happens to the function, its answer says so."""
    _become(job.cwd, inheritance)
    os.environ.clear()
    os.environ.update({**inheritance.environ, **job.env})
    sys.path.extend(path for path in job.sys_path if path not in sys.path)
    answer = inheritance.answer
    if answer is not None:
        answer.send_bytes(pickle.dumps(_answer(job)))
        answer.close()


def _answer(job: CallJob) -> Answer:
    try:
        return Answer(bytes(load_function(job.function)(job.payload)))
    except BaseException as error:
        return Answer(Failure.of(error))


def _become(cwd: str, inheritance: Inheritance) -> None:
    # Refused when the zygote has done it already and the process leads its group.
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    os.dup2(inheritance.stdout.fileno(), 1)
    os.dup2(inheritance.stderr.fileno(), 2)
    inheritance.stdout.close()
    inheritance.stderr.close()
    _let_go(inheritance)
    default_signals()
    gc.enable()
    try:
        inheritance.gate.recv_bytes()
    except EOFError:
        os._exit(EXIT_UNBORN)
    inheritance.gate.close()
    # The directory may be gone; paths that matter are absolute.
    with contextlib.suppress(OSError):
        os.chdir(cwd)


def _let_go(inheritance: Inheritance) -> None:
    kept = {inheritance.gate.fileno()}
    if inheritance.answer is not None:
        kept.add(inheritance.answer.fileno())
    # The objects that own these live on in frames below this one, which are never returned to.
    for descriptor in inheritance.foreign - kept:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def default_signals() -> None:
    """Sets what a fresh interpreter would have; a launcher's handlers, ignored and blocked signals pass exec."""
    signal.set_wakeup_fd(-1)
    # What Python itself sets at its start is its default, and ranks expect it.
    ours: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGPIPE: signal.SIG_IGN,
        signal.SIGXFSZ: signal.SIG_IGN,
    }
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        # Numbers that the C library keeps for itself are refused.
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, ours.get(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
