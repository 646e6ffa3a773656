"""New weights for a running group: in all ranks or in none. docs/embedding.md says what happens on failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dplaunch.crew import Crew, named, words_of
from dplaunch.errors import DplaunchError, WeightsError
from dplaunch.events import Event, Kind, Level, RankState
from dplaunch.hosts import Failures
from dplaunch.rank import Rank
from dplaunch.seam import weights as seam
from dplaunch.standstill import PauseMode, Standstill
from dplaunch.weight_source import Source
from dplaunch.weights import Stance

if TYPE_CHECKING:
    from dplaunch.keeper import RankKeeper


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """What came of an update of the weights.

    Args:
        version: what all ranks have now.
        checksum: of it in each rank's memory, or of all ranks' where each has experts of its own; "" where nobody asked
            for it.
        ranks: those that acknowledged it.
        behind: those that did not, and why; each comes back with the new weights, or is stale.
        seconds: how long it took, and of that, how long no request was answered.
    """

    version: str
    checksum: str
    ranks: tuple[int, ...]
    behind: Mapping[int, str]
    seconds: float
    standstill_s: float


class Updates:
    """Updates the weights of a group.

    Args:
        crew: its ranks.
        standstill: stops them for it.
    """

    def __init__(self, crew: Crew, standstill: Standstill) -> None:
        self._crew = crew
        self._weights = crew.weights
        self._standstill = standstill

    async def update(
        self,
        source: Source,
        version: str | Callable[[], str | None] | None,
        *,
        mode: PauseMode,
        verify: bool,
        timeout_s: float,
    ) -> WeightUpdate:
        """See `AsyncGroup.update_weights`. A version that is a function is known when all weights were there."""
        began, deadline = time.monotonic(), time.monotonic() + timeout_s

        def name() -> str:
            told = version() if callable(version) else version
            return str(self._weights.number + 1) if told is None else told

        try:
            async with self._crew.one, self._standstill.standing_still(mode, deadline):
                stopped = time.monotonic()
                async with self._weights.lock:
                    good, behind = await self._update(source, name, verify, deadline)
        except BaseException:
            source.close()
            raise
        now = time.monotonic()
        done = WeightUpdate(
            version=self._weights.version,
            checksum=self._weights.checksum,
            ranks=tuple(good),
            behind=behind,
            seconds=now - began,
            standstill_s=now - stopped,
        )
        self._tell(done)
        return done

    async def _update(
        self, source: Source, name: Callable[[], str], verify: bool, deadline: float
    ) -> tuple[list[int], dict[int, str]]:
        keepers = self._crew.targets
        ranks = [keeper.rank for keeper in keepers]
        if not ranks:
            raise WeightsError("no rank is up that could take the weights", hint="Try again when one is ready.")
        touched = False

        def touch() -> None:
            nonlocal touched
            touched = True
            self._crew.client.new_weights()

        checksums: dict[Rank, str] = {}
        try:
            if self._weights.stance is Stance.ASLEEP:
                await self._standstill.wake_weights(deadline)
            failed = await self._weights.load(ranks, source, deadline=deadline, verify=verify, touch=touch)
            if verify:
                left = [rank for rank in ranks if rank not in failed]
                checksums, silent = await self._weights.ask_all(left, seam.CHECKSUM, deadline=deadline)
                failed |= silent
            self._check(name(), ranks, failed, checksums)
        except BaseException as error:
            if touched:
                await asyncio.shield(self._go_back(keepers, name()))
            if isinstance(error, DplaunchError):
                raise self._with_state(error, touched) from error
            raise
        told = {rank.identity.rank: checksum for rank, checksum in checksums.items()}
        await self._commit(source, name(), told, keepers, failed, deadline)
        good = [rank.identity.rank for rank in ranks if rank not in failed]
        return good, {rank.identity.rank: words_of(error) for rank, error in failed.items()}

    def _check(self, version: str, ranks: Sequence[Rank], failed: Failures, checksums: Mapping[Rank, str]) -> None:
        if len(failed) == len(ranks):
            why = "; ".join(named(rank, error) for rank, error in failed.items())
            raise WeightsError(f"no rank could load weights {version}: {why}")
        if self._weights.alike and len(set(checksums.values())) > 1:
            told = ", ".join(f"rank {rank.identity.rank} {sum_[:12]}" for rank, sum_ in checksums.items())
            raise WeightsError(f"the ranks disagree about weights {version}, by their checksums: {told}")

    async def _commit(
        self,
        source: Source,
        version: str,
        checksums: Mapping[int, str],
        keepers: Sequence[RankKeeper],
        failed: Failures,
        deadline: float,
    ) -> None:
        weights = self._weights
        weights.commit(source, version, checksums)
        await self._crew.put_aside(keepers, failed)
        self._standstill.weights_lost = False
        for keeper in keepers:
            # One that has died since is another incarnation's by now, which waits to be given them.
            if keeper.rank not in failed and keeper.rank.admitted:
                keeper.rank.weights, keeper.rank.stale = weights.number, ""
        await self._crew.tell_all("set_weight_version", version, deadline=deadline)
        await self._crew.tell_all("reset_prefix_cache", True, True, deadline=deadline)
        # A base model's new weights take the adapters with them (`reset_lora_state`).
        for name, lora in list(weights.loras.items()):
            try:
                await self._crew.tell_all("add_lora", lora, deadline=deadline)
            except WeightsError as error:
                del weights.loras[name]
                words = f"the adapter {name} is gone after the update: {error.message}"
                self._crew.emit(Event(message=words, kind=Kind.WEIGHTS, level=Level.WARNING))
        for keeper in keepers:
            if keeper.rank.state is RankState.STALE and not keeper.rank.stale:
                keeper.is_current(version)

    async def _go_back(self, keepers: Sequence[RankKeeper], version: str) -> None:
        """Every rank that may have been changed is replaced: what it comes up with is what the group had."""
        touched = [keeper for keeper in keepers if keeper.rank.admitted]
        for keeper in touched:
            keeper.rank.admitted = False
        await self._crew.replace(touched, f"weights {version} are not in it as a whole")

    def _with_state(self, error: DplaunchError, touched: bool) -> WeightsError:
        version, lost = self._weights.version, self._weights.source.lost()
        if not touched:
            state = f"Nothing was changed: all ranks have weights {version}."
        elif lost:
            state = (
                f"The ranks are restarted, and serve when they are given weights: {version}, which they had, cannot be "
                f"had again ({lost})."
            )
        else:
            state = f"The ranks are restarted with weights {version}, which they had."
        return WeightsError(error.message, hint=" ".join(filter(None, (state, error.hint))), detail=error.detail)

    def _tell(self, done: WeightUpdate) -> None:
        words = f"weights {done.version} are in {len(done.ranks)} ranks after {done.seconds:.1f} s"
        why = "; ".join(f"rank {rank} comes later: {reason}" for rank, reason in done.behind.items())
        data = {"version": done.version, "checksum": done.checksum, "ranks": list(done.ranks), "behind": done.behind}
        level = Level.WARNING if done.behind else Level.INFO
        self._crew.emit(Event(message=f"{words}; {why}" if why else words, kind=Kind.WEIGHTS, level=level, data=data))

    async def checksums(self, timeout_s: float) -> dict[int, str]:
        """See `AsyncGroup.weight_checksums`."""
        keepers = [keeper for keeper in self._crew.targets if keeper.rank.state is RankState.READY]
        ranks = [keeper.rank for keeper in keepers]
        answers, failed = await self._weights.ask_all(ranks, seam.CHECKSUM, deadline=time.monotonic() + timeout_s)
        for rank, error in failed.items():
            raise WeightsError(f"no checksum: {named(rank, error)}") from error
        return {rank.identity.rank: checksum for rank, checksum in answers.items()}
