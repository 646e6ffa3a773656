"""What a request costs on its way: ranks in a Ray cluster beside ranks of mp (`make bench-dispatch`).

The same requests to both, in blocks that alternate: one at a time with one token each, and as many at once as are
answered best. With vLLM, which is what the user sees; and with engines that answer at once, where nothing hides what
the way itself costs: mp's is unix sockets, Ray's TCP on the address of the node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from benchmarks.common import Comparison, Settings, parser, report, run_rounds, settings_of
from benchmarks.dispatch import BACKENDS, Amount, measure_dispatch
from benchmarks.load import Load

ENGINES = ("vllm", "standin")

AMOUNTS = {
    "vllm": Amount(requests=400, calls=1000, blocks=10, load=Load(clients=16, requests=48, tokens=16)),
    "standin": Amount(requests=4000, calls=4000, blocks=20, load=Load(clients=64, requests=640, tokens=16)),
}

QUICK_AMOUNT = Amount(requests=20, calls=40, blocks=2, load=Load(clients=8, requests=16, tokens=4))

OVERHEAD = 1.05
"""What Ray may take of mp's time for a request."""


def comparisons(engine: str) -> list[Comparison]:
    """The lines of the table for "vllm" or "standin"; only what the user sees has a goal."""
    goals = (OVERHEAD, 1 / OVERHEAD) if engine == "vllm" else (None, None)

    def line(what: str, unit: str, sample: str, goal: float | None = None, more: bool = False) -> Comparison:
        base, ours = (f"{backend} {engine} {sample}" for backend in BACKENDS)
        return Comparison(title=f"{engine}: {what}", unit=unit, base=base, ours=ours, goal=goal, more_is_better=more)

    return [
        line("a request of one token, alone", "ms", "latency", goals[0]),
        line("the slowest of twenty of them", "ms", "p95"),
        line("throughput at full concurrency", "tokens/s", "rate", goals[1], more=True),
        line("a call to a rank and back", "us", "call"),
    ]


def contenders(settings: Settings, engines: list[str]) -> dict[str, Callable[[], Mapping[str, float]]]:
    """What runs in every round: both backends at once, twice, for the group that is started first is the slower one."""

    def both(engine: str, first: str) -> Mapping[str, float]:
        amount = QUICK_AMOUNT if settings.quick else AMOUNTS[engine]
        measured = measure_dispatch(engine == "standin", first, amount, settings)
        return {name.replace(" ", f" {engine} ", 1): value for name, value in measured.items()}

    return {
        f"{engine}, {first} first": functools.partial(both, engine, first) for engine in engines for first in BACKENDS
    }


def main() -> None:
    """Runs the benchmark and prints its report."""
    options = parser(__doc__)
    options.add_argument("--engine", choices=ENGINES, help="one of them only (default: both)")
    given = options.parse_args()
    settings = settings_of(given)
    engines = [given.engine] if given.engine else list(ENGINES)
    lines = [line for engine in engines for line in comparisons(engine)]
    report("dispatch", settings, lines, run_rounds(settings.rounds, contenders(settings, engines)), BACKENDS)


if __name__ == "__main__":
    main()
