"""A 0.6B model on all devices, beside stock: starts, tokens/s, a rank's death (`python -m benchmarks.gpu.small`)."""

from __future__ import annotations

from benchmarks.common import DPLAUNCH, STOCK, Comparison, throughput
from benchmarks.gpu.sides import imports, in_process, over_http
from benchmarks.gpu.steps import Script, Step

GOAL = 0.35
"""Of stock's warm start, for a start and for the way back after a death."""

MODEL = "small"


def rates(model: str) -> list[Comparison]:
    """Tokens/s, with one frontend each; and all ranks over one."""
    pairs = {
        "over HTTP": (f"{model} stock http", f"{model} dplaunch http"),
        "in process": (f"{model} stock engine", f"{model} dplaunch engine"),
        "of a batch": (f"{model} stock batch", f"{model} dplaunch generate"),
    }
    ours = f"{model} dplaunch"
    more = {
        "all ranks over one": (f"{ours} dp=1 engine", f"{ours} engine"),
        "of a batch, all ranks over one": (f"{ours} dp=1 generate", f"{ours} generate"),
    }
    return [
        throughput(f"{model}: tokens/s {what}", base, ours, goal)
        for goal, each in ((1.0, pairs), (None, more))
        for what, (base, ours) in each.items()
    ]


def one_rank(model: str, about_s: float) -> Step:
    """The same on one of several devices, for how much more several ranks do."""
    return Step(name="one-rank", run=in_process(DPLAUNCH, model, 1), limit_s=2 * about_s, about_s=about_s, devices=2)


def starts(model: str, goal: float | None = None) -> list[Comparison]:
    """Process start to first answer."""
    kinds = {"http warm": goal, "http second": goal, "python warm": None, "http cold": None, "python cold": None}
    return [
        Comparison(
            title=f"{model}: {kind} start",
            unit="s",
            base=f"{model} stock {kind} start",
            ours=f"{model} dplaunch {kind} start",
            goal=wanted,
        )
        for kind, wanted in kinds.items()
    ]


DEATH = [
    Comparison(title="requests in flight that failed", unit="%", base="stock failed", ours="dplaunch failed", goal=0.0),
    Comparison(
        title="from the kill to all ranks answering, over stock's warm start",
        unit="s",
        base=f"{MODEL} stock http warm start",
        ours="dplaunch back",
        goal=GOAL,
    ),
    Comparison(
        title="the survivors' pace meanwhile, over before", unit="ms", base="dplaunch before", ours="dplaunch during"
    ),
]

SCRIPT = Script(
    "small",
    __doc__,
    [
        Step(name="imports", run=imports, limit_s=120, about_s=25),
        # The first of each side fills its caches, so that a server's is its second start. Stock's come first: they are
        # the dear ones, and what finds no time left is made up for the sooner.
        Step(name="stock-python", run=in_process(STOCK, MODEL), limit_s=360, about_s=110),
        Step(name="stock-http", run=over_http(STOCK, MODEL, kill=True), limit_s=360, about_s=210),
        Step(name="dplaunch-python", run=in_process(DPLAUNCH, MODEL), limit_s=240, about_s=110),
        Step(name="dplaunch-http", run=over_http(DPLAUNCH, MODEL, kill=True), limit_s=240, about_s=90),
        one_rank(MODEL, 45),
    ],
    [*starts(MODEL, GOAL), *rates(MODEL), *DEATH],
)

if __name__ == "__main__":
    SCRIPT.main()
