"""A rank is killed under load: dplaunch beside stock vLLM (`make bench-recover`).

Clients stream greedy answers over HTTP without a break, in the middle of it one of two ranks gets SIGKILL. What the
clients see is compared with an undisturbed pass before, and the time to two answering ranks with stock's cold start,
for stock has to be started anew.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

from benchmarks.common import Comparison, Settings, parser, report, run_rounds, say, settings_of
from benchmarks.servers import SERVED_NAME, Server, dplaunch_server, stock_server
from benchmarks.streams import Clients, Death, Stream, judge, median_gap

FLAGS = ("--no-enable-prefix-caching",)
"""For both sides: a prompt that was asked before must not be cheaper to take over."""

BACK_LIMIT_S = 240.0
"""Seconds until a killed rank, or clients that wait for a dead server, are given up."""

AFTER_S = 2.0
"""Seconds of load after the rank is back: requests that go to it then are compared too."""

TITLES = {"stock": r"VLLM::EngineCore_DP{rank}$", "dplaunch": r"dplaunch::.+_dp{rank}$"}
"""How each side calls the process of a rank."""

COMPARISONS = [
    Comparison(title="requests in flight that failed", unit="%", base="stock failed", ours="dplaunch failed", goal=0.0),
    Comparison(
        title="from the kill to both ranks answering, over stock's cold start",
        unit="s",
        base="stock start",
        ours="dplaunch back",
        goal=0.20,
    ),
    Comparison(
        title="longest pause of a stream, over stock's cold start", unit="s", base="stock start", ours="dplaunch pause"
    ),
    Comparison(
        title="p50 between tokens on the surviving rank: while the other is gone, over before",
        unit="ms",
        base="dplaunch before",
        ours="dplaunch during",
        goal=1.30,
    ),
    Comparison(
        title="the same over all the load on one of two ranks, both there",
        unit="ms",
        base="dplaunch alone",
        ours="dplaunch during",
    ),
    Comparison(
        title="texts that differ from the undisturbed ones, of all",
        unit="texts",
        base="dplaunch texts",
        ours="dplaunch differ",
        goal=0.0,
    ),
    Comparison(
        title="requests sent after the kill that failed, of all",
        unit="requests",
        base="dplaunch texts",
        ours="dplaunch later",
        goal=0.0,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much is asked.

    Args:
        clients: requests in flight at any time.
        questions: different prompts.
        tokens: generated for each.
        steady_s: seconds of load before the kill.
    """

    clients: int
    questions: int
    tokens: int
    steady_s: float


FULL = Amount(clients=8, questions=16, tokens=64, steady_s=8.0)
QUICK = Amount(clients=4, questions=4, tokens=24, steady_s=3.0)


def rank_pid(side: str, server: Server, rank: int) -> int | None:
    """The process of a rank, found by its title below the server; None where there is none."""
    title = re.compile(TITLES[side].format(rank=rank))
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and title.match(" ".join(process.cmdline()).strip()):
                return process.pid
        except psutil.NoSuchProcess:
            continue
    return None


def kill_rank(side: str, server: Server, rank: int) -> float:
    """SIGKILL; returns when, monotonic seconds.

    Raises:
        RuntimeError: when the rank has no process.
    """
    pid = rank_pid(side, server, rank)
    if pid is None:
        raise RuntimeError(f"{side} has no process of rank {rank}\n{server.output()[-2000:]}")
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


async def measure_stock(server: Server, amount: Amount, rank: int) -> Mapping[str, float]:
    """The share of requests in flight that fail when a rank of stock vLLM dies."""
    async with _clients(server, amount) as clients:
        known = await clients.once()
        async with asyncio.timeout(amount.steady_s + BACK_LIMIT_S), clients.steadily() as streams:
            await asyncio.sleep(amount.steady_s)
            killed = kill_rank("stock", server, rank)
            while any(stream.in_flight(time.monotonic()) for stream in streams if stream.began <= killed):
                await asyncio.sleep(0.05)
    death = judge(streams, known, 0.0, killed, time.monotonic())
    return {"stock failed": 100 * death.failed / death.in_flight, "stock in flight": death.in_flight}


async def measure_dplaunch(server: Server, amount: Amount, rank: int) -> Mapping[str, float]:
    """What the clients of dplaunch see when a rank dies and comes back."""
    async with _clients(server, amount) as clients:
        known = await clients.once()
        alone = await _alone(clients, amount)
        async with asyncio.timeout(amount.steady_s + BACK_LIMIT_S), clients.steadily() as streams:
            # Half of it until the first requests of all clients do not end together any more.
            await asyncio.sleep(amount.steady_s / 2)
            start = time.monotonic()
            await asyncio.sleep(amount.steady_s / 2)
            killed = kill_rank("dplaunch", server, rank)
            while not await clients.answers(rank):
                await asyncio.sleep(0.05)
            back = time.monotonic()
            await asyncio.sleep(AFTER_S)
    death = judge(streams, known, start, killed, back)
    for stream in streams:
        if stream.error:
            say(f"  prompt {stream.prompt}, sent {stream.began - killed:+.1f} s from the kill: {stream.error}")
    return dplaunch_samples(death, back - killed, alone)


def dplaunch_samples(death: Death, back_s: float, alone_s: float) -> Mapping[str, float]:
    """The samples of a round.

    Args:
        death: what the clients saw.
        back_s: seconds from the kill until the rank answered again.
        alone_s: the median between two tokens with the whole load on one of the ranks, seconds.
    """
    return {
        "dplaunch failed": 100 * death.failed / death.in_flight,
        "dplaunch in flight": death.in_flight,
        "dplaunch later": death.failed_later,
        "dplaunch texts": death.compared,
        "dplaunch differ": death.differ,
        "dplaunch back": back_s,
        "dplaunch pause": death.pause_s,
        "dplaunch before": 1e3 * death.before_s,
        "dplaunch alone": 1e3 * alone_s,
        "dplaunch during": 1e3 * death.during_s,
    }


async def _alone(clients: Clients, amount: Amount) -> float:
    """The median between two tokens with the whole load on rank 0 while the other one idles, seconds.

    What the survivor has to do once the other's requests are its own; the rest is what the restart costs it.
    """
    streams: list[Stream]
    async with clients.steadily(rank=0) as streams:
        start = time.monotonic()
        await asyncio.sleep(amount.steady_s / 2)
        end = time.monotonic()
    return median_gap(streams, start, end)


def _clients(server: Server, amount: Amount) -> Clients:
    return Clients(
        server.address, SERVED_NAME, clients=amount.clients, questions=amount.questions, tokens=amount.tokens
    )


def contenders(settings: Settings) -> dict[str, Callable[[], Mapping[str, float]]]:
    """What runs in every round; the last rank is killed."""
    amount, rank = QUICK if settings.quick else FULL, settings.dp - 1

    def stock() -> Mapping[str, float]:
        with stock_server(settings, flags=FLAGS) as (server, seconds):
            return {"stock start": seconds, **asyncio.run(measure_stock(server, amount, rank))}

    def dplaunch() -> Mapping[str, float]:
        with dplaunch_server(settings, flags=FLAGS) as (server, seconds):
            return {"dplaunch start": seconds, **asyncio.run(measure_dplaunch(server, amount, rank))}

    return {run.__name__: run for run in (stock, dplaunch)}


def main() -> None:
    """Runs the benchmark and prints its report."""
    settings = settings_of(parser(__doc__).parse_args())
    samples = run_rounds(settings.rounds, contenders(settings))
    report("recover", settings, COMPARISONS, samples, ("compared with", "dplaunch"))


if __name__ == "__main__":
    main()
