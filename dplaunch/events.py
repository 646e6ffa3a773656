"""What happens to a group, as a stream that anyone may watch: the progress table, the log, a test."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


class RankState(enum.StrEnum):
    """Where a rank is in its life."""

    STARTING = "starting"  # its process is being made, or loads
    READY = "ready"  # it proved itself and takes requests
    DOWN = "down"  # it ended unasked; a restart may follow
    STOPPING = "stopping"  # it was asked to end
    STOPPED = "stopped"  # it ended as asked
    FAILED = "failed"  # it ended and does not come back
    STALE = "stale"  # it runs with other weights than the group's, and takes no requests


class Kind(enum.StrEnum):
    """What an event is about, for whoever reads them by machine."""

    NOTE = "note"  # a line for people
    STATE = "state"  # a rank entered a state
    PHASE = "phase"  # a starting rank is busy with something else
    HANG = "hang"  # a rank did not answer in time and is ended
    MOVED = "moved"  # requests of a dead rank continue on others
    LOST = "lost"  # a request could not be moved, and ended with an error
    POISONED = "poisoned"  # a request was in flight on too many dying ranks, and ended with an error
    REFUSED = "refused"  # requests were turned away: nothing can take them
    SCALE = "scale"  # the number of ranks changes, or a change failed
    ROLL = "roll"  # ranks are restarted on request
    WEIGHTS = "weights"  # the weights changed, or did not; the group paused, slept or went on
    GROUP = "group"  # the group is ready, degraded, dead, or closed


class Level(enum.StrEnum):
    """How much an event matters to someone who watches."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened.

    Args:
        message: one line for people, complete without the other fields.
        kind: what it is about.
        rank: the rank that it happened to; None for the group.
        incarnation: the rank's incarnation.
        state: the rank's state from now on; None when unchanged or when it is about the group.
        phase: what a starting rank is busy with: importing, loading, compiling, capturing, warming,
            or whom it waits for.
        level: how much it matters.
        at: Unix time, seconds.
        data: more about it for machines, by name: plain values that JSON can hold.
    """

    message: str
    kind: Kind = Kind.NOTE
    rank: int | None = None
    incarnation: int = 0
    state: RankState | None = None
    phase: str = ""
    level: Level = Level.INFO
    at: float = field(default_factory=time.time)
    data: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]
"""Called in the group's event loop for every event; must not block and must not raise."""


def as_record(event: Event) -> dict[str, Any]:
    """The event as plain values: what `--json-logs`, the event log and the control socket show of it."""
    return {
        "at": round(event.at, 3),
        "time": datetime.fromtimestamp(event.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "kind": event.kind,
        "level": event.level,
        "rank": event.rank,
        "incarnation": event.incarnation,
        "state": event.state,
        "phase": event.phase,
        "message": event.message,
        "data": dict(event.data),
    }
