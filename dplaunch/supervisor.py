"""Policy for a group, written once for every backend: its start, what becomes of it when ranks end, its end.

What happens to a single rank is its keeper's matter (`dplaunch.keeper`); ranks that step together are one part, and
`dplaunch.lockstep` keeps it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from dplaunch.backend import Backend, RankHandle
from dplaunch.backoff import exhausted
from dplaunch.changes import Changes
from dplaunch.client import GroupClient
from dplaunch.errors import DplaunchError, GroupClosedError, GroupDeadError
from dplaunch.events import Event, Kind, Level, Listener, RankState
from dplaunch.keeper import RankKeeper
from dplaunch.lockstep import LockstepGroup
from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.probe import Prober
from dplaunch.rank import Rank
from dplaunch.spec import Mode
from dplaunch.together import bring_up_all
from dplaunch.tools import Admission, BootMaker, LinkMaker, Tools, admit_as_it_is
from dplaunch.watch import KILL_WAIT_S


class Supervisor:
    """Keeps the ranks of one group as they should be. Lives in the group's event loop.

    Args:
        plan: what should run.
        backend: makes the processes.
        client: told which ranks are up.
        make_boot: fills in what a process needs.
        make_link: opens an incarnation's sockets.
        data_path: done when the launcher can talk to engines (vLLM is imported).
        emit: told everything that happens.
        on_dead: called once, with the root cause, when the group cannot go on.
        admit: brings a rank that comes up to where the group is.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        backend: Backend,
        client: GroupClient,
        *,
        make_boot: BootMaker,
        make_link: LinkMaker,
        data_path: Awaitable[None],
        emit: Listener,
        on_dead: Callable[[DplaunchError], None] = lambda error: None,
        admit: Admission = admit_as_it_is,
    ) -> None:
        self.keepers: list[RankKeeper]
        """The keepers of the ranks, in rank order."""
        self.changes: Changes | None = None
        """What scales the group and restarts its ranks; None until the group is there."""
        self._spec = plan.spec
        self._mode = plan.mode
        self._client = client
        self._emit = emit
        self._on_dead = on_dead
        self._data_path = asyncio.ensure_future(data_path)
        self._tools = Tools(
            spec=plan.spec,
            backend=backend,
            client=client,
            prober=Prober(plan.spec.probe, client),
            make_boot=make_boot,
            make_link=make_link,
            data_path=self._data_path,
            emit=emit,
            listening=asyncio.Lock(),
            any_failed=lambda: any(rank.state is RankState.FAILED for rank in self.ranks),
            admit=admit,
        )
        self.keepers = [self.make_keeper(spec) for spec in plan.ranks]
        self._lives: dict[RankKeeper | None, asyncio.Task[None]] = {}  # None: that of all ranks together
        self._causes: dict[int, str] = {}
        self._stopping = False

    @property
    def ranks(self) -> list[Rank]:
        """What is running, in rank order."""
        return [keeper.rank for keeper in self.keepers]

    @property
    def ready_count(self) -> int:
        """Ranks that are ready and answer."""
        return sum(rank.state is RankState.READY and rank.answers for rank in self.ranks)

    @property
    def needed(self) -> int:
        """Ranks without which the group is not healthy; in lockstep each is."""
        return len(self.keepers) if self._mode is Mode.LOCKSTEP else self._spec.min_ranks

    @property
    def is_healthy(self) -> bool:
        """Whether at least so many ranks answer as the group needs."""
        return self.ready_count >= self.needed

    @property
    def is_stopping(self) -> bool:
        """Whether the group ends: nothing is brought back any more."""
        return self._stopping or (self.changes is not None and self.changes.is_stopped)

    @property
    def start_timeout_s(self) -> float:
        """Seconds that a rank has to be ready."""
        return self._spec.start_timeout_s

    async def start(self) -> None:
        """Starts all ranks side by side; returns when every one is ready.

        The first failure is the root cause: the others are stopped, and it is raised.

        Raises:
            RankFailedError: when a rank ends before it is ready.
            StartTimeoutError: when one is not ready in time.
        """
        await bring_up_all(self.keepers, time.monotonic() + self._spec.start_timeout_s)
        if self._mode is Mode.LOCKSTEP:
            self._lives[None] = asyncio.create_task(self._live_together())
            return
        for keeper in self.keepers:
            self.tend(keeper)

    async def stop(self, reason: str) -> None:
        """Ends every rank: all are asked at once, one deadline is shared, what is left is killed. Idempotent.

        Ranks that do not serve are killed at once.
        """
        if self._stopping:
            return
        if self.changes is not None:
            await self.changes.cancel()
        self._stopping = True
        for task in self._lives.values():
            task.cancel()
        await asyncio.gather(*self._lives.values(), return_exceptions=True)
        self._data_path.cancel()
        try:
            for keeper in self.keepers:
                keeper.ask_to_stop(reason)
        finally:
            await self.until_stopped(self.keepers)

    async def until_stopped(self, keepers: Sequence[RankKeeper]) -> None:
        """Waits for ranks that were asked to end; kills what is left at the deadline, which they share."""
        handles = [keeper.rank.handle for keeper in keepers if keeper.rank.handle is not None]
        try:
            await await_exits(handles, self._spec.shutdown_timeout_s)
        finally:
            for handle in handles:
                handle.kill()
            await await_exits(handles, KILL_WAIT_S)
            for keeper in keepers:
                keeper.stopped()

    async def scale(self, dp: int, drain_s: float | None = None) -> None:
        """Changes the number of ranks; see `AsyncGroup.scale`."""
        await self._changes().scale(dp, drain_s)

    async def restart(
        self, ranks: Sequence[int] | None = None, rolling: bool = False, drain_s: float | None = None
    ) -> None:
        """Restarts ranks on request; see `AsyncGroup.restart`."""
        await self._changes().restart(ranks, rolling, drain_s)

    def _changes(self) -> Changes:
        if self.changes is None:
            raise GroupClosedError("the group is not running yet", hint="Wait until it is ready.")
        return self.changes

    # One rank at a time, for whoever changes a group that runs.

    def make_keeper(self, spec: RankSpec) -> RankKeeper:
        """A keeper for a rank; it is one of the group's once it is in `keepers`, and lives from `tend` on."""
        return RankKeeper(spec, self._tools)

    def tend(self, keeper: RankKeeper) -> None:
        """From now on the rank, which is ready, is watched, and brought back when it dies."""
        if keeper not in self._lives or self._lives[keeper].done():
            self._lives[keeper] = asyncio.create_task(self._live(keeper))

    async def let_be(self, keeper: RankKeeper) -> None:
        """The rank is not watched any more: what happens to it now is the caller's doing. Undone by `tend`."""
        task = self._lives.pop(keeper, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def replace(self, keepers: Sequence[RankKeeper], reason: str) -> None:
        """Ends ranks for no fault of their requests, and has them come up again; returns when they have ended.

        It does not count as a restart: it is the group that wants other processes, not these that failed.
        """

        async def one(keeper: RankKeeper) -> None:
            if self._mode is Mode.LOCKSTEP:  # The group is the part that is replaced, by its own keeper.
                if keeper.rank.handle is not None:
                    keeper.rank.handle.kill()
                return
            await self.let_be(keeper)
            await keeper.end(reason)
            keeper.rank.restarts.clear()
            self.tend(keeper)

        wanted = [keeper for keeper in keepers if keeper.rank.state not in (None, RankState.FAILED)]
        if not self.is_stopping:
            await asyncio.gather(*map(one, wanted))

    def engine_failed(self, rank: int) -> None:
        """A rank's engine says that its loop has raised."""
        for keeper in self.keepers:
            if keeper.rank.identity.rank == rank:
                keeper.engine_failed()

    # What becomes of the group.

    async def _live(self, keeper: RankKeeper) -> None:
        cause = await keeper.live()
        rank, why = keeper.rank, exhausted(self._spec.restart)
        number = rank.identity.rank
        self._causes[number] = cause
        keeper.enter(RankState.FAILED, f"rank {number} does not come back: {why}", Level.ERROR)
        self._client.gone(number)
        left = sum(other.state is not RankState.FAILED for other in self.ranks)
        count = f"{left} of {len(self.ranks)} ranks are left, {self._spec.min_ranks} are needed"
        if left < self._spec.min_ranks:
            self._die(f"{count}: {cause}", keeper)
            return
        message = f"the group goes on without rank {number}: {count}"
        data = {"left": left, "needed": self._spec.min_ranks}
        self._emit(Event(message=message, kind=Kind.GROUP, level=Level.ERROR, data=data))

    def check_left(self) -> None:
        """Ends the group when too few of its ranks are left, now that others have gone on request."""
        failed = [keeper for keeper in self.keepers if keeper.rank.state is RankState.FAILED]
        left = len(self.keepers) - len(failed)
        if failed and left < self._spec.min_ranks:
            cause = self._causes.get(failed[-1].rank.identity.rank, "")
            count = f"{left} of {len(self.keepers)} ranks are left, {self._spec.min_ranks} are needed"
            self._die(f"{count}: {cause}", failed[-1])

    async def _live_together(self) -> None:
        first, cause = await LockstepGroup(self.keepers, self._tools).live()
        for keeper in self.keepers:
            number = keeper.rank.identity.rank
            message = f"rank {number} does not come back: {exhausted(self._spec.restart)}"
            keeper.enter(RankState.FAILED, message, Level.ERROR if keeper is first else Level.INFO)
        self._die(f"the ranks step together, and the group does not come back: {cause}", first)

    def _die(self, message: str, keeper: RankKeeper) -> None:
        log = keeper.rank.spec.log_file
        others = [f"  {cause}" for rank, cause in self._causes.items() if rank != keeper.rank.identity.rank]
        error = GroupDeadError(
            message,
            hint=f"{exhausted(self._spec.restart).capitalize()}; the log says why: {log}",
            detail="\n".join((*(["before that:", *others] if others else []), keeper.last_lines())),
        )
        self._emit(Event(message=error.message, kind=Kind.GROUP, level=Level.ERROR))
        self._client.die(error)
        self._on_dead(error)


async def await_exits(handles: list[RankHandle], seconds: float) -> None:
    """Waits until the processes have ended, or until so many seconds have passed."""
    waits = [asyncio.ensure_future(handle.wait()) for handle in handles if handle.poll() is None]
    if waits:
        _, late = await asyncio.wait(waits, timeout=seconds)
        for wait in late:
            wait.cancel()
