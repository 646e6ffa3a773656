"""Which rank has which request: sends each to one, and keeps those that wait for one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from dplaunch.inflight import InFlight
from dplaunch.link import RankLink
from dplaunch.migrate import OTHER_WEIGHTS
from dplaunch.router import Router
from dplaunch.seam import wire
from dplaunch.seam.requests import continued, most_tokens
from dplaunch.suspects import Suspects

SOON = 0.75
"""Of the tokens that an answer may have: with so many it is about to end."""


class Dispatcher:
    """Hands requests to ranks.

    Args:
        encode: the frames of a message to an engine.
        suspects: which requests ranks may be dying of.
        lose: ends a request that cannot be served, and is told why.
        router: chooses ranks.
        began: called when something was sent to a rank.
    """

    def __init__(
        self,
        encode: Callable[[Any], Sequence[Any]],
        suspects: Suspects,
        lose: Callable[[InFlight, str], None],
        router: Router,
        began: Callable[[], None] = lambda: None,
    ) -> None:
        self.links: dict[int, RankLink] = {}
        self.waiting: dict[str, InFlight] = {}
        """Requests that no rank has, in the order in which they came to wait."""
        self.router = router
        self.epoch = 0
        """Which weights the ranks have: one more at each change of them."""
        self.held = False
        """Whether requests wait here, whatever ranks there are."""
        self.begun_go_on = False
        """Whether those that have begun to answer are sent all the same: they are being waited for."""
        self._encode = encode
        self._suspects = suspects
        self._lose = lose
        self._began = began
        self._gone: set[int] = set()
        self._order = itertools.count(1)
        self._idle: list[tuple[int, asyncio.Future[None]]] = []

    def open(self, link: RankLink) -> None:
        """The rank behind this link takes requests from now on; those that waited for one are sent."""
        self.links[link.rank] = link
        self._gone.discard(link.rank)
        self.router.open(link.rank)
        self.send_waiting()

    def close(self, link: RankLink, entries: Sequence[InFlight]) -> None:
        """The rank behind this link is gone; `entries` is what it had."""
        if self.links.get(link.rank) is link:
            del self.links[link.rank]
            self.router.close(link.rank)
        self._suspects.forget(link)
        for entry in entries:
            entry.link = None
            self._ended(entry, link.rank)
        self._notify_idle(link.rank)

    def give_up(self, rank: int) -> None:
        """The rank does not come back: requests that are pinned to it end, now and from now on."""
        self._gone.add(rank)
        self.send_waiting()

    def clear(self) -> None:
        """Nothing waits any more."""
        self.waiting.clear()
        for _, waiter in self._idle:
            if not waiter.done():
                waiter.set_result(None)

    async def idle(self, rank: int) -> None:
        """Returns when the rank has nothing in flight."""
        if self.router.load(rank):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle.append((rank, waiter))
            await waiter

    def send_waiting(self) -> None:
        """Sends those that waited, where there is a rank for them now."""
        waiting = list(self.waiting.values())
        self.waiting.clear()
        for entry in waiting:
            self.send(entry)

    def send(self, entry: InFlight) -> None:
        """Sends a request to a rank, or lets it wait for one, or ends it when it is pinned to one that never comes."""
        if entry.shown and entry.epoch != self.epoch:
            self._lose(entry, OTHER_WEIGHTS)
            return
        waits = self.held and not (self.begun_go_on and entry.shown)
        rank = None if waits else self._route(entry)
        if rank is None:
            if entry.pinned is not None and entry.pinned in self._gone:
                self._lose(entry, f"it is pinned to rank {entry.pinned}, which does not come back")
            else:
                self.waiting[entry.request_id] = entry
            return
        link = entry.link = self.links[rank]
        entry.sent = next(self._order)
        self.router.begin(rank)
        entry.soon = _soon(entry.parts)
        self._suspects.sent(entry, link)
        parts = entry.parts
        if entry.second is not None and entry.second.continues:
            parts = [continued(parts[0], entry.tokens)]
        for part in parts:
            self.hand_over(link, part)

    def hand_over(self, link: RankLink, part: Any) -> None:
        """Sends a request, or a further part of one, to the rank that has it."""
        link.send(wire.ADD, self._encode(part))
        self._began()

    def take_back(self, entry: InFlight) -> None:
        """A request is over: neither a rank nor the queue has it any more."""
        link, entry.link = entry.link, None
        if link is None:
            self.waiting.pop(entry.request_id, None)
            return
        self._ended(entry, link.rank)
        if self._suspects.left(entry, link):
            self.send_waiting()
        if self._idle and not self.router.load(link.rank):
            self._notify_idle(link.rank)

    def ends_soon(self, entry: InFlight) -> None:
        """A request is about to end."""
        entry.soon = None
        if entry.link is not None:
            entry.ends_soon = True
            self.router.ends_soon(entry.link.rank)

    def _ended(self, entry: InFlight, rank: int) -> None:
        self.router.end(rank, entry.ends_soon)
        entry.ends_soon = False

    def _route(self, entry: InFlight) -> int | None:
        pinned = entry.pinned
        if pinned is None and entry.parts[0].pooling_params is not None:
            ranks = self.router.ranks
            index = wire.pinned_engine(entry.parts[0], len(ranks)) if ranks else None
            pinned = None if index is None else ranks[index]
        if entry.suspicion and not entry.shown:
            choices = self.router.ranks if pinned is None else [pinned]
            free = [rank for rank in choices if self._takes(rank) and self._suspects.is_free(self.links[rank])]
            return min(free, key=self.router.load, default=None)
        if pinned is None:
            return self.router.choose()
        return pinned if self._takes(pinned) else None

    def _takes(self, rank: int) -> bool:
        return self.router.is_open(rank)

    def _notify_idle(self, rank: int) -> None:
        for waiting, waiter in self._idle:
            if waiting == rank and not waiter.done():
                waiter.set_result(None)
        self._idle = [(waiting, waiter) for waiting, waiter in self._idle if not waiter.done()]


def _soon(parts: Sequence[Any]) -> int | None:
    """How many tokens of its answer a request has when it is about to end; None where nobody knows."""
    most = most_tokens(parts[0]) if len(parts) == 1 else None
    return None if most is None else int(SOON * most)
