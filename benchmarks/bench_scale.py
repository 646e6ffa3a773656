"""Many ranks on one machine, with stand-in engines (`make bench-scale`).

What dplaunch itself costs: a stand-in speaks vLLM's protocol and computes nothing. Groups of 1, 2, 4, ... 256 ranks are
started, asked and closed; the largest is also watched while nothing happens, and loses an eighth of its ranks at once.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.common import Samples, machine, print_table, run_rounds
from benchmarks.scale import measure_scale

LARGEST = 256
QUICK_LARGEST = 32

KILLED_SHARE = 8
"""One of so many ranks of the largest group is killed: 32 of 256."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure beside its goal.

    Args:
        title: what it is.
        value: of the medians.
        goal: at most this; with `exact`, this.
    """

    title: str
    value: float
    goal: float
    exact: bool = False

    @property
    def verdict(self) -> str:
        """The goal, and whether it was met."""
        met = self.value == self.goal if self.exact else self.value <= self.goal
        return f"{'=' if self.exact else '<='} {self.goal:g} {'met' if met else 'MISSED'}"


def sizes_up_to(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest itself."""
    sizes = [1]
    while sizes[-1] * 2 < largest:
        sizes.append(sizes[-1] * 2)
    return [*sizes, largest] if largest > 1 else sizes


def slope(medians: Mapping[str, float], smaller: int, larger: int) -> float:
    """Seconds that each further rank adds to the start between two sizes."""
    return (medians[f"{larger} start"] - medians[f"{smaller} start"]) / (larger - smaller)


def figures(medians: Mapping[str, float], sizes: Sequence[int]) -> list[Figure]:
    """What has a goal. Needs five sizes or more."""
    largest, quarter, few = sizes[-1], sizes[-3], sizes[1]
    growth = slope(medians, quarter, largest) / slope(medians, sizes[0], quarter)
    return [
        Figure(title=f"{largest} ranks ready, from the start of the process (s)", value=medians["cold start"], goal=15),
        Figure(title=f"{largest} ranks ready, launched again (s)", value=medians[f"{largest} start"], goal=15),
        Figure(title=f"a further rank beyond {quarter}, over one below (1: linear)", value=growth, goal=1.25),
        Figure(title=f"launcher, {largest} idle ranks (% of a core)", value=medians["idle launcher"], goal=2),
        Figure(
            title=f"routing with {largest} ranks over {few}",
            value=medians[f"{largest} routing"] / medians[f"{few} routing"],
            goal=1.25,
        ),
        Figure(
            title=f"ranks that came back of {medians['killed']:g} killed at once",
            value=medians["back"],
            goal=medians["killed"],
            exact=True,
        ),
    ]


def report(samples: Samples, sizes: Sequence[int], rounds: int) -> None:
    """Prints the machine, both tables, and one last line of JSON with all samples."""
    host = machine()
    medians = {name: statistics.median(values) for name, values in samples.items()}
    print("\n" + ", ".join(host.values()))
    columns = ("start", "close", "routing", "request")
    print_table(
        [
            (f"median of {rounds}", "start (s)", "close (s)", "routing (us)", "request (us)", "start/rank (ms)"),
            *(
                (
                    f"{size} rank{'s' if size > 1 else ''}",
                    *(f"{medians[f'{size} {column}']:.1f}" for column in columns),
                    f"{1e3 * medians[f'{size} start'] / size:.0f}",
                )
                for size in sizes
            ),
        ]
    )
    found = figures(medians, sizes)
    print()
    print_table([("", "", "goal"), *((each.title, f"{each.value:.2f}", each.verdict) for each in found)])
    back, zygote = medians["back seconds"], medians["idle zygote"]
    print(f"The killed ranks were back after {back:.1f} s. The zygote of idle ranks took {zygote:.2f}% of a core.")
    result = {
        "benchmark": "scale",
        "figures": {each.title: round(each.value, 4) for each in found},
        "goals": {each.title: each.goal for each in found},
        "samples": {name: [round(value, 3) for value in values] for name, values in samples.items()},
        "machine": host,
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    """Runs the benchmark and prints its report."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default 3)")
    options.add_argument("--quick", action="store_true", help=f"one round, up to {QUICK_LARGEST} ranks")
    options.add_argument("--largest", type=int, help=f"the largest group, 16 or more (default {LARGEST})")
    given = options.parse_args()
    largest = given.largest or (QUICK_LARGEST if given.quick else LARGEST)
    if largest < 16:
        options.error("--largest must be 16 or more: growth is seen over several sizes")
    sizes = sizes_up_to(largest)
    group: Callable[[], Mapping[str, float]] = functools.partial(
        measure_scale,
        [largest, *sizes],
        idle_s=5.0 if given.quick else 20.0,
        kill=largest // KILLED_SHARE,
        requests=100 if given.quick else 500,
    )
    rounds = 1 if given.quick else given.rounds
    report(run_rounds(rounds, {"groups": group}), sizes, rounds)


if __name__ == "__main__":
    main()
