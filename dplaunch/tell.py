"""What the data path tells of requests whose ranks died, or that were not taken."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from dplaunch.errors import RequestError
from dplaunch.events import Event, Kind, Level, Listener
from dplaunch.inflight import Death, InFlight
from dplaunch.migrate import Decision, Move
from dplaunch.suspects import keep_text

REFUSED_EVERY_S = 1.0
"""Seconds between two events about refused requests: they come by the thousand."""


class Teller:
    """Turns what became of requests into events.

    Args:
        emit: told of it.
        poison_file: where the text of requests goes that ranks died of; None for nowhere.
    """

    def __init__(self, emit: Listener, poison_file: Path | None) -> None:
        self._emit = emit
        self._poison_file = poison_file
        self._told_refused = (float("-inf"), 0)

    def moved(self, death: Death, decisions: Mapping[str, Decision], poisoned: int, blame: bool) -> None:
        """A rank is gone, and this becomes of the requests that it had.

        Args:
            death: which rank, and how it ended.
            decisions: what becomes of each.
            poisoned: how many more failed by name.
            blame: whether it died; else it ended on request, or for others' sake.
        """
        counts = {move: sum(decision.move is move for decision in decisions.values()) for move in Move}
        lost = {request_id: one.reason for request_id, one in decisions.items() if one.move is Move.FAIL}
        total = len(decisions) + poisoned
        if not total:
            return
        parts = [
            _phrase(counts[Move.CONTINUE], "continues on others", "continue on others"),
            _phrase(counts[Move.REPLAY], "is sent again", "are sent again"),
            _phrase(counts[Move.VERIFY], "is repeated and compared", "are repeated and compared"),
            _phrase(poisoned, "was on too many dying ranks", "were on too many dying ranks"),
            _phrase(len(lost), "was lost", "were lost"),
        ]
        end = "died" if blame else "ended"
        words = f"rank {death.rank} {end} with {_requests(total)}: {', '.join(filter(None, parts))}"
        data = {"total": total, "poisoned": poisoned, **{move.name.lower(): count for move, count in counts.items()}}
        self._tell(words, Kind.MOVED, Level.WARNING if lost or poisoned else Level.INFO, death, data)
        if lost:
            why = "; ".join(dict.fromkeys(lost.values()))
            words = f"{_requests(len(lost))} of rank {death.rank} could not be moved: {why}"
            self._tell(words, Kind.LOST, Level.WARNING, death, {"requests": lost})

    def lost(self, entry: InFlight, why: str) -> None:
        """One request was lost by itself."""
        message = f"request {entry.request_id} was lost: {why}"
        data = {"requests": {entry.request_id: why}}
        self._emit(Event(message=message, kind=Kind.LOST, level=Level.WARNING, data=data))

    def poisoned(self, entry: InFlight, error: RequestError) -> None:
        """A request was in flight on too many dying ranks."""
        message = error.message
        if self._poison_file is not None:
            try:
                keep_text(self._poison_file, entry, error)
                message += f"; its text is in {self._poison_file}"
            except OSError as problem:
                message += f"; its text could not be kept in {self._poison_file}: {problem.strerror}"
        data = {"request": entry.request_id, "deaths": [str(death) for death in entry.deaths]}
        self._emit(Event(message=message, kind=Kind.POISONED, level=Level.ERROR, data=data))

    def refused(self, why: str, total: int) -> None:
        """A request was not taken, `total` in all; said once a second at most."""
        told_at, told = self._told_refused
        now = time.monotonic()
        if now - told_at < REFUSED_EVERY_S:
            return
        self._told_refused = (now, total)
        words = f"{_requests(total - told)} refused: {why}"
        self._emit(Event(message=words, kind=Kind.REFUSED, level=Level.WARNING, data={"refused": total}))

    def _tell(self, message: str, kind: Kind, level: Level, death: Death, data: Mapping[str, object]) -> None:
        self._emit(
            Event(
                message=message, kind=kind, level=level, rank=death.rank, incarnation=death.incarnation, data=dict(data)
            )
        )


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _phrase(count: int, one: str, more: str) -> str:
    return "" if not count else f"{count} {one if count == 1 else more}"
