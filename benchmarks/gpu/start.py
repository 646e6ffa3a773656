"""From process start to the first answer, cold and warm: dplaunch beside stock (`python -m benchmarks.gpu.start`).

Cold is with empty compile caches; each side has its own, so that neither warms the other's. Warm is the same again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.common import DPLAUNCH, STOCK, Comparison
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Script, Step
from benchmarks.inprocess import run_child
from benchmarks.servers import Server, dplaunch_server, stock_server

COMPILED = ("saved AOT compiled function to", "Cache the graph of compile range")
"""What vLLM says when it has compiled (compilation/decorators.py and backends.py), and not when it has loaded."""

SIDES: dict[str, Callable[..., AbstractContextManager[tuple[Server, float]]]] = {
    STOCK: stock_server,
    DPLAUNCH: dplaunch_server,
}

GOAL = 0.35
"""Of stock's warm start."""


def caches(setup: Setup, side: str, dp: int) -> dict[str, str]:
    """Where one side's compile caches go, for one number of ranks."""
    at = Path(setup.directory) / "caches" / f"{side}{dp}"
    names = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {variable: str((at / name).absolute()) for variable, name in names.items()}


def over_http(side: str, dp: int | None) -> Callable[[Setup, Notes], None]:
    """A step: the first start with these caches, and the second one."""

    def run(setup: Setup, notes: Notes) -> None:
        ranks = setup.dp if dp is None else dp
        places = caches(setup, side, ranks)
        for place in places.values():
            shutil.rmtree(place, ignore_errors=True)
        os.environ.update(places)
        settings = setup.settings("small", dp=ranks)
        for state in ("cold", "warm"):
            logs = Path(places["VLLM_CACHE_ROOT"]).parent / f"logs-{state}"
            with SIDES[side](settings, flags=("--log-dir", str(logs)) if side == DPLAUNCH else ()) as (_, seconds):
                notes.value(f"{side} {state} dp={_label(dp)}", seconds)
            if state == "cold":
                notes.value(f"{side} graphs kept, dp={_label(dp)}", kept(setup, side, ranks), "")
            if side == DPLAUNCH:
                notes.value(f"{side} ranks that compiled, {state} dp={_label(dp)}", compiled(logs), "")

    return run


def kept(setup: Setup, side: str, dp: int) -> int:
    """How many ranks' compiled graphs are kept: one for each that compiled for itself, 1 when all share one rank's."""
    root = Path(caches(setup, side, dp)["VLLM_CACHE_ROOT"])
    # vLLM (compilation/backends.py and decorators.py): .../HASH/rank_WORKER_DPRANK.
    return len({path.name for path in root.glob("torch_compile_cache/**/rank_*_*")})


def compiled(logs: Path) -> int:
    """How many of dplaunch's ranks say in their logs that they compiled; ranks that share a directory say it too.

    Stock's do not: there vLLM has one line for all processes of a machine.
    """
    texts = [log.read_text(errors="replace") for log in logs.glob("rank*.log")]
    return sum(any(line in text for line in COMPILED) for text in texts)


def in_process(side: str, dp: int | None) -> Callable[[Setup, Notes], None]:
    """A step: the first answer in a Python process, with caches that are warm by now; dplaunch's second launch too."""

    def run(setup: Setup, notes: Notes) -> None:
        ranks = setup.dp if dp is None else dp
        os.environ.update(caches(setup, side, ranks))
        for name, seconds in run_child(side, "launch", setup.settings("small", dp=ranks)).items():
            notes.value(f"{side} python {name} dp={_label(dp)}", seconds)

    return run


def _label(dp: int | None) -> str:
    return "all" if dp is None else str(dp)


def _compare(title: str, base: str, ours: str, goal: float | None = None) -> Comparison:
    return Comparison(title=title, unit="s", base=base, ours=ours, goal=goal)


COMPARISONS = [
    *(
        _compare(f"{state} start over HTTP, dp={dp}", f"stock {state} dp={dp}", f"dplaunch {state} dp={dp}", goal)
        for dp in ("all", "1")
        for state, goal in (("warm", GOAL if dp == "all" else None), ("cold", None))
    ),
    _compare("warm start in Python", "stock python from_start dp=all", "dplaunch python first_from_start dp=all"),
    _compare(
        "second launch, over stock's from the call",
        "stock python from_call dp=all",
        "dplaunch python second_from_call dp=all",
    ),
]

SCRIPT = Script(
    "start",
    __doc__,
    [
        Step(name="dplaunch-all", run=over_http(DPLAUNCH, None), limit_s=240),
        Step(name="stock-all", run=over_http(STOCK, None), limit_s=400),
        Step(name="dplaunch-python", run=in_process(DPLAUNCH, None), limit_s=180),
        Step(name="stock-python", run=in_process(STOCK, None), limit_s=240),
        Step(name="dplaunch-1", run=over_http(DPLAUNCH, 1), limit_s=240, devices=2),
        Step(name="stock-1", run=over_http(STOCK, 1), limit_s=300, devices=2),
    ],
    COMPARISONS,
)

if __name__ == "__main__":
    SCRIPT.main()
