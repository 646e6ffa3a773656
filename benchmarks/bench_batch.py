"""A batch of skewed answer lengths: handed out as ranks free up, beside equal chunks (`make bench-batch`).

Chunks are what a harness makes that cuts its prompts into as many equal parts as there are ranks. The lengths are
log-normal, 8 to 512 tokens, in three orders; nobody knows them before. Two of the batches are asked once more, as an
evaluation in a training loop is, with answers that have changed somewhat. With vLLM, and with engines whose steps take
the same time however many sequences run, as a device's nearly do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping

from benchmarks.batches import BATCHES, WAYS, Amount, measure_batches
from benchmarks.common import Comparison, Settings, parser, report, run_rounds, settings_of

ENGINES = ("standin", "vllm")

AMOUNTS = {
    "standin": Amount(prompts=256, max_num_seqs=16, step_s=0.005),
    "vllm": Amount(prompts=64, max_num_seqs=8),
}

QUICK_AMOUNT = Amount(prompts=16, max_num_seqs=2, step_s=0.002)

GOAL = 1.25
"""Our tokens a second over those of chunks."""


def comparisons(engine: str) -> list[Comparison]:
    """The lines of the table for "vllm" or "standin"."""

    def line(what: str, unit: str, batch: str, sample: str, goal: float | None = None) -> Comparison:
        base, ours = (f"{way} {engine} {batch} {sample}" for way in WAYS)
        title = f"{engine}: {what}, {batch}"
        return Comparison(title=title, unit=unit, base=base, ours=ours, goal=goal, more_is_better=True)

    return [
        *(line("throughput", "tokens/s", batch, "rate", GOAL) for batch in BATCHES),
        *(line("time in which a rank is idle", "%", batch, "idle") for batch in BATCHES),
    ]


def contenders(settings: Settings, engines: list[str]) -> dict[str, Callable[[], Mapping[str, float]]]:
    """What runs in every round: both ways in one process."""

    def both(engine: str, turns: itertools.count[int]) -> Mapping[str, float]:
        amount = QUICK_AMOUNT if settings.quick else AMOUNTS[engine]
        measured = measure_batches(engine == "standin", next(turns), amount, settings)
        return {name.replace(" ", f" {engine} ", 1): value for name, value in measured.items()}

    return {engine: functools.partial(both, engine, itertools.count()) for engine in engines}


def main() -> None:
    """Runs the benchmark and prints its report."""
    options = parser(__doc__)
    options.add_argument("--engine", choices=ENGINES, help="one of them only (default: both)")
    given = options.parse_args()
    settings = settings_of(given)
    engines = [given.engine] if given.engine else list(ENGINES)
    lines = [line for engine in engines for line in comparisons(engine)]
    report("batch", settings, lines, run_rounds(settings.rounds, contenders(settings, engines)), ("chunks", "dplaunch"))


if __name__ == "__main__":
    main()
