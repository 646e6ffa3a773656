"""An 8B model on all devices, beside stock: starts and tokens/s (`python -m benchmarks.gpu.large`)."""

from __future__ import annotations

from benchmarks.common import DPLAUNCH, STOCK
from benchmarks.gpu.sides import in_process, over_http
from benchmarks.gpu.small import one_rank, rates, starts
from benchmarks.gpu.steps import Script, Step

MODEL = "large"

SCRIPT = Script(
    "large",
    __doc__,
    [
        Step(name="dplaunch-python", run=in_process(DPLAUNCH, MODEL), limit_s=280, about_s=110),
        Step(name="stock-python", run=in_process(STOCK, MODEL), limit_s=400, about_s=110),
        Step(name="dplaunch-http", run=over_http(DPLAUNCH, MODEL), limit_s=200, about_s=75),
        Step(name="stock-http", run=over_http(STOCK, MODEL), limit_s=360, about_s=150),
        one_rank(MODEL, 80),
    ],
    [*rates(MODEL), *starts(MODEL)],
)

if __name__ == "__main__":
    SCRIPT.main()
