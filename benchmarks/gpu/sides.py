"""Steps for stock vLLM and for dplaunch alike. Starts are dear, so each is used for all that it can show.

A start is called cold when vLLM compiled the model in it, second when kernels alone were compiled, and else warm. Each
side has compile caches of its own, which all scripts of a machine share: whatever starts first fills them.
"""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import bench_recover
from benchmarks.bench_recover import Amount, measure_dplaunch, measure_stock
from benchmarks.common import DPLAUNCH, STOCK, Settings
from benchmarks.gpu import devices
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.inprocess import ask_engine, final_params, run_child
from benchmarks.load import Load, http_tokens_per_second, prompts, tokens_per_second
from benchmarks.servers import SERVED_NAME, Server, dplaunch_server, stock_server
from dplaunch.sync import new_loop

Run = Callable[[Setup, Notes], None]
Serve = Callable[[Settings], AbstractContextManager[tuple[Server, float]]]

SIDES: dict[str, Serve] = {STOCK: stock_server, DPLAUNCH: dplaunch_server}

RATE = "tokens/s"

COLD, SECOND, WARM = "cold", "second", "warm"
"""Starts: vLLM compiled the model; kernels alone were compiled; nothing was."""

CLIENTS, REQUESTS, TOKENS = 256, 1024, 128
"""For each rank: in flight at a time, in all; and generated for each request."""

BATCH = 3 * 1024
"""Prompts of a batch, for each rank: three times what it runs at a time, so that its end is not most of it."""

UNDER_LOAD = Amount(clients=48, questions=48, tokens=256, steady_s=8.0)
"""What a rank is killed under."""

UNITS = {"failed": "%", "back": "s", "pause": "s", "before": "ms", "alone": "ms", "during": "ms"}
"""Of what `bench_recover` measures, by the last word of its name."""


def imports(setup: Setup, notes: Notes) -> None:
    """A step: reads vLLM's files once, so that whoever starts first does not wait for the disk alone."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import vllm.entrypoints.cli.main, vllm.v1.engine.core"], check=True)
    notes.value("importing vLLM for the first time", time.monotonic() - began)


def in_process(side: str, model: str, dp: int | None = None) -> Run:
    """A step: ranks in a Python process; its start, tokens/s of the engine, and those of a batch.

    The batch goes through `group.generate`, or all at once into stock's engine.

    Args:
        side: whose engine.
        model: of `models.CONFIGS`.
        dp: ranks; None for all.
    """

    def run(setup: Setup, notes: Notes) -> None:
        ranks = setup.dp if dp is None else dp
        label = f"{model} {side}" if dp is None else f"{model} {side} dp={dp}"
        with compiling(setup, notes, side, model) as state:
            measured = run_child(side, "generate", setup.settings(model, ranks), load_of(setup, ranks))
            notes.value(f"{label} python {state()} start", measured.pop("from_start"))
        for name, rate in measured.items():
            notes.value(f"{label} {name}", rate, RATE)

    return run


def over_http(side: str, model: str, dp: int | None = None, *, kill: bool = False) -> Run:
    """A step: a server with one frontend; its warm start, tokens/s, and with `kill` the end of a rank under load.

    Its second start, the first in which vLLM does not compile the model, is told of too: the one that somebody waits
    for who has stopped a server and starts it again. It may be a warm one.

    Args:
        side: whose server.
        model: of `models.CONFIGS`.
        dp: ranks; None for all, and with another number nothing but the start is measured.
        kill: whether a rank is killed at the end; there have to be two.
    """

    def run(setup: Setup, notes: Notes) -> None:
        ranks = setup.dp if dp is None else dp
        label = f"{model} {side}" if dp is None else f"{model} {side} dp={dp}"
        second = False
        for last in (False, False, True):
            with compiling(setup, notes, side, model) as state, SIDES[side](setup.settings(model, ranks)) as started:
                server, seconds = started
                how = state()
                if how != COLD and not second:
                    second = True
                    notes.value(f"{label} http {SECOND} start", seconds)
                if how != SECOND:
                    notes.value(f"{label} http {how} start", seconds)
                if how != WARM and not last:
                    continue  # The same once more, with what is compiled by now.
                if dp is None:
                    rate = asyncio.run(http_tokens_per_second(load_of(setup, ranks), server.address, SERVED_NAME))
                    notes.value(f"{label} http", rate, RATE)
                if kill and ranks > 1:
                    _KILLS[side](setup, notes, server)
                break
        if kill and side == STOCK and not setup.cpu:
            took, left = devices.wait_until_free()
            notes.value("stock: seconds until no process holds memory", took)
            notes.value("stock: processes that hold memory still", len(left), "")

    return run


def executors(model: str) -> Run:
    """A step: dplaunch in one process, launch after launch: each executor with all ranks, and one rank."""

    def run(setup: Setup, notes: Notes) -> None:
        os.environ.update(caches(setup, DPLAUNCH))
        for executor, dp in dict.fromkeys([("mp", setup.dp), ("mp", 1), ("uni", setup.dp)]):
            label = f"{model} {executor} dp={'all' if dp == setup.dp else dp}"
            work = functools.partial(_launched, setup, notes, model, executor, dp, label)
            notes.attempt(label, functools.partial(_in_a_loop, work))

    return run


def _in_a_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work())


async def _launched(setup: Setup, notes: Notes, model: str, executor: str, dp: int, label: str) -> None:
    import dplaunch

    settings, load = setup.settings(model, dp), load_of(setup, dp)
    called = time.monotonic()
    async with dplaunch.launch_async(
        model=str(settings.model), dp=dp, executor=executor, **settings.engine_args
    ) as group:
        notes.value(f"{label}: ready after", time.monotonic() - called)
        rate = await tokens_per_second(load, lambda *request: ask_engine(group.engine, *request))
        notes.value(f"{label} engine", rate, RATE)
        began = time.monotonic()
        outputs = await group.generate(prompts(load.in_batch), final_params(load.tokens), progress=False)
        generated = sum(len(output.outputs[0].token_ids) for output in outputs)
        notes.value(f"{label} generate", generated / (time.monotonic() - began), RATE)


def load_of(setup: Setup, dp: int) -> Load:
    """The load of a group: as much for each rank, however many there are."""
    if setup.cpu:
        return Load(clients=4 * dp, requests=8 * dp, tokens=8, batch=24 * dp)
    return Load(clients=CLIENTS * dp, requests=REQUESTS * dp, tokens=TOKENS, batch=BATCH * dp)


# ---- a rank is killed; the last one ----


def _kill_dplaunchs(setup: Setup, notes: Notes, server: Server) -> None:
    rank = setup.dp - 1
    pid = bench_recover.rank_pid(DPLAUNCH, server, rank)
    samples = asyncio.run(measure_dplaunch(server, _amount(setup), rank))
    _tell(notes, samples)
    notes.check("no request failed", not samples["dplaunch failed"] and not samples["dplaunch later"])
    notes.check("all texts are the undisturbed ones", not samples["dplaunch differ"], samples["dplaunch texts"])
    notes.check("another process is the rank now", bench_recover.rank_pid(DPLAUNCH, server, rank) != pid)


def _kill_stocks(setup: Setup, notes: Notes, server: Server) -> None:
    """It does not come back by itself: its way back is a start from nothing, which has been measured."""
    _tell(notes, asyncio.run(measure_stock(server, _amount(setup), setup.dp - 1)))


_KILLS = {STOCK: _kill_stocks, DPLAUNCH: _kill_dplaunchs}


def _amount(setup: Setup) -> Amount:
    return bench_recover.QUICK if setup.cpu else UNDER_LOAD


def _tell(notes: Notes, samples: Mapping[str, float]) -> None:
    for name, value in samples.items():
        notes.value(name, value, UNITS.get(name.split()[-1], ""))


# ---- compile caches ----


def caches(setup: Setup, side: str) -> dict[str, str]:
    """Where one side's compile caches are, on this machine."""
    at = Path(setup.directory).absolute().parent / "caches" / side
    # Not TRITON_CACHE_DIR: where kernels go that are compiled besides is a part of what is compared.
    names = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_HOME": "triton"}
    return {variable: str(at / name) for variable, name in names.items()}


def compiled(setup: Setup, side: str) -> set[Path]:
    """What this side has compiled so far: a folder for each graph and rank."""
    root = Path(caches(setup, side)["VLLM_CACHE_ROOT"])
    # vLLM (compilation/backends.py and decorators.py): .../HASH/rank_WORKER_DPRANK.
    return set(root.glob("torch_compile_cache/**/rank_*_*"))


def kernels(setup: Setup, side: str) -> set[Path]:
    """The kernels that Triton has compiled and kept."""
    return {kernel for folder in caches(setup, side).values() for kernel in Path(folder).rglob("*.cubin")}


@contextmanager
def compiling(setup: Setup, notes: Notes, side: str, model: str) -> Iterator[Callable[[], str]]:
    """Has what starts inside use the side's caches; gives what says how it started: COLD, SECOND or WARM."""
    os.environ.update(caches(setup, side))
    before, kept = compiled(setup, side), kernels(setup, side)

    def state() -> str:
        if compiled(setup, side) - before:
            return COLD
        return SECOND if kernels(setup, side) - kept else WARM

    yield state
    if new := compiled(setup, side) - before:
        notes.value(f"{model} {side}: ranks that compiled", len({path.name for path in new}), "")
