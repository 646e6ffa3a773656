"""A measurement in a Python process of its own: asked for and answered in JSON.

`ask_child` starts one; in the child, `question` and `answer` are its two ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIMIT_S = 1800.0
"""Seconds until a child is given up."""

_MARK = "RESULT "
_ROOT = Path(__file__).resolve().parent.parent
_LAST_CHARACTERS = 4000


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


def question() -> dict[str, Any]:
    """In the child: what was asked."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    return asked


def answer(values: Mapping[str, float]) -> None:
    """In the child: says what was measured."""
    print("\n" + _MARK + json.dumps(values), flush=True)
