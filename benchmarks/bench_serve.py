"""Tokens per second: dplaunch beside stock vLLM (`make bench-serve`).

Over HTTP with one frontend each, and in process through AsyncLLM; the same closed loop of clients everywhere.
dplaunch's own `group.generate`, which takes a batch, is set against the same batch given to stock's AsyncLLM at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping

from benchmarks.common import DPLAUNCH, STOCK, Settings, parser, report, run_rounds, settings_of, throughput
from benchmarks.inprocess import run_child
from benchmarks.load import FULL, QUICK, Load, http_tokens_per_second
from benchmarks.servers import SERVED_NAME, dplaunch_server, stock_server

COMPARISONS = [
    throughput("over HTTP", "stock http", "dplaunch http", 1.0),
    throughput("AsyncLLM in process", "stock engine", "dplaunch engine", 1.0),
    throughput("a batch: group.generate", "stock batch", "dplaunch generate", 1.0),
]


def contenders(settings: Settings, load: Load) -> dict[str, Callable[[], Mapping[str, float]]]:
    """What runs in every round."""

    def stock_http() -> Mapping[str, float]:
        with stock_server(settings) as (server, _):
            return {"stock http": asyncio.run(http_tokens_per_second(load, server.address, SERVED_NAME))}

    def dplaunch_http() -> Mapping[str, float]:
        with dplaunch_server(settings) as (server, _):
            return {"dplaunch http": asyncio.run(http_tokens_per_second(load, server.address, SERVED_NAME))}

    def stock_python() -> Mapping[str, float]:
        rates = run_child(STOCK, "generate", settings, load)
        return {"stock engine": rates["engine"], "stock batch": rates["batch"]}

    def dplaunch_python() -> Mapping[str, float]:
        rates = run_child(DPLAUNCH, "generate", settings, load)
        return {"dplaunch engine": rates["engine"], "dplaunch generate": rates["generate"]}

    return {run.__name__: run for run in (stock_http, dplaunch_http, stock_python, dplaunch_python)}


def main() -> None:
    """Runs the benchmark and prints its report."""
    options = parser(__doc__)
    for field in dataclasses.fields(Load):
        options.add_argument(f"--{field.name}", type=int, help=f"default {getattr(FULL, field.name)}")
    given = options.parse_args()
    settings = settings_of(given)
    named = {field.name: getattr(given, field.name) for field in dataclasses.fields(Load)}
    asked = {name: value for name, value in named.items() if value is not None}
    load = dataclasses.replace(QUICK if settings.quick else FULL, **asked)
    samples = run_rounds(settings.rounds, contenders(settings, load))
    report("serve", settings, COMPARISONS, samples)


if __name__ == "__main__":
    main()
