"""Changes of a group that runs: more ranks, fewer, or the same ones anew. One at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dplaunch.errors import GroupClosedError, UsageError
from dplaunch.events import Event, Kind, Level, Listener, RankState
from dplaunch.leaving import DRAIN_S
from dplaunch.plan import LaunchPlan
from dplaunch.rolling import restart_ranks
from dplaunch.scaling import Scaler
from dplaunch.spec import Mode

if TYPE_CHECKING:
    from dplaunch.backend import Backend
    from dplaunch.client import GroupClient
    from dplaunch.rank import Rank
    from dplaunch.supervisor import Supervisor


class Host(Protocol):
    """The group as its changes see it."""

    plan: LaunchPlan

    def resize(self, ranks: int) -> None:
        """Tells the frontend how many ranks there are, before a new one can answer."""

    def welcome(self, rank: Rank) -> None:
        """Tells the frontend what a new rank found out while it started."""


class Changes:
    """Scales and restarts a group, one change at a time. Lives in the group's event loop.

    Args:
        supervisor: has the ranks.
        backend: has room for more, or not.
        client: told which ranks leave.
        host: has the plan, which is replaced when the number of ranks changes.
        environ: the launcher's environment, as it was at the launch.
        emit: told what happens.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        backend: Backend,
        client: GroupClient,
        host: Host,
        environ: Mapping[str, str],
        emit: Listener,
    ) -> None:
        self._supervisor = supervisor
        self._client = client
        self._host = host
        self._emit = emit
        self._scaler = Scaler(supervisor, backend, client, host, environ, emit)
        self._doing = ""
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def is_stopped(self) -> bool:
        """Whether no change is taken any more."""
        return self._stopped

    async def scale(self, dp: int, drain_s: float | None) -> None:
        """See `AsyncGroup.scale`."""
        plan, now = self._host.plan, len(self._supervisor.keepers)
        if not isinstance(dp, int) or isinstance(dp, bool) or dp < 1:
            raise UsageError(f"dp must be a whole number of ranks, 1 or more, not {dp!r}")
        if plan.mode is Mode.LOCKSTEP:
            raise UsageError(
                "a group in lockstep cannot be scaled while it runs: its ranks step together",
                hint="Launch it again with another --dp.",
            )
        self._check_left(dp)
        words = f"scaling from {_ranks(now)} to {dp}"
        if dp == now:
            self._say(Kind.SCALE, f"the group has {_ranks(now)} already", {"from": now, "to": dp})
        elif dp > now:
            await self._alone(words, Kind.SCALE, self._scaler.up(dp), f"scaled from {now} to {_ranks(dp)}")
        else:
            work = self._scaler.down(dp, _drain(drain_s))
            await self._alone(words, Kind.SCALE, work, f"scaled from {now} to {_ranks(dp)}")

    async def restart(self, ranks: Sequence[int] | None, rolling: bool, drain_s: float | None) -> None:
        """See `AsyncGroup.restart`."""
        if self._host.plan.mode is Mode.LOCKSTEP:
            raise UsageError("ranks of a group in lockstep cannot be restarted one by one: they step together")
        known = {keeper.rank.identity.rank: keeper for keeper in self._supervisor.keepers}
        wanted = list(known) if ranks is None else sorted(set(ranks))
        if missing := [rank for rank in wanted if rank not in known]:
            raise UsageError(f"there is no rank {missing[0]}", hint=f"Ranks of this group: {list(known)}.")
        if not wanted:
            raise UsageError("no rank to restart was named", hint="Leave ranks out for all of them.")
        keepers = [known[rank] for rank in wanted]
        names = f"rank {wanted[0]}" if len(wanted) == 1 else _ranks(len(wanted))
        one_by_one = rolling and len(wanted) > 1
        words = f"restarting {names}{', one after the other' if one_by_one else ''}"
        turns = [[keeper] for keeper in keepers] if rolling else [keepers]
        work = restart_ranks(self._supervisor, self._client, turns, _drain(drain_s))
        await self._alone(words, Kind.ROLL, work, f"restarted {names}", {"ranks": wanted, "rolling": one_by_one})

    async def cancel(self) -> None:
        """Ends a change that is under way, and takes no other: the group ends. Idempotent."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _alone(
        self, words: str, kind: Kind, work: Coroutine[Any, Any, None], done: str, data: Mapping[str, Any] | None = None
    ) -> None:
        """Does one thing while nothing else may be done; says when it begins and how it ends."""
        if self._stopped or self._doing:
            work.close()
            if self._stopped:
                raise GroupClosedError("the group is closed")
            raise UsageError(f"the group is busy {self._doing}", hint="Try again when that is over.")
        self._doing, began = words, time.monotonic()
        self._say(kind, words, data)
        task = self._task = asyncio.ensure_future(work)
        try:
            await task
        except asyncio.CancelledError:
            if self._stopped:
                raise GroupClosedError(f"the group was closed while {words}") from None
            self._say(kind, f"{words} was given up", data, Level.WARNING)
            raise
        except Exception as error:
            self._say(kind, f"{words} failed: {getattr(error, 'message', error)}", data, Level.ERROR)
            raise
        finally:
            self._doing, self._task = "", None
        self._say(kind, f"{done} in {time.monotonic() - began:.1f} s", data)

    def _check_left(self, dp: int) -> None:
        least = self._host.plan.spec.min_ranks
        if dp < least:
            raise UsageError(
                f"cannot scale to {_ranks(dp)}: at least {least} are needed", hint="That is --min-ranks at the launch."
            )
        staying = [keeper.rank for keeper in self._supervisor.keepers[:dp]]
        failed = [rank.identity.rank for rank in staying if rank.state is RankState.FAILED]
        if failed and len(staying) == dp and dp - len(failed) < least:
            raise UsageError(
                f"cannot scale to {_ranks(dp)}: of those, rank {failed[0]} has failed, and at least {least} are needed",
                hint=f"Restart it first: dplaunch restart --rank {failed[0]}.",
            )

    def _say(self, kind: Kind, message: str, data: Mapping[str, Any] | None = None, level: Level = Level.INFO) -> None:
        self._emit(Event(message=message, kind=kind, level=level, data=data or {}))


def _drain(seconds: float | None) -> float:
    if seconds is None:
        return DRAIN_S
    if seconds < 0:
        raise UsageError(f"drain_s must not be negative, not {seconds}")
    return seconds


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
