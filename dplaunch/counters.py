"""What the data path counts, for status and metrics: plain numbers that only grow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Requests of a group, by what became of them; a request may be moved or replayed more than once."""

    accepted: int = 0  # taken, whatever became of them
    finished: int = 0  # answered to their end
    aborted: int = 0  # given up by their caller
    moved: int = 0  # taken from a dead rank: continued, or sent again, elsewhere
    replayed: int = 0  # of these, those that were sent again from their start
    lost: int = 0  # ended with an error, because they could not be moved
    poisoned: int = 0  # ended with an error, because ranks die of them
    refused: int = 0  # not taken: the group was full, or nothing could serve


@dataclass(slots=True)
class RankCounters:
    """What one rank has done, over all its incarnations."""

    tokens: int = 0  # output tokens seen
    finished: int = 0  # requests answered to their end
    moved_away: int = 0  # requests that were in flight when it died, and went elsewhere
