"""The watch over a rank that serves: its exit, its silence, its engine's own word that it is about to end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path

from dplaunch.backend import Exit, RankHandle
from dplaunch.diagnose import Failure, describe_death
from dplaunch.events import Event, Kind, Level
from dplaunch.link import RankLink
from dplaunch.rank import Rank
from dplaunch.tools import Tools

LAST_WORDS_S = 0.5
"""How long to wait, after a rank's exit, for what it said it died of: the message and the exit race."""

STACK_S = 0.5
"""How long a rank that hangs gets to write its stacks to its log, seconds; it takes milliseconds."""

ENGINE_END_S = 10.0
"""How long an engine that says that it is dead gets to end, seconds: vLLM's gives its last message five."""

KILL_WAIT_S = 5.0
"""How long a killed rank may take to be gone, seconds: the kernel gives back its memory first."""


class RankWatch:
    """Watches one rank, an incarnation at a time, until it has ended; takes it out of routing at the first sign.

    Args:
        rank: the rank.
        tools: the group's.
    """

    def __init__(self, rank: Rank, tools: Tools) -> None:
        self._rank = rank
        self._tools = tools
        self._engine_failed = asyncio.Event()

    def begin(self) -> None:
        """A new incarnation begins."""
        self._engine_failed.clear()

    def engine_failed(self) -> None:
        """The engine says that its loop has raised; its process ends soon."""
        self._engine_failed.set()

    async def until_ended(self) -> tuple[str, str]:
        """Returns when the incarnation has ended: what happened in one line, and what to do about it."""
        rank, handle, link = self._rank, self._rank.handle, self._rank.link
        if handle is None or link is None:
            raise RuntimeError("there is no rank to watch")
        exited = asyncio.ensure_future(handle.wait())
        failing = asyncio.ensure_future(self._engine_failed.wait())
        hung = self._tools.prober.watch(link)
        try:
            await asyncio.wait((exited, failing, hung), return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                died = exited.result()
            elif failing.done():
                died = await self._end_failing(handle, link)
            else:
                died = await self._end_hung(handle, link, hung.result())
        finally:
            self._tools.prober.unwatch(link)
            exited.cancel()
            failing.cancel()
        rank.last_exit = died
        serving = f"rank {rank.identity.rank} died while serving"
        self.leave(link, f"{serving}: {died}")
        said = await self.last_words(link, died)
        what, advice = describe_death(died, rank.spec.log_file, said)
        return f"{serving}: {what}", advice

    def leave(self, link: RankLink, reason: str, *, blame: bool = True) -> None:
        """Takes the rank out of routing.

        Args:
            link: the incarnation's.
            reason: why, in one line.
            blame: whether it may be the fault of a request that it had.
        """
        if not self._rank.answers:
            return
        self._rank.answers = False
        self._rank.down_since = time.monotonic()
        self._tools.client.down(link, reason, blame=blame)

    async def last_words(self, link: RankLink, died: Exit) -> Failure | None:
        """What the rank said that it died of, which may come after its exit."""
        if died.signal is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.failed.wait(), LAST_WORDS_S)
        return None if link.failure is None else (link.failure.type, link.failure.message)

    async def killed(self, handle: RankHandle) -> Exit:
        """How a rank that was killed ended; on a node that does not answer either, nobody can say."""
        try:
            return await asyncio.wait_for(handle.wait(), KILL_WAIT_S)
        except TimeoutError:
            return Exit(reason=f"it was killed, but its end was not seen within {KILL_WAIT_S:.0f} s")

    async def _end_failing(self, handle: RankHandle, link: RankLink) -> Exit:
        self.leave(link, f"the engine of rank {self._rank.identity.rank} failed")
        try:
            return await asyncio.wait_for(handle.wait(), ENGINE_END_S)
        except TimeoutError:
            handle.kill()
            return await self.killed(handle)

    async def _end_hung(self, handle: RankHandle, link: RankLink, seconds: float) -> Exit:
        rank = self._rank
        number, incarnation = rank.identity.rank, rank.identity.incarnation
        words = f"rank {number} has not answered for {seconds:g} s: it is ended and replaced"
        self.leave(link, words)
        self._tools.emit(
            Event(
                message=words,
                kind=Kind.HANG,
                rank=number,
                incarnation=incarnation,
                level=Level.WARNING,
                data={"seconds": seconds},
            )
        )
        before = _size(rank.spec.log_file)
        handle.dump_stack()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(handle.wait(), STACK_S)
        wrote = _size(rank.spec.log_file) > before
        handle.kill()
        where = "its log ends with where it was stuck" if wrote else "it was stopped, or stuck in the kernel"
        died = await self.killed(handle)
        unseen = f"; {died.reason}" if died.reason else ""
        return replace(died, reason=f"it did not answer for {seconds:g} s and was ended; {where}{unseen}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
