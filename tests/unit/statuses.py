"""Statuses as `dplaunch.status.snapshot` makes them, for tests of what shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COUNTS = ("in_flight", "queued", "accepted", "finished", "aborted", "moved", "replayed", "lost", "poisoned", "refused")


def rank_status(rank: int, **facts: Any) -> dict[str, Any]:
    """A rank that serves, but for what is said otherwise."""
    return {
        "rank": rank,
        "state": "ready",
        "since": 0.0,
        "incarnation": 0,
        "pid": 4710 + rank,
        "process": f"pid {4710 + rank}",
        "node": "here",
        "device_type": "cuda",
        "devices": [str(rank)],
        "instance_id": f"g_dp{rank}",
        "in_flight": 0,
        "tokens": 0,
        "tokens_per_s": 0.0,
        "restarts": 0,
        "recovery_s": [],
        "last_exit": None,
        "stale": "",
        "log_file": f"/logs/g/rank{rank}.log",
        **facts,
    }


def group_status(
    *, ranks: Sequence[Mapping[str, Any]] | None = None, requests: Mapping[str, int] | None = None, **facts: Any
) -> dict[str, Any]:
    """A group of two ranks that serves, but for what is said otherwise."""
    there = [rank_status(0), rank_status(1)] if ranks is None else list(ranks)
    return {
        "name": "g",
        "pid": 4700,
        "host": "here",
        "backend": "mp",
        "mode": "independent",
        "model": "m",
        "address": "http://127.0.0.1:8000",
        "state": "ready",
        "error": None,
        "started_at": 0.0,
        "uptime_s": 192.0,
        "weights": {"version": "0", "checksum": "", "lost": "", "loras": []},
        "stance": "serving",
        "dp": len(there),
        "ready": sum(rank["state"] == "ready" for rank in there),
        "min_ranks": 1,
        "requests": {**dict.fromkeys(COUNTS, 0), **(requests or {})},
        "tokens_per_s": sum(rank["tokens_per_s"] for rank in there),
        "log_dir": "/logs/g",
        "ranks": there,
        **facts,
    }
