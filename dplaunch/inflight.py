"""One request that a rank has, or that waits for one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dplaunch.errors import RequestError
from dplaunch.kept import Kept
from dplaunch.link import RankLink
from dplaunch.second_run import SecondRun


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a rank, as evidence against the requests that were in flight on it."""

    rank: int
    incarnation: int
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank} (incarnation {self.incarnation}: {self.reason})"


@dataclass(slots=True, eq=False)
class InFlight:
    """A request on its way.

    Args:
        parts: the EngineCoreRequest, or all parts of a session whose input comes in parts, as the frontend gave them.
        link: the incarnation that has it; None while it waits.
        sent: the higher, the later it was sent to the rank that has it.
        shown: whether it has begun to be answered.
        tokens: the output tokens so far. The frontend has them, but for those that are kept.
        kept: those that it gets with others; None where it gets each at once.
        soon: with so many tokens it is about to end; None where nobody knows, or when it is.
        ends_soon: whether it is, on the rank that has it.
        unanswered: parts whose answer has not ended.
        second: what is left out of the answers of a rank that took it over; None on the first rank.
        deaths: the ranks that died with it in flight.
        suspicion: how many of these it may be the cause of.
        steps: outputs since it was sent to the rank that has it.
        epoch: the weights that its answer began on.
    """

    parts: list[Any]
    link: RankLink | None = None
    sent: int = 0
    shown: bool = False
    tokens: list[int] = field(default_factory=list)
    kept: Kept | None = None
    soon: int | None = None
    ends_soon: bool = False
    unanswered: int = 1
    second: SecondRun | None = None
    deaths: list[Death] = field(default_factory=list)
    suspicion: int = 0
    steps: int = 0
    epoch: int = 0

    @property
    def request_id(self) -> str:
        """The frontend's own name for it."""
        name: str = self.parts[0].request_id
        return name

    @property
    def pinned(self) -> int | None:
        """The rank that its caller wants it on."""
        rank: int | None = self.parts[0].data_parallel_rank
        return rank


@dataclass(frozen=True, slots=True)
class Failed:
    """Comes in place of a request's last output."""

    request_id: str
    error: RequestError
