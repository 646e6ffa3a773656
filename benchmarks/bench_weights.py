"""How long new weights take to be in all ranks (`make bench-weights`).

Real engines with 1 and 2 ranks, from memory and from disk; stand-ins with 1, 2, 4 and 8 ranks, each of which copies all
that it is given. The time should grow with the model, and not with the ranks, as far as the memory's bandwidth goes.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import Samples, machine, parser, print_table, run_rounds, settings_of
from benchmarks.weights import measure_weights

RANKS = (1, 2, 4, 8)

MIB = 512
"""Of the stand-ins' weights: four buckets or so, many times what a cache holds."""


def rows(medians: Mapping[str, float], real: Sequence[int], mib: int) -> list[tuple[str, ...]]:
    """The table: seconds, MiB/s into each rank, and the time over that with one rank."""
    kinds = {"memory": "real, from memory", "memory plain": "real, unverified", "disk": "real, from disk"}
    table: list[tuple[str, ...]] = [("", "ranks", "update (s)", "MiB/s each", "over 1 rank")]
    for kind, title in kinds.items():
        for ranks in real:
            table.append(_row(title, ranks, medians[f"{ranks} {kind}"], medians["mib"], medians[f"1 {kind}"]))
    for ranks in RANKS:
        table.append(_row("stand-ins", ranks, medians[f"{ranks} stand-ins"], mib, medians["1 stand-ins"]))
    return table


def _row(title: str, ranks: int, seconds: float, mib: float, one: float) -> tuple[str, ...]:
    return (title, str(ranks), f"{seconds:.2f}", f"{mib / seconds:.0f}", f"{seconds / one:.2f}")


def report(samples: Samples, real: Sequence[int], mib: int) -> None:
    """Prints the machine, the table, and one last line of JSON with all samples."""
    host = machine()
    medians = {name: statistics.median(values) for name, values in samples.items()}
    print("\n" + ", ".join(host.values()))
    print_table(rows(medians, real, mib))
    most = max(real)
    ratios = {
        f"{RANKS[-1]} stand-ins over 1": medians[f"{RANKS[-1]} stand-ins"] / medians["1 stand-ins"],
        f"{most} real ranks over 1, from memory": medians[f"{most} memory"] / medians["1 memory"],
        f"from memory over from disk, {most} ranks": medians[f"{most} memory"] / medians[f"{most} disk"],
    }
    result: dict[str, Any] = {
        "benchmark": "weights",
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "samples": {name: [round(value, 3) for value in values] for name, values in samples.items()},
        "machine": host,
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    """Runs the benchmark and prints its report."""
    options = parser(__doc__)
    options.add_argument("--mib", type=int, default=MIB, help=f"of the stand-ins' weights (default {MIB})")
    given = options.parse_args()
    settings = settings_of(given)
    updates = 2 if settings.quick else 5
    measure = functools.partial(measure_weights, settings, RANKS, given.mib, updates)
    report(run_rounds(settings.rounds, {"updates": measure}), sorted({1, settings.dp}), given.mib)


if __name__ == "__main__":
    main()
