"""Which requests ranks may be dying of.

A request that was in flight when a rank died is a suspect. It counts how many ranks died so; at `max_failures` it
fails by name. Two rules keep those that were there by chance from failing with the one that did it:

* It is past suspicion once it has gone on for `PAST` outputs on another rank: what made a rank die is behind it.
  A request that ranks die of later each time is stopped by the count of all its deaths, one more than `max_failures`.
* One that had shown nothing when its rank died is tried alone: it is sent to a rank only when no suspect is there.
  One that had begun to answer goes on at once, since whoever reads it would notice.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dplaunch.errors import RequestError
from dplaunch.inflight import Death, InFlight
from dplaunch.link import RankLink

PAST = 8
"""Outputs after which a request is past what it may have done: an engine has a step or two more under way."""


class Suspects:
    """Counts the suspects on each rank.

    Args:
        max_failures: dying ranks that one request may have been on.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._on: Counter[RankLink] = Counter()

    def blame(self, entries: Sequence[InFlight], death: Death, slots: int | None) -> list[InFlight]:
        """Counts a death against those that the rank may have been running; returns those that fail of it.

        Args:
            entries: what was in flight on the rank.
            death: its end.
            slots: requests that a rank runs at a time, first come first served; None when not known.
        """
        begun = sum(entry.shown for entry in entries)
        # What waited behind others in the engine has not touched the model.
        room = len(entries) if slots is None else max(0, slots - begun)
        fresh = sorted((entry for entry in entries if not entry.shown), key=lambda entry: entry.sent)
        for entry in [*(entry for entry in entries if entry.shown), *fresh[:room]]:
            entry.deaths.append(death)
            entry.suspicion += 1
        return [
            entry
            for entry in entries
            if entry.suspicion >= self._max_failures or len(entry.deaths) > self._max_failures
        ]

    def is_free(self, link: RankLink) -> bool:
        """Whether no suspect is on the rank."""
        return not self._on[link]

    def sent(self, entry: InFlight, link: RankLink) -> None:
        """A request was sent to a rank."""
        entry.steps = 0
        if entry.suspicion:
            self._on[link] += 1

    def left(self, entry: InFlight, link: RankLink) -> bool:
        """A request is no more on a rank; returns whether that is free of suspects now."""
        if not entry.suspicion:
            return False
        self._on[link] -= 1
        return not self._on[link]

    def stepped(self, entry: InFlight, link: RankLink) -> bool:
        """A suspect has answered something; returns whether its rank is free of suspects now."""
        entry.steps += 1
        if entry.steps < PAST:
            return False
        free = self.left(entry, link)
        entry.suspicion = 0
        return free

    def forget(self, link: RankLink) -> None:
        """The rank is gone, and what was on it is nowhere."""
        self._on.pop(link, None)


def poisoned(entry: InFlight) -> RequestError:
    """What a request fails with, with the evidence."""
    ranks = "a rank" if len(entry.deaths) == 1 else f"{len(entry.deaths)} ranks"
    another = {1: "second", 2: "third"}.get(len(entry.deaths), "further")
    return RequestError(
        f"request {entry.request_id} was in flight on {ranks} that died, and is kept from a {another}: "
        + "; ".join(str(death) for death in entry.deaths)
    )


def keep_text(path: Path, entry: InFlight, error: RequestError) -> None:
    """Adds a request to a file that its owner alone can read, as one line of JSON.

    Raises:
        OSError: when the file cannot be written.
    """
    request = entry.parts[0]
    line = json.dumps(
        {
            "request_id": request.external_req_id or request.request_id,
            "error": error.message,
            "prompt_token_ids": [token for part in entry.parts for token in part.prompt_token_ids or ()],
            "output_token_ids": entry.tokens,
            "params": str(request.sampling_params or request.pooling_params),
        }
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "a") as file:
        file.write(line + "\n")
