"""A group that stands still: paused, or asleep with its device memory free. Each step is acknowledged by every rank."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Literal

from dplaunch.crew import Crew
from dplaunch.errors import StandstillError, UsageError, WeightsError
from dplaunch.weights import Stance

PauseMode = Literal["wait", "keep", "abort"]
"""What becomes of requests in flight: they end first, they stand still and go on later, or they end with what they
have."""


class Standstill:
    """Pauses a group, puts it to sleep, and wakes it.

    Args:
        crew: its ranks.
    """

    def __init__(self, crew: Crew) -> None:
        self.weights_lost = False
        """Whether a sleep has thrown the weights away, and no others have come in their place."""
        self._crew = crew
        self._weights = crew.weights

    async def pause(self, mode: PauseMode, timeout_s: float) -> None:
        """See `AsyncGroup.pause`."""
        _check_mode(mode)
        async with self._crew.one:
            if self._weights.stance is Stance.SERVING:
                await self._stop(mode, time.monotonic() + timeout_s)
                self._crew.say(f"the group is paused ({mode})")

    async def resume(self, timeout_s: float) -> None:
        """See `AsyncGroup.resume`."""
        async with self._crew.one:
            if self._weights.stance is Stance.ASLEEP:
                raise UsageError("the group is asleep, not paused", hint="Call wake_up().")
            if self._weights.stance is Stance.PAUSED:
                await self._go_on(time.monotonic() + timeout_s)
                self._crew.say("the group serves on")

    async def sleep(self, level: int, mode: PauseMode, timeout_s: float) -> None:
        """See `AsyncGroup.sleep`."""
        _check_mode(mode)
        if level not in (1, 2):
            raise UsageError(f"the level of a sleep is 1 or 2, not {level!r}", hint="pause() stops without sleeping.")
        deadline = time.monotonic() + timeout_s
        async with self._crew.one:
            weights = self._weights
            if weights.stance is Stance.ASLEEP:
                if weights.level != level:
                    raise UsageError(f"the group is asleep at level {weights.level} already", hint="Wake it first.")
                return
            served = weights.stance is Stance.SERVING
            if served:
                await self._stop(mode, deadline)
            lost = self.weights_lost
            try:
                async with weights.lock:
                    # Before anyone sleeps: whatever interrupts this, wake_up() ends it.
                    weights.stance, weights.level = Stance.ASLEEP, level
                    self.weights_lost = level > 1
                    # "keep": whatever had to end has ended, and what is left goes on when the group is awake.
                    await self._crew.tell_all("sleep", level, "keep", deadline=deadline)
            except WeightsError:
                weights.stance, self.weights_lost = Stance.PAUSED, lost
                if served:
                    await self._go_on(deadline)
                raise
            self._crew.say(f"the group is asleep (level {level})")

    async def wake_up(self, timeout_s: float) -> None:
        """See `AsyncGroup.wake_up`."""
        deadline = time.monotonic() + timeout_s
        async with self._crew.one:
            weights = self._weights
            if weights.stance is not Stance.ASLEEP:
                return
            async with weights.lock:
                await self.wake_weights(deadline)
                if self.weights_lost:
                    await self._restore(deadline)
                await self._crew.tell_all("wake_up", ["kv_cache"], deadline=deadline)
                weights.stance = Stance.PAUSED
            await self._go_on(deadline)
            self._crew.say("the group is awake")

    async def wake_weights(self, deadline: float) -> None:
        """Gives the weights their memory back. Ranks that have it already take it for nothing."""
        await self._crew.tell_all("wake_up", ["weights"], deadline=deadline)

    async def _restore(self, deadline: float) -> None:
        weights = self._weights
        if why := weights.source.lost():
            raise WeightsError(
                f"weights {weights.version} were given up for the sleep and cannot be had again: {why}",
                hint="Call update_weights(), then wake_up() again.",
            )
        keepers = self._crew.targets
        ranks = [keeper.rank for keeper in keepers]
        failed = await weights.load(ranks, weights.source, deadline=deadline, verify=bool(weights.checksum))
        self.weights_lost = False
        await self._crew.put_aside(keepers, failed)

    @contextlib.asynccontextmanager
    async def standing_still(self, mode: PauseMode, deadline: float) -> AsyncIterator[None]:
        """The group stands still inside, and does again what it did before at the end. The caller has `crew.one`."""
        _check_mode(mode)
        if self._weights.stance is not Stance.SERVING:
            yield
            return
        await self._stop(mode, deadline)
        try:
            yield
        finally:
            # Also when the time is up: a group must not stay paused that nobody paused.
            await asyncio.shield(self._go_on(deadline))

    async def _stop(self, mode: PauseMode, deadline: float) -> None:
        client = self._crew.client
        # Here and not in the engines: what moves from a rank that dies meanwhile is among those that are waited for.
        client.hold(begun_go_on=mode == "wait")
        try:
            # What comes from here on is sent whole; the engines' caches are emptied with the pause.
            await self._crew.forget_media()
            if mode == "wait":
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    await client.until_quiet()
            client.hold()
            async with self._weights.lock:
                self._weights.stance = Stance.PAUSED
                engines = "keep" if mode == "keep" else "abort"
                await self._crew.tell_all("pause_scheduler", engines, True, deadline=deadline)
        except BaseException as error:
            running = client.unfinished - client.queued
            await asyncio.shield(self._go_on(deadline))
            if isinstance(error, TimeoutError):
                raise StandstillError(
                    f"the group did not stand still in time: {running} requests were still running",
                    hint="Give it longer (timeout_s), or choose the mode abort or keep. The group serves on.",
                ) from None
            raise

    async def _go_on(self, deadline: float) -> None:
        try:
            async with self._weights.lock:
                self._weights.stance = Stance.SERVING
                await self._crew.tell_all("resume_scheduler", deadline=deadline)
        finally:
            self._crew.client.release()


def _check_mode(mode: str) -> None:
    if mode not in ("wait", "keep", "abort"):
        raise UsageError(f"the mode cannot be {mode!r}", hint='Choose "wait", "keep" or "abort".')
