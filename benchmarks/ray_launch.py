"""`make bench-launch BACKEND=ray`: dplaunch with its ranks in a Ray cluster, beside stock vLLM and beside `mp`.

Over HTTP twice: with no Ray running, so that dplaunch starts one, and attached to one that runs. In one Python
process, which for Ray has called `ray.init` itself: a second launch, and the restart of a rank after SIGKILL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.common import Comparison, Settings, report, run_rounds
from benchmarks.lives import measure_lives
from benchmarks.own_ray import ray_head
from benchmarks.servers import dplaunch_server, stock_server

WITHIN_MP = 1.3
"""What Ray may take of mp's time, for a warm start and for a restart."""


def _seconds(title: str, base: str, ours: str, goal: float | None = None) -> Comparison:
    return Comparison(title=title, unit="s", base=base, ours=ours, goal=goal)


HTTP = [
    _seconds("no Ray before: first answer over HTTP, over stock mp", "stock http", "ray http"),
    _seconds("attached: first answer over HTTP, over stock mp", "stock http", "ray http attached"),
    _seconds("no Ray before: first answer over HTTP, over mp", "mp http", "ray http"),
    _seconds("attached: first answer over HTTP, over mp", "mp http", "ray http attached"),
]

PYTHON = [
    _seconds("first launch in a process, over mp", "mp first", "ray first"),
    _seconds("warm start: second launch in a process, over mp", "mp second", "ray second", WITHIN_MP),
    _seconds("restart of a rank after SIGKILL, over mp", "mp restart", "ray restart", WITHIN_MP),
]


def contenders(settings: Settings, python_only: bool) -> dict[str, Callable[[], Mapping[str, float]]]:
    """What runs in every round."""

    def stock_http() -> Mapping[str, float]:
        with stock_server(settings) as (_, seconds):
            return {"stock http": seconds}

    def mp_http() -> Mapping[str, float]:
        with dplaunch_server(settings) as (_, seconds):
            return {"mp http": seconds}

    def ray_http() -> Mapping[str, float]:
        with dplaunch_server(settings, "ray") as (_, seconds):
            return {"ray http": seconds}

    def ray_http_attached() -> Mapping[str, float]:
        with ray_head() as address, dplaunch_server(settings, "ray", ["--ray-address", address]) as (_, seconds):
            return {"ray http attached": seconds}

    def mp_python() -> Mapping[str, float]:
        return {f"mp {name}": seconds for name, seconds in measure_lives("mp", settings).items()}

    def ray_python() -> Mapping[str, float]:
        return {f"ray {name}": seconds for name, seconds in measure_lives("ray", settings).items()}

    http = () if python_only else (stock_http, mp_http, ray_http, ray_http_attached)
    return {run.__name__: run for run in (*http, mp_python, ray_python)}


def run(settings: Settings, python_only: bool = False) -> None:
    """Runs the benchmark, or its part in Python alone, and prints its report."""
    samples = run_rounds(settings.rounds, contenders(settings, python_only))
    lines = PYTHON if python_only else HTTP + PYTHON
    report("launch-ray", settings, lines, samples, ("compared with", "ray"))
