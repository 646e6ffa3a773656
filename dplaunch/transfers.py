"""Updates of a group that a trainer sends in several calls: who is in one, whether one is under way, how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dplaunch.bucket import Bucket
from dplaunch.crew import Crew, named, words_of
from dplaunch.errors import StandstillError, UsageError, WeightsError
from dplaunch.events import Event, Kind, Level
from dplaunch.posted import take
from dplaunch.seam import weights as seam
from dplaunch.seam.older import workers_let_go
from dplaunch.standstill import PauseMode
from dplaunch.transfer import GAP_S, Posted, Relayed
from dplaunch.updating import Updates, WeightUpdate

BUCKET = "dplaunch_bucket"
"""What an update's part says when it is a bucket of ours, beside "keep", "verify" and "mode" of `update_weights`."""

GIVE_UP = "dplaunch_give_up"
"""What it says when the trainer has failed in the middle: no rank gets what was sent so far."""

AGAIN = "Call init_communicator() (POST /init_weight_transfer_engine) again, with the group's world size as it is now."


@dataclass(frozen=True, slots=True)
class _Session:
    """An update from its start to its finish; the source and the task are there from its first part on."""

    draft: bool
    since: float
    """When it was started, monotonic seconds."""
    source: Posted | Relayed | None = None
    task: asyncio.Task[WeightUpdate] | None = None

    def is_over(self) -> bool:
        """Whether it has ended, or its trainer has gone before it sent anything."""
        return time.monotonic() - self.since > GAP_S if self.task is None else self.task.done()


class Transfers:
    """Lives in the group's event loop.

    Args:
        crew: the ranks.
        updates: makes the update.
        timeout_s: seconds for all of one.
    """

    def __init__(self, crew: Crew, updates: Updates, timeout_s: float) -> None:
        self._crew = crew
        self._updates = updates
        self._timeout_s = timeout_s
        self._session: _Session | None = None
        self._version: str | None = None
        self._members: Mapping[int, int] = {}
        """The ranks that vLLM's engine has connected to the trainer, each with its incarnation."""

    # vLLM's own weight-transfer engine.

    async def connect(self, info: Mapping[str, Any], workers: int) -> None:
        """Has the workers of all ranks meet the trainer.

        Args:
            info: how, vLLM's `init_info`.
            workers: how many a rank has.

        Raises:
            UsageError: when its world size is not that of this group.
            StandstillError: when a rank is not up: it would be missing there.
            WeightsError: when a rank fails at it.
        """
        async with self._crew.one:
            if absent := self._crew.absent:
                raise StandstillError(f"{_names(absent)} would be missing: not up now", hint="Try again in a moment.")
            _check_size(info, len(self._crew.targets), workers)
            if self._members:
                await self._let_go()
            self._members = {}
            await self._of_workers("init_weight_transfer_engine", init_info=dict(info))
            self._members = self._present()

    async def disconnect(self) -> None:
        """Has the workers let go of the trainer."""
        async with self._crew.one:
            self._members = {}
            await self._let_go()

    async def _let_go(self) -> None:
        if workers_let_go():
            await self._of_workers("shutdown_weight_transfer_engine")

    async def _of_workers(self, method: str, **arguments: Any) -> None:
        ranks = [keeper.rank for keeper in self._crew.targets]
        call: tuple[Any, ...] = (seam.OF_WORKERS, method, None, [], arguments)
        deadline = time.monotonic() + self._timeout_s
        _, failed = await self._crew.weights.ask_all(ranks, *call, deadline=deadline)
        for rank, error in failed.items():
            raise WeightsError(f"{method} fails in {len(failed)} of {len(ranks)} ranks: {named(rank, error)}")

    def _present(self) -> dict[int, int]:
        identities = [keeper.rank.identity for keeper in self._crew.targets]
        return {identity.rank: identity.incarnation for identity in identities}

    # An update.

    async def start(self, *, draft: bool = False) -> None:
        """Begins an update; what is sent next says of which kind.

        Raises:
            UsageError: when one is under way already.
            WeightsError: when ranks were started since the trainer met them.
        """
        if self._session is not None and not self._session.is_over():
            raise UsageError(
                "an update of the weights is under way already",
                hint=f"It ends with /finish_weight_update, or {GAP_S:.0f} s after the trainer's last word.",
            )
        session = self._session = _Session(draft, time.monotonic())
        if self._members:
            self._check_members()
            # Now, and not with the first part: the trainer begins to send while that is on its way.
            await self._begin(session, _relayed(session))

    def _check_members(self) -> None:
        present = self._present()
        changed = sorted(rank for rank in {*present, *self._members} if present.get(rank) != self._members.get(rank))
        if changed:
            self._session = None
            raise WeightsError(
                f"the trainer has not met {_names(changed)}, which started or ended since",
                hint=AGAIN,
            )

    async def part(self, info: Any) -> None:
        """Loads a part into all ranks.

        Args:
            info: vLLM's `update_info`; with `BUCKET`, a bucket of ours.

        Raises:
            UsageError: when no update is under way, or the part cannot be.
            WeightsError: when the update fails; all ranks have the weights from before then.
        """
        session = self._session
        if session is None:
            raise UsageError("no update of the weights is under way", hint="POST /start_weight_update first.")
        options = info if isinstance(info, Mapping) else {}
        if options.get(GIVE_UP):
            await self._give_up(session, str(options[GIVE_UP]))
            return
        if session.task is not None and session.task.done():
            self._over(session)
            session.task.result()
        is_bucket = BUCKET in options
        if session.source is not None and is_bucket is not isinstance(session.source, Posted):
            raise UsageError("an update's parts are all buckets, or none is", hint="Finish this one first.")
        content = take(options[BUCKET]) if is_bucket else info
        try:
            begun = session if session.source else await self._first(session, options if is_bucket else None)
            if begun.source is not None:
                await self._either(begun, begun.source.put(content))
        except BaseException:
            if isinstance(content, Bucket):
                content.free()
            raise

    async def _first(self, session: _Session, options: Mapping[str, Any] | None) -> _Session:
        if options is None:
            return await self._begin(session, _relayed(session))
        source, verify = Posted(options.get("keep", True) is True), options.get("verify", True) is True
        return await self._begin(session, source, options.get("mode", "wait"), verify)

    async def _begin(
        self, session: _Session, source: Posted | Relayed, mode: PauseMode = "wait", verify: bool = False
    ) -> _Session:
        self._version = None
        update = self._updates.update(source, self._name, mode=mode, verify=verify, timeout_s=self._timeout_s)
        task = asyncio.ensure_future(update)
        task.add_done_callback(self._ended)
        session = self._session = replace(session, source=source, task=task)
        if isinstance(source, Relayed):
            await self._either(session, source.begun.wait())
        return session

    def _ended(self, task: asyncio.Task[WeightUpdate]) -> None:
        # Here too: where the trainer is gone, nobody else hears of it.
        if not task.cancelled() and (error := task.exception()) is not None:
            words = f"an update of the weights has failed: {words_of(error)}"
            self._crew.emit(Event(message=words, kind=Kind.WEIGHTS, level=Level.WARNING))

    def _name(self) -> str | None:
        # Known when all parts were there: /finish_weight_update says it.
        return self._version

    async def _either(self, session: _Session, step: Any) -> None:
        """Waits for a step, or for the update's end, which then has failed."""
        waiting, updating = asyncio.ensure_future(step), session.task
        try:
            await asyncio.wait((waiting, updating) if updating else (waiting,), return_when=asyncio.FIRST_COMPLETED)
            if updating is not None and updating.done() and not waiting.done():
                self._over(session)
                updating.result()
            waiting.result()
        finally:
            waiting.cancel()

    async def finish(self, version: str | None = None) -> WeightUpdate:
        """Ends the update: the group has these weights from now on.

        Args:
            version: what to call them; None for the number of the update.

        Raises:
            UsageError: when nothing was sent.
            WeightsError: as `AsyncGroup.update_weights`.
        """
        session, self._version = self._session, version
        if session is None:
            raise UsageError("no update of the weights is under way", hint="POST /start_weight_update first.")
        if session.source is None or session.task is None:
            self._session = None
            raise UsageError("nothing was sent between start and finish", hint="POST /update_weights in between.")
        session.source.finish()
        try:
            return await asyncio.shield(session.task)
        finally:
            self._over(session)

    async def _give_up(self, session: _Session, why: str) -> None:
        self._over(session)
        if session.source is not None and session.task is not None:
            session.source.give_up(f"the trainer gave up: {why[:200]}")
            await asyncio.wait((session.task,))
            session.task.exception()

    def _over(self, session: _Session) -> None:
        if self._session is session:
            self._session = None

    async def close(self) -> None:
        """Gives up what is under way. Idempotent."""
        session, self._session = self._session, None
        if session is not None and session.task is not None:
            session.task.cancel()
            await asyncio.wait((session.task,))


def _relayed(session: _Session) -> Relayed:
    return Relayed("start_draft_weight_update" if session.draft else "start_weight_update")


def _check_size(info: Mapping[str, Any], ranks: int, workers: int) -> None:
    offset, size = info.get("rank_offset"), info.get("world_size")
    if not isinstance(offset, int) or not isinstance(size, int):
        return  # Another backend's, which counts otherwise.
    # A rank's place there is vLLM's: rank_offset + data_parallel_index * workers + the worker's number.
    wanted = offset + ranks * workers
    if size != wanted:
        raise UsageError(
            f"world_size is {size}, and has to be {wanted}: {ranks} ranks of {workers} workers, {offset} before them",
            hint="GET /get_world_size has the number of workers.",
        )


def _names(ranks: Sequence[int]) -> str:
    """ "rank 1", "ranks 1, 2"."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
