"""Launchers that are processes of their own (`child.py`), and what they say."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import devices
from benchmarks.servers import environment

ROOT = Path(__file__).resolve().parents[2]

END_S = 60.0
"""Seconds for a launcher to close its group, and Ray where it has started that."""

SMALL: dict[str, Any] = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 * 2**30}
"""Less than is free beside the session's group, and a cache of a fixed size.

With a size of its own to find out, vLLM does not start when another process gives memory back meanwhile.
"""


@contextlib.contextmanager
def launcher(path: str, args: dict[str, Any], *, stock: bool = False) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A process that has launched a group with these arguments (or stock's engine), and what it said of it."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.child", json.dumps({"path": path, "args": args, "stock": stock})],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = [line for line in process.stdout if line.startswith("SAID ")] if stock else _first(process.stdout)
            assert said, f"it ended with {process.wait()} and said nothing"
            yield process, json.loads(said[0].removeprefix("SAID "))
        finally:
            process.kill()


def _first(lines: Any) -> list[str]:
    return next(([line] for line in lines if line.startswith("SAID ")), [])


def workers(said: dict[str, Any]) -> list[int]:
    """The processes that drive the devices."""
    return [worker["pid"] for rank in said["ranks"] for worker in rank]


def uuids(said: dict[str, Any]) -> list[str]:
    """The devices, as the workers see them."""
    return [worker["uuid"] for rank in said["ranks"] for worker in rank]


def closes_and_frees(process: Any, said: dict[str, Any]) -> None:
    """Its workers hold devices, it holds none itself; when it has closed its group nobody does."""
    held = devices.held()
    assert set(workers(said)) <= set(held)
    assert process.pid not in held
    process.stdin.close()
    assert process.wait(END_S) == 0
    assert devices.wait_until_free(workers(said))[1] == {}
