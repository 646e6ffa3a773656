"""A group's lives in one Python process: the first launch, the second one, and a rank that is killed and comes back.

`measure_lives` asks for it; `python -m benchmarks.lives` is the child.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import statistics
import time
from typing import Any

from benchmarks import child
from benchmarks.common import Settings
from benchmarks.inprocess import QUESTION, final_params
from benchmarks.own_ray import ray_here
from benchmarks.servers import environment
from dplaunch import Group, RestartPolicy, launch
from dplaunch.events import Event, RankState
from dplaunch.seam.rank import REPORT

KILLS = 4
"""How often a rank is killed: one child's figure is their median."""

BACK_LIMIT_S = 300.0
"""Seconds until a killed rank is given up."""


def measure_lives(backend: str, settings: Settings) -> dict[str, float]:
    """Measures them in a process of their own. For "ray", it has called `ray.init` before anything is timed.

    Returns:
        Seconds from the call to the first answer: "first", "second" (the same launch again); and "restart", from
        SIGKILL to the event that says that the rank is back.

    Raises:
        RuntimeError: when the child fails; carries the end of its output.
    """
    asked = {
        "backend": backend,
        "model": str(settings.model),
        "dp": settings.dp,
        "engine_args": settings.engine_args,
    }
    return child.ask_child("benchmarks.lives", asked, environment())


# ---- in the child ----


def _lives(asked: dict[str, Any]) -> dict[str, float]:
    first = _launch(asked, kills=0)
    return {"first": first["launch"]} | {
        {"launch": "second"}.get(name, name): seconds for name, seconds in _launch(asked, kills=KILLS).items()
    }


def _launch(asked: dict[str, Any], kills: int) -> dict[str, float]:
    back: queue.Queue[float] = queue.Queue()

    def listen(event: Event) -> None:
        if event.state is RankState.READY and event.incarnation > 0 and not event.phase:
            back.put(time.monotonic())

    called = time.monotonic()
    with launch(
        model=asked["model"],
        dp=asked["dp"],
        backend=asked["backend"],
        # No waiting before a restart: it is the backend that is measured.
        restart=RestartPolicy(limit=kills, backoff_s=0.0),
        listener=listen,
        **asked["engine_args"],
    ) as group:
        group.generate([QUESTION], final_params(1))
        measured = {"launch": time.monotonic() - called}
        if kills:
            restarts = [_restart(group, number % asked["dp"], back) for number in range(kills)]
            measured["restart"] = statistics.median(restarts)
    return measured


def _restart(group: Group, rank: int, back: queue.Queue[float]) -> float:
    (report,) = group.call(REPORT, rank=rank)
    killed = time.monotonic()
    os.kill(report["pid"], signal.SIGKILL)
    return back.get(timeout=BACK_LIMIT_S) - killed


def _main() -> None:
    asked = child.question()
    with ray_here() if asked["backend"] == "ray" else contextlib.nullcontext():
        child.answer(_lives(asked))


if __name__ == "__main__":
    _main()
