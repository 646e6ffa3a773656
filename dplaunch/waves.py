"""When ranks that step together step: a request for one of them sets all of them going.

vLLM's engines in lockstep (`DPEngineCoreProc` of vllm/v1/engine/core.py) go round for as long as one of them has
something to do, which they agree on among themselves; that is a wave. Then each says that the wave is over, and waits.
A rank that gets a request now would wait for the others in its first step, so they are told. In vLLM a coordinator
process does that between several frontends; a group has one frontend, which sees all requests, and every rank tells it
of the end of a wave where no coordinator is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dplaunch.link import RankLink
from dplaunch.seam import wire


class Apart:
    """Ranks that share nothing: each goes when it has something to do, and there is nothing to tell the others."""

    def began(self) -> None:
        """A request is on its way to a rank."""

    def ended(self, link: RankLink, wave: int) -> None:
        """A rank, which need not be up yet, says that a wave is over."""

    def stirred(self) -> None:
        """The ranks were at a standstill, which is over."""

    def joined(self, link: RankLink) -> None:
        """A rank is up."""

    def left(self) -> None:
        """A rank is gone."""


class Waves(Apart):
    """The waves of one group, in its event loop.

    Args:
        links: the ranks that are up.
        is_busy: whether one of them has a request that it has not answered.
        encode: the frames of a message to an engine.
    """

    def __init__(
        self,
        links: Callable[[], Mapping[int, RankLink]],
        is_busy: Callable[[], bool],
        encode: Callable[[Any], Sequence[Any]],
    ) -> None:
        self.wave = 0
        """The wave that the ranks are in, or that comes next."""
        self._links = links
        self._is_busy = is_busy
        self._encode = encode
        self._running = False  # Whether they were told to go on, and have not said that they are through.
        self._through: dict[RankLink, int] = {}  # The last wave that each rank said is over.

    def began(self) -> None:
        if not self._running:
            self._start()

    def ended(self, link: RankLink, wave: int) -> None:
        """When all ranks have said that a wave is over, the next one begins where it is needed."""
        self._through[link] = wave
        # One that has not said so yet may have answered a request just before, and that is still to be read. Each has
        # a socket of its own, so one may be heard of two waves while the other's words are under way.
        if self._next() <= self.wave:
            return
        self.wave, self._running = self._next(), False
        # What was on its way when the wave ended waits at its rank for the next.
        if self._is_busy():
            self._start()

    def stirred(self) -> None:
        """In a standstill ranks do not listen: whatever they have is told of again."""
        self._running = False
        if self._is_busy():
            self._start()

    def joined(self, link: RankLink) -> None:
        """Those that were up before it may have got requests already."""
        if self._running:
            self._tell(link)

    def left(self) -> None:
        """The others go with it: those that come next begin with wave 0."""
        self.wave, self._running = 0, False
        self._through.clear()

    def _next(self) -> int:
        """The wave after the last one that all ranks have said is over."""
        return 1 + min((self._through.get(link, -1) for link in self._links().values()), default=-1)

    def _start(self) -> None:
        # Ranks that came up in a group that is paused were through with a wave before they were up.
        self.wave, self._running = max(self.wave, self._next()), True
        for link in self._links().values():
            self._tell(link)

    def _tell(self, link: RankLink) -> None:
        # None: no rank is left out, since one that goes already takes no notice.
        link.send(wire.START_WAVE, self._encode((self.wave, None)))
