"""Which ranks still answer: those that say nothing for a while are asked, through their engine's own loop.

One timer serves all ranks, and is set to the next moment at which there is something to look at.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from dataclasses import dataclass

from dplaunch.client import GroupClient
from dplaunch.link import RankLink
from dplaunch.seam.rank import PING
from dplaunch.spec import ProbePolicy

TOGETHER_S = 0.05
"""Ranks that are due within so many seconds are looked at in one go: a look costs less than a timer does."""

STANDSTILL_S = 1.0
"""A timer that is late by so many seconds says that the launcher itself stood still, and its ranks' answers wait."""


@dataclass(slots=True, eq=False)
class _Watch:
    link: RankLink
    hung: asyncio.Future[float]
    due: float = 0.0
    asked: float | None = None  # since when an answer is waited for
    ping: asyncio.Task[None] | None = None
    pinged: float = 0.0  # when that was sent


class Prober:
    """Finds ranks that hang. Lives in the group's event loop.

    Args:
        policy: how long a rank may be silent, and how long it has to answer.
        client: knows when each rank was last heard, and asks it.
    """

    def __init__(self, policy: ProbePolicy, client: GroupClient) -> None:
        self._policy = policy
        self._client = client
        self._watches: dict[RankLink, _Watch] = {}
        self._queue: list[tuple[float, int, _Watch]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._slack_s = min(TOGETHER_S, policy.interval_s / 10, policy.timeout_s / 10)

    def watch(self, link: RankLink) -> asyncio.Future[float]:
        """Done when the engine has not answered in time, with the seconds that it was given.

        Never done where the policy says that nobody is asked. Ends with `unwatch`.
        """
        hung: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        if self._policy.timeout_s:
            watch = self._watches[link] = _Watch(link, hung)
            self._look_at(watch, time.monotonic() + self._policy.interval_s)
            self._set_timer()
        return hung

    def unwatch(self, link: RankLink) -> None:
        """The rank behind the link is not looked at any more."""
        watch = self._watches.pop(link, None)
        if watch is None:
            return
        watch.hung.cancel()
        if watch.ping is not None:
            watch.ping.cancel()
        if not self._watches:
            self._queue.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _look_at(self, watch: _Watch, due: float) -> None:
        watch.due = due
        heapq.heappush(self._queue, (due, next(self._order), watch))

    def _set_timer(self) -> None:
        while self._queue and not self._is_current(self._queue[0]):
            heapq.heappop(self._queue)
        if not self._queue or (self._timer is not None and self._timer_due <= self._queue[0][0]):
            return  # One that comes too early finds nothing to do, and is cheaper than setting another.
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = self._queue[0][0]
        delay = max(0.0, self._timer_due - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _is_current(self, entry: tuple[float, int, _Watch]) -> bool:
        due, _, watch = entry
        return watch.due == due and self._watches.get(watch.link) is watch and not watch.hung.done()

    def _on_timer(self) -> None:
        self._timer = None
        now = time.monotonic()
        while self._queue and self._queue[0][0] <= now + self._slack_s:
            entry = heapq.heappop(self._queue)
            if self._is_current(entry):
                self._look(entry[2], now)
        self._set_timer()

    def _look(self, watch: _Watch, now: float) -> None:
        heard = self._client.heard(watch.link)
        if watch.asked is None or heard > watch.asked:
            watch.asked = None
            self._ask_if_silent(watch, heard, now)
        elif now - watch.due > STANDSTILL_S or (self._is_busy(watch) and now - heard < self._policy.busy_timeout_s):
            # It was the launcher that slept, or the engine is at something that may take long.
            watch.asked = now
            self._look_at(watch, now + self._policy.timeout_s)
        else:
            watch.hung.set_result(self._policy.busy_timeout_s if self._is_busy(watch) else self._policy.timeout_s)

    def _is_busy(self, watch: _Watch) -> bool:
        """Whether it may be at work on what takes long, as loading weights does, and comes to the question after it.

        A call that was sent behind the question is no excuse: an engine takes what comes in turn.
        """
        since = self._client.calling_since(watch.link)
        return watch.link.compiling or (since is not None and since <= watch.pinged)

    def _ask_if_silent(self, watch: _Watch, heard: float, now: float) -> None:
        silent = now - heard
        if silent + self._slack_s < self._policy.interval_s:
            self._look_at(watch, heard + self._policy.interval_s)
            return
        watch.asked = now
        self._look_at(watch, now + self._policy.timeout_s)
        if watch.ping is None:
            watch.pinged = now
            watch.ping = asyncio.get_running_loop().create_task(self._ping(watch))

    async def _ping(self, watch: _Watch) -> None:
        # Any answer is one, an error too. A rank that is gone is seen by its exit.
        with contextlib.suppress(Exception):
            await self._client.call_link(watch.link, PING)
        watch.ping = None
        if self._watches.get(watch.link) is watch:
            watch.asked = None
            self._look_at(watch, time.monotonic() + self._policy.interval_s)
            self._set_timer()
