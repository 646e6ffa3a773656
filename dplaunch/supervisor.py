"""Policy for a group, written once for every backend: its start, what becomes of it when ranks end, its end.

What happens to a single rank is its keeper's matter (`dplaunch.keeper`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from dplaunch.backend import Backend, RankHandle
from dplaunch.client import GroupClient
from dplaunch.errors import DplaunchError, GroupDeadError
from dplaunch.events import Event, Level, Listener, RankState
from dplaunch.keeper import BootMaker, LinkMaker, RankKeeper, Tools
from dplaunch.plan import LaunchPlan
from dplaunch.rank import Rank

KILL_WAIT_S = 5.0
"""How long a killed rank may take to be gone, seconds: the kernel gives back its memory first."""


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
    ) -> None:
        self._spec = plan.spec
        self._client = client
        self._emit = emit
        self._on_dead = on_dead
        self._data_path = asyncio.ensure_future(data_path)
        self._tools = Tools(
            spec=plan.spec,
            backend=backend,
            client=client,
            make_boot=make_boot,
            make_link=make_link,
            data_path=self._data_path,
            emit=emit,
            listening=asyncio.Lock(),
            any_failed=lambda: any(rank.state is RankState.FAILED for rank in self.ranks),
        )
        self._keepers = [RankKeeper(spec, self._tools) for spec in plan.ranks]
        self._lives: list[asyncio.Task[None]] = []
        self._stopping = False

    @property
    def ranks(self) -> list[Rank]:
        """What is running, in rank order."""
        return [keeper.rank for keeper in self._keepers]

    async def start(self) -> None:
        """Starts all ranks side by side; returns when every one is ready.

        The first failure is the root cause: the others are stopped, and it is raised.

        Raises:
            RankFailedError: when a rank ends before it is ready.
            StartTimeoutError: when one is not ready in time.
        """
        deadline = time.monotonic() + self._spec.start_timeout_s
        starts = [asyncio.create_task(keeper.bring_up(deadline)) for keeper in self._keepers]
        all_up = asyncio.gather(*starts)
        guards = [asyncio.create_task(_guard(keeper, up)) for keeper, up in zip(self._keepers, starts, strict=True)]
        try:
            watched: list[asyncio.Future[Any]] = [all_up, *guards]
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
            self._lives = [asyncio.create_task(self._live(keeper)) for keeper in self._keepers]
        finally:
            for task in (*starts, *guards):
                task.cancel()
            await asyncio.gather(all_up, *guards, return_exceptions=True)

    async def stop(self, reason: str) -> None:
        """Ends every rank: all are asked at once, one deadline is shared, what is left is killed. Idempotent.

        Ranks that do not serve are killed at once.
        """
        if self._stopping:
            return
        self._stopping = True
        for task in self._lives:
            task.cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)
        self._data_path.cancel()
        handles = [rank.handle for rank in self.ranks if rank.handle is not None]
        try:
            for keeper in self._keepers:
                keeper.ask_to_stop(reason)
            await _await_exits(handles, self._spec.shutdown_timeout_s)
        finally:
            for handle in handles:
                handle.kill()
            await _await_exits(handles, KILL_WAIT_S)
            for keeper in self._keepers:
                keeper.stopped()

    async def _live(self, keeper: RankKeeper) -> None:
        self._give_up(keeper, await keeper.live())

    def _give_up(self, keeper: RankKeeper, cause: str) -> None:
        rank, limit = keeper.rank, self._spec.restart.limit
        why = "restarts are off" if limit == 0 else f"{limit} restarts in {self._spec.restart.window_s:.0f} s"
        keeper.enter(RankState.FAILED, f"rank {rank.identity.rank} does not come back: {why}", Level.ERROR)
        self._client.gone(rank.identity.rank)
        left = [other for other in self.ranks if other.state is not RankState.FAILED]
        if len(left) < self._spec.min_ranks:
            error = GroupDeadError(
                f"{len(left)} of {len(self.ranks)} ranks are left, {self._spec.min_ranks} are needed: {cause}",
                hint=f"{why.capitalize()}; the log says why: {rank.spec.log_file}",
                detail=keeper.last_lines(),
            )
            self._emit(Event(message=error.message, level=Level.ERROR))
            self._client.die(error)
            self._on_dead(error)


async def _guard(keeper: RankKeeper, up: asyncio.Task[None]) -> None:
    """Ends with an error when a rank dies after it was ready, while others are still starting."""
    await asyncio.wait((up,))
    rank = keeper.rank
    if up.cancelled() or up.exception() is not None or rank.handle is None or rank.link is None:
        await asyncio.Event().wait()  # Told by its start; a guard has nothing to add.
        return
    error = await keeper.failure(rank.link, await rank.handle.wait())
    keeper.enter(RankState.DOWN, error.message, Level.ERROR)
    raise error


async def _await_exits(handles: list[RankHandle], seconds: float) -> None:
    waits = [asyncio.ensure_future(handle.wait()) for handle in handles if handle.poll() is None]
    if waits:
        _, late = await asyncio.wait(waits, timeout=seconds)
        for wait in late:
            wait.cancel()
