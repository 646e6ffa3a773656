"""Groups and commands whose ranks are stand-ins: all of dplaunch and vLLM's frontend, and engines that do as told."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from dplaunch import serve
from dplaunch.cli import main
from dplaunch.errors import ExitCode
from dplaunch.events import Listener
from dplaunch.spec import LaunchSpec, RestartPolicy
from dplaunch.sync import Group
from dplaunch.testing import STANDIN_ENGINE, StandInPlan, poll_until
from dplaunch.ui import UiOptions
from tests.real.conftest import ENGINE_ARGS, SERVER_FLAGS, START_S, Command

ROOT = Path(__file__).parents[2]

READY = "Ctrl-C stops it."
"""The last line of a command that serves."""


def standin_spec(model: str, log_dir: Path, plan: StandInPlan | None = None, **options: Any) -> LaunchSpec:
    """A launch of two stand-in ranks, with the model's tokenizer."""
    engine_args = {**ENGINE_ARGS, "standin": plan or StandInPlan()}
    asked = {"dp": 2, "restart": RestartPolicy(backoff_s=0.05), **options}
    return LaunchSpec(model=model, log_dir=log_dir, engine=STANDIN_ENGINE, engine_args=engine_args, **asked)


@contextlib.contextmanager
def standin_group(spec: LaunchSpec, listeners: Sequence[Listener] = ()) -> Iterator[Group]:
    """A running group."""
    with Group(spec, progress=False, listeners=listeners) as group:
        yield group


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str
    seconds: float


class Screen:
    """What a command in this process writes, for a thread that waits for words."""

    def __init__(self) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.is_last = False  # nothing more is written: the command has ended

    def wait_for(self, words: str) -> None:
        """Returns when the words are there; fails when the command ends without them."""
        poll_until(lambda: self.is_last or words in self._text(), START_S, f"{words!r} on the screen")
        assert words in self._text()

    def _text(self) -> str:
        return self.out.getvalue() + self.err.getvalue()


def run_here(*argv: str, plan: StandInPlan | None = None, meanwhile: Callable[[Screen], None] | None = None) -> Outcome:
    """The `dplaunch` command in this process, which has a warm zygote; its ranks are stand-ins.

    Args:
        plan: what the stand-ins do.
        meanwhile: runs in a thread beside the command, with its screen; when it fails, the command is interrupted.
    """
    screen, began = Screen(), time.monotonic()
    failures: list[BaseException] = []

    def watch(work: Callable[[Screen], None]) -> None:
        try:
            work(screen)
        except BaseException as error:
            failures.append(error)
            if not screen.is_last:
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch, args=(meanwhile,)) if meanwhile is not None else None
    with (
        mock.patch.object(serve, "serve", _with_standins(plan or StandInPlan())),
        contextlib.redirect_stdout(screen.out),
        contextlib.redirect_stderr(screen.err),
    ):
        if thread is not None:
            thread.start()
        try:
            code = main(argv)
        finally:
            screen.is_last = True
    if thread is not None:
        thread.join()
    if failures:
        raise failures[0]
    return Outcome(code, screen.out.getvalue(), screen.err.getvalue(), time.monotonic() - began)


def _with_standins(plan: StandInPlan) -> Callable[[LaunchSpec, UiOptions], ExitCode]:
    original = serve.serve

    def run(spec: LaunchSpec, ui: UiOptions) -> ExitCode:
        return original(replace(spec, engine=STANDIN_ENGINE, engine_args={"standin": plan}), ui)

    return run


def launch_flags(model: str, log_dir: Path, *more: str) -> tuple[str, ...]:
    """The flags of a command with two small ranks on a free port."""
    return ("--dp", "2", "--model", model, "--port", "0", "--log-dir", str(log_dir), *SERVER_FLAGS, *more)


@contextlib.contextmanager
def run_python(
    script: str, *arguments: str, by_stdin: bool = False, cwd: Path | None = None, launcher: Sequence[str] = ()
) -> Iterator[Command]:
    """A Python process that runs `script`, from a file or from standard input; killed at the end if still there.

    Args:
        launcher: Python's arguments before the script's file: what starts it, where it is not Python itself.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "script.py"
        file.write_text(script)
        with file.open() as source:
            process = subprocess.Popen(
                [sys.executable, *launcher, "-" if by_stdin else str(file), *arguments],
                stdin=source if by_stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        command = Command(process)
        try:
            yield command
        finally:
            process.kill()
            command.end()


def check_message(outcome: Outcome, code: ExitCode, *words: str) -> None:
    """One message that says all, and the exit code."""
    assert outcome.code == code, outcome.err
    assert len(re.findall("^dplaunch: error: ", outcome.err, re.MULTILINE)) == 1, outcome.err
    said = outcome.err[outcome.err.index("dplaunch: error: ") :]
    assert [word for word in words if word not in said] == [], said
    assert "bug in dplaunch" not in said
    assert "see above" not in said.lower()
