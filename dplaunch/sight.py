"""What lets a running group be seen and steered from outside: its event log, its control socket, its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dplaunch import control_verbs, metrics
from dplaunch.control import ControlServer
from dplaunch.control_wire import GROUP_FILE, SOCKET_NAME
from dplaunch.errors import GroupClosedError
from dplaunch.event_log import EventLog
from dplaunch.events import Event, Level, Listener
from dplaunch.status import SAMPLE_S, TokenRates, snapshot

if TYPE_CHECKING:
    from dplaunch.life import GroupLife

FOLLOWER_EVENTS = 1000
"""Events that one who follows may be behind; further ones pass by."""

LOOK_S = 2.0
"""Seconds that a reader of the metrics in another thread waits for the group's event loop."""

LAST_WORDS_S = 2.0
"""Seconds that answers under way get at the group's end: one line each, to a client of this machine."""


class Sight:
    """Opened once the plan is there, closed when the ranks have ended. None of it can fail the group.

    Args:
        group: whose it is.
        emit: tells the group's listeners.
    """

    def __init__(self, group: GroupLife, emit: Listener) -> None:
        self.address: str | None = None
        """Where the group is served over HTTP, once it is."""
        self.on_stop: Callable[[], None] | None = None
        """Called to have the whole command end; None in a process that does other things too."""
        self.started_at = time.time()
        self.rates = TokenRates()
        self.ended = asyncio.Event()
        """Set when the ranks have ended, before the last answers are given."""
        self.work: set[asyncio.Future[Any]] = set()
        """Changes that were asked for through the socket; they go on when whoever asked has gone."""
        self._group = group
        self._emit = emit
        self._log = EventLog(lambda words: emit(Event(message=words, level=Level.WARNING)))
        self._followers: set[asyncio.Queue[Event]] = set()
        self._control = ControlServer(lambda verb, arguments: control_verbs.answer(group, verb, arguments))
        self._sampling: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, event: Event) -> None:
        """Takes up an event of the group."""
        self._log(event)
        for follower in self._followers:
            if not follower.full():
                follower.put_nowait(event)

    def open(self, runtime_dir: Path) -> None:
        """Opens everything; what cannot be opened is told of, and left out."""
        plan = self._group.plan
        self._log.open(plan.log_dir, plan.base_id)
        self._loop = asyncio.get_running_loop()
        self._sampling = self._loop.create_task(self._sample())
        metrics.show(self, self._snapshot_from_any_thread)
        try:
            self._control.open(runtime_dir / SOCKET_NAME)
            (runtime_dir / GROUP_FILE).write_text(json.dumps({"name": plan.base_id, "pid": os.getpid()}))
        except OSError as error:
            words = f"no control socket, so that `dplaunch status` does not see this group: {error}"
            self._emit(Event(message=words, level=Level.WARNING))

    async def close(self) -> None:
        """Gives the last answers and closes everything. Idempotent."""
        self.ended.set()
        metrics.hide(self)
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)
        for work in self.work:
            work.cancel()
        await asyncio.gather(*self.work, return_exceptions=True)
        await self._control.close(LAST_WORDS_S)
        self._log.close()

    @property
    def followers(self) -> int:
        """How many follow the events."""
        return len(self._followers)

    @contextlib.contextmanager
    def following(self) -> Iterator[asyncio.Queue[Event]]:
        """A queue that every event goes into, for as long as the block lasts."""
        queue: asyncio.Queue[Event] = asyncio.Queue(FOLLOWER_EVENTS)
        self._followers.add(queue)
        try:
            yield queue
        finally:
            self._followers.discard(queue)

    async def _sample(self) -> None:
        while True:
            client = self._group.seen.client
            if client is not None:
                self.rates.sample({rank: counters.tokens for rank, counters in client.rank_counters.items()})
            await asyncio.sleep(SAMPLE_S)

    def _snapshot_from_any_thread(self) -> dict[str, Any]:
        # The metrics are read by whatever thread serves them, and the group is its event loop's alone.
        loop = self._loop
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is loop:
                return snapshot(self._group)
        if loop is None or loop.is_closed():
            raise GroupClosedError("the group is closed")

        async def look() -> dict[str, Any]:
            return snapshot(self._group)

        return asyncio.run_coroutine_threadsafe(look(), loop).result(LOOK_S)
