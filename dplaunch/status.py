"""What a group is at this moment, as plain values: for `dplaunch status`, the metrics, and whoever else looks."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dplaunch.backend import Exit
from dplaunch.client import GroupClient
from dplaunch.errors import DplaunchError
from dplaunch.events import RankState
from dplaunch.plan import RankSpec
from dplaunch.rank import Rank
from dplaunch.supervisor import Supervisor
from dplaunch.weights import FIRST_VERSION, Stance, Weights

if TYPE_CHECKING:
    from dplaunch.life import GroupLife

SAMPLE_S = 1.0
"""Seconds between two looks at the token counters."""

SAMPLES = 6
"""Looks that are kept: a rate is over the last five seconds, steady enough to read and soon to follow."""

WAITING = "waiting"
"""The state of a rank that has not been started."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is of a group by now, for whoever only looks.

    Args:
        supervisor: None before there are any ranks.
        client: None before there are any ranks.
        error: what it died of.
        is_open: whether its start is over.
        is_closing: whether its end has begun.
    """

    supervisor: Supervisor | None
    client: GroupClient | None
    error: DplaunchError | None
    is_open: bool
    is_closing: bool


class TokenRates:
    """Tokens per second for each rank, from its counter at two times."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[int, int]]] = deque(maxlen=SAMPLES)

    def sample(self, tokens: Mapping[int, int]) -> None:
        """Takes note of the counters as they are now. Call it every `SAMPLE_S` seconds."""
        self._samples.append((time.monotonic(), dict(tokens)))

    def rate(self, rank: int) -> float:
        """The rank's tokens per second over the time that was sampled; 0.0 while nothing is known."""
        if len(self._samples) < 2:
            return 0.0
        (began, before), (ended, after) = self._samples[0], self._samples[-1]
        if ended <= began:
            return 0.0
        return max(0.0, (after.get(rank, 0) - before.get(rank, 0)) / (ended - began))


def snapshot(group: GroupLife) -> dict[str, Any]:
    """The group as it is now. Call it in the group's event loop, once the plan is there.

    Returns plain values, ready for JSON:

    * `name`, `pid` and `host` of the launcher, `backend`, `mode`, `model`, `address` (HTTP; None without a server),
      `started_at` (Unix time), `uptime_s`, `log_dir`;
    * `state`: starting, ready, degraded (ranks are missing), stopping or dead; `error`: what it died of;
    * `weights`: `version` ("0" until they are changed), `checksum` ("" when nobody asked for it), `lost` (why a rank
      that comes up could not be given them; "" when it could), `loras` (names);
    * `stance`: serving, paused or asleep;
    * `dp` (ranks asked for), `ready` (ranks that answer), `min_ranks`;
    * `requests`: `in_flight`, `queued`, and the counters of `dplaunch.counters.Counters`; `tokens_per_s`;
    * `ranks`, each with `rank`, `state`, `since` (Unix time), `incarnation`, `pid`, `process`, `node`, `device_type`,
      `devices`, `instance_id`, `in_flight`, `tokens`, `tokens_per_s`, `restarts`, `recovery_s`, `last_exit`,
      `stale` (why it has not the group's weights; "" when it has), `log_file`.
    """
    plan, sight, seen = group.plan, group.sight, group.seen
    supervisor, client = seen.supervisor, seen.client
    if supervisor is None or client is None:
        ranks = [_planned(spec) for spec in plan.ranks]
    else:
        ranks = [_running(rank, client, sight.rates) for rank in supervisor.ranks]
    wanted = len(plan.ranks) if supervisor is None else len(supervisor.ranks)
    ready = 0 if supervisor is None else supervisor.ready_count
    return {
        "name": plan.base_id,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "backend": plan.spec.backend,
        "mode": plan.mode.value,
        "model": plan.model_note or plan.model,
        "address": sight.address,
        "state": _state(seen, ready, wanted),
        "error": None if seen.error is None else seen.error.message,
        "started_at": round(sight.started_at, 3),
        "uptime_s": round(max(0.0, time.time() - sight.started_at), 1),
        "weights": _weights(group.weights),
        "stance": (Stance.SERVING if group.weights is None else group.weights.stance).value,
        "dp": wanted,
        "ready": ready,
        "min_ranks": plan.spec.min_ranks,
        "requests": _requests(client),
        "tokens_per_s": round(sum(rank["tokens_per_s"] for rank in ranks), 1),
        "log_dir": str(plan.log_dir),
        "ranks": ranks,
    }


def _state(seen: Seen, ready: int, wanted: int) -> str:
    if seen.error is not None:
        return "dead"
    if seen.is_closing:
        return "stopping"
    if not seen.is_open:
        return "starting"
    return "ready" if ready >= wanted else "degraded"


def _weights(weights: Weights | None) -> dict[str, Any]:
    if weights is None:
        return {"version": FIRST_VERSION, "checksum": "", "lost": "", "loras": []}
    return {
        "version": weights.version,
        "checksum": weights.checksum,
        "lost": weights.source.lost(),
        "loras": sorted(weights.loras),
    }


def _requests(client: GroupClient | None) -> dict[str, int]:
    names = ("accepted", "finished", "aborted", "moved", "replayed", "lost", "poisoned", "refused")
    if client is None:
        return dict.fromkeys(("in_flight", "queued", *names), 0)
    counts = {"in_flight": client.unfinished - client.queued, "queued": client.queued}
    return counts | {name: getattr(client.counters, name) for name in names}


def _planned(spec: RankSpec) -> dict[str, Any]:
    return {
        "rank": spec.identity.rank,
        "state": WAITING,
        "since": None,
        "incarnation": 0,
        "pid": None,
        "process": "",
        "node": spec.node,
        "device_type": spec.device_type,
        "devices": list(spec.devices),
        "instance_id": spec.identity.instance_id,
        "in_flight": 0,
        "tokens": 0,
        "tokens_per_s": 0.0,
        "restarts": 0,
        "recovery_s": [],
        "last_exit": None,
        "stale": "",
        "log_file": str(spec.log_file),
    }


def _running(rank: Rank, client: GroupClient, rates: TokenRates) -> dict[str, Any]:
    number, handle = rank.identity.rank, rank.handle
    lives = handle is not None and handle.poll() is None
    facts = _planned(rank.spec) | {
        "state": WAITING if rank.state is None else rank.state.value,
        "since": round(rank.since, 3),
        "incarnation": rank.identity.incarnation,
        "devices": _devices(rank),
        "instance_id": rank.identity.instance_id,
        "in_flight": client.load.get(number, 0),
        "tokens": client.rank_counters[number].tokens,
        "tokens_per_s": round(rates.rate(number), 1) if rank.state is RankState.READY else 0.0,
        "restarts": rank.restart_count,
        "recovery_s": [round(seconds, 3) for seconds in rank.recovery_s],
        "last_exit": _exit(rank.last_exit),
        "stale": rank.stale,
    }
    if handle is not None and lives:
        facts |= {"pid": handle.pid, "process": handle.describe(), "node": handle.node}
    return facts


def _devices(rank: Rank) -> list[str]:
    """Those of the plan; where a scheduler chose them, those that the rank says it got."""
    told = rank.report.get("devices")
    if not rank.spec.is_scheduled or not told:
        return list(rank.spec.devices)
    names: Iterable[Any] = told.split(",") if isinstance(told, str) else told
    return [str(name) for name in names]


def _exit(died: Exit | None) -> dict[str, Any] | None:
    if died is None:
        return None
    return {"code": died.code, "signal": died.signal, "reason": died.reason, "text": str(died)}
