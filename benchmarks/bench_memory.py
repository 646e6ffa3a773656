"""Memory that is not a rank's own: dplaunch beside stock vLLM (`make bench-memory`).

PSS (proportional set size: a page that N processes share counts 1/N in each) of each process below the server
that is neither an engine core nor a worker of one: stock's frontend and coordinator, dplaunch's launcher and
zygote. Taken once a few requests have been answered, so that what is loaded on first use is there.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from benchmarks.common import Comparison, Settings, parser, report, run_rounds, say, settings_of
from benchmarks.load import QUICK, http_tokens_per_second
from benchmarks.servers import SERVED_NAME, Server, dplaunch_server, stock_server

COMPARISONS = [
    Comparison(title="not a rank's own", unit="MiB", base="stock overhead", ours="dplaunch overhead", goal=1.0),
    Comparison(title="all processes", unit="MiB", base="stock total", ours="dplaunch total"),
]

_RANK_TITLE = re.compile(r"VLLM::(EngineCore|Worker)|dplaunch::.+_dp\d+$")


def measure(side: str, server: Server) -> Mapping[str, float]:
    """PSS in MiB of the server's processes, split into the ranks' own and the rest."""
    asyncio.run(http_tokens_per_second(QUICK, server.address, SERVED_NAME))
    root = psutil.Process(server.process.pid)
    family = [root, *root.children(recursive=True)]
    own = {process.pid for process in family if _RANK_TITLE.match(_title(process))}
    if not own:
        raise RuntimeError(f"no rank among {side}'s processes: {[_title(process) for process in family]}")
    sizes = {process: _pss_mib(process.pid) for process in family}
    rest = {process: size for process, size in sizes.items() if not _is_ranks(process, own)}
    for process, size in rest.items():
        say(f"  {side}: {size:7.1f} MiB  {_title(process)[:80]}")
    return {f"{side} overhead": sum(rest.values()), f"{side} total": sum(sizes.values())}


def _is_ranks(process: psutil.Process, own: set[int]) -> bool:
    return process.pid in own or any(parent.pid in own for parent in process.parents())


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline()).strip()


def _pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def contenders(settings: Settings) -> dict[str, Callable[[], Mapping[str, float]]]:
    """What runs in every round."""

    def stock() -> Mapping[str, float]:
        with stock_server(settings) as (server, _):
            return measure("stock", server)

    def dplaunch() -> Mapping[str, float]:
        with dplaunch_server(settings) as (server, _):
            return measure("dplaunch", server)

    return {run.__name__: run for run in (stock, dplaunch)}


def main() -> None:
    """Runs the benchmark and prints its report."""
    settings = settings_of(parser(__doc__).parse_args())
    report("memory", settings, COMPARISONS, run_rounds(settings.rounds, contenders(settings)))


if __name__ == "__main__":
    main()
