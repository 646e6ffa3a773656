"""Policy, written once for every backend: what to wait for and how long, what to do when a rank ends.

One spawn path serves start, restart and (later) scale-up, so identity and checks cannot differ between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from dplaunch.backend import Backend, Exit, RankBoot, RankHandle
from dplaunch.client import GroupClient
from dplaunch.diagnose import describe_failure
from dplaunch.errors import DplaunchError, GroupDeadError, StartTimeoutError
from dplaunch.events import Event, Level, Listener, RankState
from dplaunch.identity import Identity
from dplaunch.link import RankLink
from dplaunch.logs import tail
from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.rank import Rank
from dplaunch.seam.rank import REPORT

LAST_WORDS_S = 0.5
"""How long to wait, after a rank's exit, for what it said it died of: the message and the exit race."""

KILL_WAIT_S = 5.0
"""How long a killed rank may take to be gone, seconds: the kernel gives back its memory first."""

BootMaker = Callable[[RankSpec, Identity, RankLink], RankBoot]
LinkMaker = Callable[[Identity, Callable[[str], None]], RankLink]


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
        self.ranks = [Rank(spec, spec.identity) for spec in plan.ranks]
        self._spec = plan.spec
        self._backend = backend
        self._client = client
        self._make_boot = make_boot
        self._make_link = make_link
        self._data_path = asyncio.ensure_future(data_path)
        self._emit = emit
        self._on_dead = on_dead
        self._lives: list[asyncio.Task[None]] = []
        self._stopping = False
        self._listening = asyncio.Lock()

    async def start(self) -> None:
        """Starts all ranks side by side; returns when every one is ready.

        The first failure is the root cause: the others are stopped, and it is raised.

        Raises:
            RankFailedError: when a rank ends before it is ready.
            StartTimeoutError: when one is not ready in time.
        """
        deadline = time.monotonic() + self._spec.start_timeout_s
        starts = [asyncio.create_task(self._bring_up(rank, deadline)) for rank in self.ranks]
        all_up = asyncio.gather(*starts)
        guards = [asyncio.create_task(self._guard(rank, up)) for rank, up in zip(self.ranks, starts, strict=True)]
        try:
            watched: list[asyncio.Future[Any]] = [all_up, *guards]
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
            self._lives = [asyncio.create_task(self._live(rank)) for rank in self.ranks]
        finally:
            for task in (*starts, *guards):
                task.cancel()
            await asyncio.gather(all_up, *guards, return_exceptions=True)

    async def _guard(self, rank: Rank, up: asyncio.Task[None]) -> None:
        """Ends with an error when a rank dies after it was ready, while others are still starting."""
        await asyncio.wait((up,))
        if up.cancelled() or up.exception() is not None or rank.handle is None or rank.link is None:
            await asyncio.Event().wait()  # Told by its start; a guard has nothing to add.
            return
        error = await self._failure(rank, rank.link, await rank.handle.wait())
        self._enter(rank, RankState.DOWN, error.message, Level.ERROR)
        raise error

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
            for rank in self.ranks:
                self._ask_to_stop(rank, reason)
            await self._await_exits(handles, self._spec.shutdown_timeout_s)
        finally:
            for handle in handles:
                handle.kill()
            await self._await_exits(handles, KILL_WAIT_S)
            for rank in self.ranks:
                self._let_go(rank)
                if rank.state is RankState.STOPPING:
                    self._enter(rank, RankState.STOPPED, f"rank {rank.identity.rank} stopped")

    def _ask_to_stop(self, rank: Rank, reason: str) -> None:
        serves = rank.state is RankState.READY
        if rank.state not in (None, RankState.STOPPED):
            self._enter(rank, RankState.STOPPING, f"rank {rank.identity.rank} is asked to stop: {reason}")
        if rank.handle is None:
            return
        if serves:
            rank.handle.terminate()
        else:
            # It has nothing to finish, and while vLLM builds its engine core it does not answer to SIGTERM.
            rank.handle.kill()

    async def _await_exits(self, handles: list[RankHandle], seconds: float) -> None:
        waits = [asyncio.ensure_future(handle.wait()) for handle in handles if handle.poll() is None]
        if waits:
            _, late = await asyncio.wait(waits, timeout=seconds)
            for wait in late:
                wait.cancel()

    # One rank.

    async def _bring_up(self, rank: Rank, deadline: float) -> None:
        """Spawns the rank's next incarnation, then waits for ready and exit together; the deadline is for all of it."""
        number, started = rank.identity.rank, time.monotonic()
        self._enter(rank, RankState.STARTING, f"rank {number} is starting")
        link = rank.link = self._make_link(rank.identity, lambda phase: self._on_phase(rank, phase))
        boot = self._make_boot(rank.spec, rank.identity, link)
        try:
            async with asyncio.timeout_at(deadline):
                handle = rank.handle = await self._backend.spawn(boot)
        except TimeoutError:
            raise self._failed(rank, self._timeout(rank, time.monotonic() - started)) from None
        exited = asyncio.ensure_future(handle.wait())
        proven = asyncio.ensure_future(self._prove(rank, boot, link))
        try:
            await asyncio.wait(
                (exited, proven), timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            if proven.done():
                proven.result()
            elif exited.done():
                # The rank that ended first is heard first: the others may have died of its death.
                async with self._listening:
                    raise self._failed(rank, await self._failure(rank, link, exited.result()))
            else:
                raise self._failed(rank, self._timeout(rank, time.monotonic() - started))
        finally:
            exited.cancel()
            proven.cancel()
        seconds = time.monotonic() - started
        first = rank.identity.incarnation == 0
        # Whoever was warned that it died is told that it is back.
        self._enter(
            rank,
            RankState.READY,
            f"rank {number} is {'ready' if first else 'back'} after {seconds:.1f} s, {handle.describe()}",
            Level.INFO if first else Level.WARNING,
        )
        self._client.up(link)

    async def _prove(self, rank: Rank, boot: RankBoot, link: RankLink) -> None:
        """Waits for ready, then asks the engine itself who it is."""
        rank.ready_response = await link.ready
        await asyncio.shield(self._data_path)
        report = rank.report = await self._client.call_link(link, REPORT)
        for name, wanted in (
            ("instance_id", boot.instance_id),
            ("engine_id", boot.engine_id),
            ("data_parallel_index", boot.rank),
        ):
            if report[name] != wanted:
                raise DplaunchError(
                    f"rank {rank.identity.rank} says that its {name} is {report[name]!r}, not {wanted!r}",
                    hint="This is a fault of dplaunch or of an unsupported vLLM: please report it.",
                )

    async def _live(self, rank: Rank) -> None:
        """Watches the rank for as long as the group lives, and brings it back when it dies."""
        number = rank.identity.rank
        while rank.handle is not None and rank.link is not None:
            died = rank.last_exit = await rank.handle.wait()
            words = f"rank {number} died while serving: {died}"
            self._client.down(rank.link, words)
            self._let_go(rank)
            self._enter(rank, RankState.DOWN, f"{words}; log: {rank.spec.log_file}", Level.WARNING)
            if not await self._restart(rank):
                self._give_up(rank, words)
                return

    async def _restart(self, rank: Rank) -> bool:
        """Brings the rank back, as often as the policy allows; False when it does not come back."""
        policy = self._spec.restart
        while True:
            now = time.monotonic()
            rank.restarts = [at for at in rank.restarts if now - at < policy.window_s]
            if len(rank.restarts) >= policy.limit:
                return False
            if rank.restarts:
                await asyncio.sleep(policy.backoff_s * 2 ** (len(rank.restarts) - 1))
            rank.restarts.append(now)
            rank.identity = rank.identity.restarted()
            try:
                await self._bring_up(rank, time.monotonic() + self._spec.start_timeout_s)
            except Exception as error:  # whatever it was: the others serve on, and the policy says how often to try
                if rank.handle is not None:
                    rank.handle.kill()
                    rank.last_exit = await rank.handle.wait()
                self._let_go(rank)
                if rank.state is not RankState.DOWN:
                    said = error.message if isinstance(error, DplaunchError) else f"{type(error).__name__}: {error}"
                    words = f"rank {rank.identity.rank} could not be started again: {said}"
                    self._enter(rank, RankState.DOWN, words, Level.WARNING)
            else:
                return True

    def _give_up(self, rank: Rank, cause: str) -> None:
        limit = self._spec.restart.limit
        why = "restarts are off" if limit == 0 else f"{limit} restarts in {self._spec.restart.window_s:.0f} s"
        self._enter(rank, RankState.FAILED, f"rank {rank.identity.rank} does not come back: {why}", Level.ERROR)
        self._client.gone(rank.identity.rank)
        left = [other for other in self.ranks if other.state is not RankState.FAILED]
        if len(left) < self._spec.min_ranks:
            error = GroupDeadError(
                f"{len(left)} of {len(self.ranks)} ranks are left, {self._spec.min_ranks} are needed: {cause}",
                hint=f"{why.capitalize()}; the log says why: {rank.spec.log_file}",
                detail=_last_lines(rank),
            )
            self._emit(Event(message=error.message, level=Level.ERROR))
            self._client.die(error)
            self._on_dead(error)

    # Small things.

    async def _failure(self, rank: Rank, link: RankLink, died: Exit) -> DplaunchError:
        rank.last_exit = died
        if died.signal is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.failed.wait(), LAST_WORDS_S)
        said = None if link.failure is None else (link.failure.type, link.failure.message)
        return describe_failure(rank.identity.rank, died, rank.spec.log_file, said)

    def _failed(self, rank: Rank, error: DplaunchError) -> DplaunchError:
        first = not any(other.state is RankState.FAILED for other in self.ranks)
        state = RankState.FAILED if rank.identity.incarnation == 0 else RankState.DOWN
        # The first failure of a start is its root cause; what follows from it is no second error.
        self._enter(rank, state, error.message, Level.ERROR if first else Level.INFO)
        return error

    def _timeout(self, rank: Rank, seconds: float) -> StartTimeoutError:
        return StartTimeoutError(
            f"rank {rank.identity.rank} was not ready after {seconds:.0f} s",
            hint="Give it longer with --start-timeout SECONDS, if its log shows that it was getting on.",
            detail=f"{_last_lines(rank)}\nfull log: {rank.spec.log_file}",
        )

    def _on_phase(self, rank: Rank, phase: str) -> None:
        number = rank.identity.rank
        event = Event(message=f"rank {number} {phase}", rank=number, state=rank.state, phase=phase)
        self._emit(event)

    def _enter(self, rank: Rank, state: RankState, message: str, level: Level = Level.INFO) -> None:
        rank.enter(state)
        identity = rank.identity
        self._emit(
            Event(
                message=message,
                rank=identity.rank,
                incarnation=identity.incarnation,
                state=state,
                level=level,
            )
        )

    def _let_go(self, rank: Rank) -> None:
        if rank.link is not None:
            rank.link.close()


def _last_lines(rank: Rank) -> str:
    return "\n".join(f"  {line}" for line in tail(rank.spec.log_file))
