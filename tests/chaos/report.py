"""What came of a soak run, for people and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Report:
    """The counts of one run.

    Args:
        seed: what the run can be repeated with.
        backend: where the ranks ran.
        engine: "stand-in" or "vLLM".
        ranks: how many.
        minutes: how long.
        faults: harm done, by kind.
        deaths: ranks that went down.
        accepted: requests that the group took.
        outcomes: what became of them.
        errors: what those that failed ended with.
        tokens: tokens compared.
        counters: the data path's own counts.
        longest_pause_s: between two tokens of a stream.
        rss_mb: the launcher's memory behind the warm-up, and at the end.
        rss_mb_per_minute: its slope.
        fds: file descriptors, likewise.
        shm: shared memory objects, likewise.
        violations: what must not be.
        last_events: the end of the event stream, where something must not be.
    """

    seed: int
    backend: str
    engine: str
    ranks: int
    minutes: float
    faults: dict[str, int] = field(default_factory=dict)
    deaths: int = 0
    accepted: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    longest_pause_s: float = 0.0
    rss_mb: tuple[int, int] = (0, 0)
    rss_mb_per_minute: float = 0.0
    fds: tuple[int, int] = (0, 0)
    shm: tuple[int, int] = (0, 0)
    violations: list[str] = field(default_factory=list)
    last_events: list[str] = field(default_factory=list)

    def json(self) -> str:
        """One object."""
        return json.dumps(asdict(self), indent=2)

    def text(self) -> str:
        """A few lines."""
        rows: list[tuple[str, Any]] = [
            ("run", f"{self.ranks} {self.engine} ranks on {self.backend}, {self.minutes:g} min, seed {self.seed}"),
            ("faults", f"{sum(self.faults.values())}: {_counts(self.faults)}"),
            ("ranks that died", self.deaths),
            ("requests accepted", self.accepted),
            ("outcomes", _counts(self.outcomes)),
            *(("  failed with", f"{count} x {words}") for words, count in self.errors.items()),
            ("tokens compared", self.tokens),
            ("data path", _counts(self.counters)),
            ("longest pause", f"{self.longest_pause_s:.1f} s between two tokens of a stream"),
            ("memory", f"{self.rss_mb[0]} MB, at the end {self.rss_mb[1]} MB ({self.rss_mb_per_minute:+.2f} MB/min)"),
            ("file descriptors", f"{self.fds[0]}, at the end {self.fds[1]}"),
            ("shared memory", f"{self.shm[0]} objects, at the end {self.shm[1]}"),
            ("violations", len(self.violations)),
        ]
        lines = [f"{name:<18} {value}" for name, value in rows]
        lines += [f"VIOLATION          {line}" for line in self.violations]
        lines += [f"  {line}" for line in self.last_events]
        return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
