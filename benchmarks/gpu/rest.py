"""In one call: executors, one rank and all, lockstep, Ray, the start of one rank (`python -m benchmarks.gpu.rest`).

The steps of `moe` and `ray` that two devices suffice for; those scripts have them all.
"""

from __future__ import annotations

from benchmarks.common import DPLAUNCH, STOCK, Comparison, throughput
from benchmarks.gpu import moe, ray
from benchmarks.gpu.sides import executors, over_http
from benchmarks.gpu.steps import Script, Step

SCRIPT = Script(
    "rest",
    __doc__,
    [
        Step(name="executors", run=executors("small"), limit_s=240, about_s=100),
        *moe.SCRIPT.steps.values(),
        ray.SCRIPT.steps["ranks"],
        ray.SCRIPT.steps["nested-tp2"],
        Step(name="dplaunch-1", run=over_http(DPLAUNCH, "small", 1), limit_s=150, about_s=35, devices=2),
        Step(name="stock-1", run=over_http(STOCK, "small", 1), limit_s=240, about_s=75, devices=2),
    ],
    [
        throughput("executor mp over uni", "small uni dp=all engine", "small mp dp=all engine"),
        throughput("all ranks over one, engine", "small mp dp=1 engine", "small mp dp=all engine"),
        throughput("all ranks over one, generate", "small mp dp=1 generate", "small mp dp=all generate"),
        *moe.COMPARISONS,
        Comparison(
            title="warm start of one rank",
            unit="s",
            base="small stock dp=1 http warm start",
            ours="small dplaunch dp=1 http warm start",
        ),
    ],
)

if __name__ == "__main__":
    SCRIPT.main()
