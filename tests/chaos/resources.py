"""What this process and its family hold while a run goes on, and whether it grows."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from tests.leaks import SHM
from tests.real.families import is_gone

RSS_GROWTH_BYTES = 64 * 2**20
"""What the allocator may keep of a run's peaks; a leak of a kilobyte a request would be more within ten minutes."""

FD_GROWTH = 12
"""Sockets of a rank that is just being replaced, when a sample is taken."""

SHM_GROWTH = 4

WARM_UP = 0.25
"""The share of a run after which nothing may grow any more."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What there was at one moment."""

    at: float
    rss: int
    fds: int
    shm: int

    @classmethod
    def take(cls) -> Sample:
        """Now."""
        return cls(
            at=time.monotonic(),
            rss=psutil.Process().memory_info().rss,
            fds=len(os.listdir("/proc/self/fd")),
            shm=len(os.listdir(SHM)),
        )


@dataclass(slots=True)
class Resources:
    """Samples of a run, and every process that there was below this one."""

    samples: list[Sample] = field(default_factory=list)
    family: set[psutil.Process] = field(default_factory=set)

    def look(self) -> None:
        """Takes a sample."""
        self.samples.append(Sample.take())
        self.family.update(psutil.Process().children(recursive=True))

    def first_and_last(self, of: Callable[[Sample], int]) -> tuple[int, int]:
        """Medians of the first and the last third behind the warm-up: single samples say little."""
        samples = self.samples[int(len(self.samples) * WARM_UP) :]
        third = max(1, len(samples) // 3)
        return (
            round(statistics.median(map(of, samples[:third]))),
            round(statistics.median(map(of, samples[-third:]))),
        )

    def per_minute(self, of: Callable[[Sample], int]) -> float:
        """The slope behind the warm-up."""
        samples = self.samples[int(len(self.samples) * WARM_UP) :]
        if len(samples) < 2:
            return 0.0
        line = statistics.linear_regression([sample.at / 60 for sample in samples], [of(sample) for sample in samples])
        return line.slope

    def growth(self) -> list[str]:
        """One line for each kind of thing that grew."""
        found = []
        for name, of, limit in (
            ("bytes of memory", lambda sample: sample.rss, RSS_GROWTH_BYTES),
            ("file descriptors", lambda sample: sample.fds, FD_GROWTH),
            ("shared memory objects", lambda sample: sample.shm, SHM_GROWTH),
        ):
            first, last = self.first_and_last(of)
            if last - first > limit:
                found.append(f"{name} grew from {first} to {last}, by more than {limit}")
        return found

    def orphans(self, allowed: set[int]) -> list[str]:
        """Processes that are still there, as command lines."""
        left = [each for each in self.family if each.pid not in allowed and not is_gone(each)]
        return [_words(each) for each in left]


def _words(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline()) or process.name()}"
    except psutil.Error:
        return f"{process.pid}"
