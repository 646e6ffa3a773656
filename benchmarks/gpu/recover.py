"""A rank is killed under load, beside stock (`python -m benchmarks.gpu.recover`): the figures of `bench_recover`.

Stock ends all ranks when one dies, so its way back is a start from nothing; it is measured, with warm compile caches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from benchmarks import bench_recover
from benchmarks.bench_recover import FLAGS, Amount, measure_dplaunch, measure_stock
from benchmarks.common import Comparison
from benchmarks.gpu import devices
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Script, Step
from benchmarks.servers import dplaunch_server, stock_server

FULL = Amount(clients=48, questions=48, tokens=256, steady_s=8.0)

UNITS = {"failed": "%", "back": "s", "pause": "s", "start": "s", "before": "ms", "alone": "ms", "during": "ms"}
"""Of a sample, by the last word of its name."""


def amount(setup: Setup) -> Amount:
    """How much is asked."""
    return bench_recover.QUICK if setup.cpu else FULL


def dplaunch(setup: Setup, notes: Notes) -> None:
    """The last rank is killed, and comes back."""
    with dplaunch_server(setup.settings("small"), flags=FLAGS) as (server, seconds):
        notes.value("dplaunch start", seconds)
        rank = setup.dp - 1
        pid = bench_recover.rank_pid("dplaunch", server, rank)
        samples = asyncio.run(measure_dplaunch(server, amount(setup), rank))
        _tell(notes, samples)
        notes.check("no request failed", not samples["dplaunch failed"] and not samples["dplaunch later"])
        notes.check("all texts are the undisturbed ones", not samples["dplaunch differ"], samples["dplaunch texts"])
        notes.check("another process is the rank now", bench_recover.rank_pid("dplaunch", server, rank) != pid)


def stock(setup: Setup, notes: Notes) -> None:
    """The last rank is killed."""
    with stock_server(setup.settings("small"), flags=FLAGS) as (server, seconds):
        notes.value("stock first start", seconds)
        _tell(notes, asyncio.run(measure_stock(server, amount(setup), setup.dp - 1)))
    if not setup.cpu:
        took, left = devices.wait_until_free()
        notes.value("stock: seconds until no process holds memory", took)
        notes.value("stock: processes that hold memory still", len(left), "")


def stock_again(setup: Setup, notes: Notes) -> None:
    """What brings it back: a start from nothing."""
    with stock_server(setup.settings("small"), flags=FLAGS) as (_, seconds):
        notes.value("stock start", seconds)


def _tell(notes: Notes, samples: Mapping[str, float]) -> None:
    for name, value in samples.items():
        notes.value(name, value, UNITS.get(name.split()[-1], ""))


COMPARISONS = [
    Comparison(
        title="from the kill to all ranks answering, over stock's warm start",
        unit="s",
        base="stock start",
        ours="dplaunch back",
        goal=0.35,
    ),
    Comparison(title="requests in flight that failed", unit="%", base="stock failed", ours="dplaunch failed", goal=0.0),
    Comparison(
        title="the survivors' pace meanwhile, over before", unit="ms", base="dplaunch before", ours="dplaunch during"
    ),
]

SCRIPT = Script(
    "recover",
    __doc__,
    [
        Step(name="dplaunch", run=dplaunch, limit_s=240, devices=2),
        Step(name="stock", run=stock, limit_s=330, devices=2),
        Step(name="stock-again", run=stock_again, limit_s=240, devices=2),
    ],
    COMPARISONS,
)

if __name__ == "__main__":
    SCRIPT.main()
