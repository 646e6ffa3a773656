"""From process start to the first answer: dplaunch beside stock vLLM (`make bench-launch`).

Over HTTP, one frontend each; and in one Python process, where dplaunch's second launch is set against stock's
first: who launches again has the imports behind him, and stock starts over all the same. With `--backend ray` (make
bench-launch BACKEND=ray) dplaunch's ranks are in a Ray cluster; see `ray_launch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks import ray_launch
from benchmarks.common import DPLAUNCH, STOCK, Comparison, Settings, parser, report, run_rounds, settings_of
from benchmarks.inprocess import run_child
from benchmarks.servers import dplaunch_server, stock_server

COMPARISONS = [
    Comparison(title="first answer over HTTP", unit="s", base="stock http", ours="dplaunch http", goal=0.40),
    Comparison(
        title="second launch in one process over stock's first",
        unit="s",
        base="stock python",
        ours="dplaunch second",
        goal=0.12,
    ),
    Comparison(title="the same, stock from the call on", unit="s", base="stock call", ours="dplaunch second"),
    Comparison(title="first answer in Python", unit="s", base="stock python", ours="dplaunch python"),
]

WITH_DEFAULT = Comparison(
    title="first answer over HTTP, stock's own frontends",
    unit="s",
    base="stock default",
    ours="dplaunch http",
)


def contenders(settings: Settings, with_default: bool) -> dict[str, Callable[[], Mapping[str, float]]]:
    """What runs in every round."""

    def stock_http() -> Mapping[str, float]:
        with stock_server(settings) as (_, seconds):
            return {"stock http": seconds}

    def stock_default() -> Mapping[str, float]:
        with stock_server(settings, frontends=None) as (_, seconds):
            return {"stock default": seconds}

    def dplaunch_http() -> Mapping[str, float]:
        with dplaunch_server(settings) as (_, seconds):
            return {"dplaunch http": seconds}

    def stock_python() -> Mapping[str, float]:
        took = run_child(STOCK, "launch", settings)
        return {"stock python": took["from_start"], "stock call": took["from_call"]}

    def dplaunch_python() -> Mapping[str, float]:
        took = run_child(DPLAUNCH, "launch", settings)
        return {"dplaunch python": took["first_from_start"], "dplaunch second": took["second_from_call"]}

    every = [stock_http, dplaunch_http, stock_python, dplaunch_python]
    return {run.__name__: run for run in ([*every, stock_default] if with_default else every)}


def main() -> None:
    """Runs the benchmark and prints its report."""
    options = parser(__doc__)
    options.add_argument(
        "--with-default",
        action="store_true",
        help="stock with its own number of frontends too (a minute a round)",
    )
    options.add_argument(
        "--backend", choices=["mp", "ray"], default="mp", help="where dplaunch's ranks are (default mp)"
    )
    options.add_argument(
        "--python-only", action="store_true", help="with --backend ray: warm start and restart only (a minute a round)"
    )
    given = options.parse_args()
    settings = settings_of(given)
    if given.backend == "ray":
        if given.with_default:
            options.error("--with-default is not for --backend ray")
        ray_launch.run(settings, given.python_only)
        return
    if given.python_only:
        options.error("--python-only is for --backend ray")
    samples = run_rounds(settings.rounds, contenders(settings, given.with_default))
    report("launch", settings, COMPARISONS + ([WITH_DEFAULT] if given.with_default else []), samples)


if __name__ == "__main__":
    main()
