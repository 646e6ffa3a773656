"""A measurement in a Python process of its own: asked for and answered in JSON.

`ask_child` starts one for one answer; in the child, `question` and `answer` are its two ends. A `Child` answers again
and again; what it is asked comes to it through `Questions`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIMIT_S = 1800.0
"""Seconds until a child is given up."""

_MARK = "RESULT "
_ROOT = Path(__file__).resolve().parent.parent
_LAST_CHARACTERS = 4000
_POLL_S, _CLOSE_S = 1.0, 60.0


def ask_child(module: str, asked: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, float]:
    """Runs `python -m module` with a question and returns what it measured.

    Raises:
        RuntimeError: when it ends without an answer; carries the end of its output.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(asked)],
        env=env,
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=LIMIT_S)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    found = [line for line in output.splitlines() if line.startswith(_MARK)]
    if not found:
        raise RuntimeError(f"{module} ended with {child.returncode} and no answer\n{output[-_LAST_CHARACTERS:]}")
    values: dict[str, float] = json.loads(found[-1].removeprefix(_MARK))
    return values


class Child:
    """`python -m module` that answers as often as it is asked; what it prints goes where this process's output goes.

    Args:
        module: what is run.
        asked: its first question.
        env: its whole environment.
    """

    def __init__(self, module: str, asked: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self._ours, theirs = Pipe()
        self._module = module
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(asked), str(theirs.fileno())],
                env=env,
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer(self) -> dict[str, float]:
        """What it has measured for the first question, or for the last one.

        Raises:
            RuntimeError: when it ends without an answer.
        """
        # Processes that it has forked keep its end of the pipe open, so its end is seen in either way.
        while not self._ours.poll(_POLL_S) and self._process.poll() is None:
            pass
        try:
            values: dict[str, float] = json.loads(self._ours.recv_bytes() if self._ours.poll() else b"")
        except (EOFError, ValueError):
            raise RuntimeError(f"{self._module} ended with {self._process.wait(_CLOSE_S)} and no answer") from None
        return values

    def ask(self, word: str) -> dict[str, float]:
        """Asks the next question, and returns its answer.

        Raises:
            RuntimeError: when it ends without an answer.
        """
        with contextlib.suppress(BrokenPipeError):  # It has ended, and there will be no answer.
            self._ours.send_bytes(word.encode())
        return self.answer()

    def close(self) -> None:
        """Has it end in order, or kills what it has started too. Idempotent."""
        self._ours.close()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def question() -> dict[str, Any]:
    """In the child: what was asked."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    return asked


def answer(values: Mapping[str, float]) -> None:
    """In the child: says what was measured."""
    print("\n" + _MARK + json.dumps(values), flush=True)


class Questions:
    """In a `Child`: what it is asked after the first question, until nobody asks any more."""

    def __init__(self) -> None:
        self._theirs = Connection(int(sys.argv[2]))

    def answer(self, values: Mapping[str, float]) -> None:
        """Says what was measured."""
        self._theirs.send_bytes(json.dumps(values).encode())

    async def __aiter__(self) -> AsyncIterator[str]:
        with contextlib.suppress(EOFError):
            while True:
                yield (await asyncio.to_thread(self._theirs.recv_bytes)).decode()
