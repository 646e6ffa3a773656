"""One rank's life: its start and proof, its watch, its restarts. What the group makes of it is the supervisor's."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from dplaunch.backend import Backend, Exit, RankBoot
from dplaunch.client import GroupClient
from dplaunch.diagnose import describe_failure
from dplaunch.errors import DplaunchError, StartTimeoutError
from dplaunch.events import Event, Kind, Level, Listener, RankState
from dplaunch.identity import Identity
from dplaunch.link import RankLink
from dplaunch.logs import tail
from dplaunch.plan import RankSpec
from dplaunch.rank import Rank
from dplaunch.seam.rank import REPORT
from dplaunch.spec import LaunchSpec

LAST_WORDS_S = 0.5
"""How long to wait, after a rank's exit, for what it said it died of: the message and the exit race."""

BootMaker = Callable[[RankSpec, Identity, RankLink], RankBoot]
LinkMaker = Callable[[Identity, Callable[[str], None]], RankLink]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What every rank of a group is kept with.

    Args:
        spec: what was asked for.
        backend: makes the processes.
        client: told which ranks are up.
        make_boot: fills in what a process needs.
        make_link: opens an incarnation's sockets.
        data_path: done when the launcher can talk to engines (vLLM is imported).
        emit: told everything that happens.
        listening: the rank that ended first is heard first: the others may have died of its death.
        any_failed: whether a rank of the group has failed for good.
    """

    spec: LaunchSpec
    backend: Backend
    client: GroupClient
    make_boot: BootMaker
    make_link: LinkMaker
    data_path: asyncio.Future[None]
    emit: Listener
    listening: asyncio.Lock
    any_failed: Callable[[], bool]


class RankKeeper:
    """Keeps one rank as it should be. The one spawn path: start, restart and scale-up all call `bring_up`."""

    def __init__(self, spec: RankSpec, tools: Tools) -> None:
        self.rank = Rank(spec, spec.identity)
        self._tools = tools

    async def bring_up(self, deadline: float) -> None:
        """Spawns the rank's next incarnation, then waits for ready and exit together; the deadline is for all of it.

        Args:
            deadline: monotonic time, seconds.

        Raises:
            RankFailedError: when the rank ends before it is ready.
            StartTimeoutError: when it is not ready in time.
        """
        rank, tools = self.rank, self._tools
        number, started = rank.identity.rank, time.monotonic()
        self.enter(RankState.STARTING, f"rank {number} is starting")
        link = rank.link = tools.make_link(rank.identity, self._on_phase)
        boot = tools.make_boot(rank.spec, rank.identity, link)
        try:
            async with asyncio.timeout_at(deadline):
                handle = rank.handle = await tools.backend.spawn(boot)
        except TimeoutError:
            raise self._failed(self._timeout(time.monotonic() - started)) from None
        exited = asyncio.ensure_future(handle.wait())
        proven = asyncio.ensure_future(self._prove(boot, link))
        try:
            await asyncio.wait(
                (exited, proven), timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            if proven.done():
                proven.result()
            elif exited.done():
                async with tools.listening:
                    raise self._failed(await self.failure(link, exited.result()))
            else:
                raise self._failed(self._timeout(time.monotonic() - started))
        finally:
            exited.cancel()
            proven.cancel()
        seconds = time.monotonic() - started
        first = rank.identity.incarnation == 0
        # Whoever was warned that it died is told that it is back.
        self.enter(
            RankState.READY,
            f"rank {number} is {'ready' if first else 'back'} after {seconds:.1f} s, {handle.describe()}",
            Level.INFO if first else Level.WARNING,
        )
        tools.client.up(link)

    async def _prove(self, boot: RankBoot, link: RankLink) -> None:
        """Waits for ready, then asks the engine itself who it is."""
        rank, tools = self.rank, self._tools
        rank.ready_response = await link.ready
        await asyncio.shield(tools.data_path)
        report = rank.report = await tools.client.call_link(link, REPORT)
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

    async def live(self) -> str:
        """Watches the rank, and brings it back when it dies; returns, with the cause, when it does not come back."""
        rank = self.rank
        number, words = rank.identity.rank, ""
        while rank.handle is not None and rank.link is not None:
            died = rank.last_exit = await rank.handle.wait()
            words = f"rank {number} died while serving: {died}"
            self._tools.client.down(rank.link, words)
            self.let_go()
            self.enter(RankState.DOWN, f"{words}; log: {rank.spec.log_file}", Level.WARNING)
            if not await self._restart():
                break
        return words

    async def _restart(self) -> bool:
        """Brings the rank back, as often as the policy allows; False when it does not come back."""
        rank, policy = self.rank, self._tools.spec.restart
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
                await self.bring_up(time.monotonic() + self._tools.spec.start_timeout_s)
            except Exception as error:  # whatever it was: the others serve on, and the policy says how often to try
                if rank.handle is not None:
                    rank.handle.kill()
                    rank.last_exit = await rank.handle.wait()
                self.let_go()
                if rank.state is not RankState.DOWN:
                    said = error.message if isinstance(error, DplaunchError) else f"{type(error).__name__}: {error}"
                    words = f"rank {rank.identity.rank} could not be started again: {said}"
                    self.enter(RankState.DOWN, words, Level.WARNING)
            else:
                return True

    def ask_to_stop(self, reason: str) -> None:
        """Asks the rank to end: by SIGTERM when it serves, by SIGKILL otherwise."""
        rank = self.rank
        serves = rank.state is RankState.READY
        if rank.state not in (None, RankState.STOPPED):
            self.enter(RankState.STOPPING, f"rank {rank.identity.rank} is asked to stop: {reason}")
        if rank.handle is None:
            return
        if serves:
            rank.handle.terminate()
        else:
            # It has nothing to finish, and while vLLM builds its engine core it does not answer to SIGTERM.
            rank.handle.kill()

    def stopped(self) -> None:
        """Takes note that the rank has ended as asked."""
        self.let_go()
        if self.rank.state is RankState.STOPPING:
            self.enter(RankState.STOPPED, f"rank {self.rank.identity.rank} stopped")

    async def failure(self, link: RankLink, died: Exit) -> DplaunchError:
        """What to say of a rank that ended: its exit, what it said it died of, its last log lines."""
        rank = self.rank
        rank.last_exit = died
        if died.signal is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.failed.wait(), LAST_WORDS_S)
        said = None if link.failure is None else (link.failure.type, link.failure.message)
        return describe_failure(rank.identity.rank, died, rank.spec.log_file, said)

    def enter(self, state: RankState, message: str, level: Level = Level.INFO) -> None:
        """Changes the rank's state and says so."""
        rank = self.rank
        rank.enter(state)
        identity = rank.identity
        self._tools.emit(
            Event(
                message=message,
                kind=Kind.STATE,
                rank=identity.rank,
                incarnation=identity.incarnation,
                state=state,
                level=level,
            )
        )

    def let_go(self) -> None:
        """Closes the incarnation's sockets."""
        if self.rank.link is not None:
            self.rank.link.close()

    def last_lines(self) -> str:
        """The end of the rank's log, for a message."""
        return "\n".join(f"  {line}" for line in tail(self.rank.spec.log_file))

    def _failed(self, error: DplaunchError) -> DplaunchError:
        # The first failure of a start is its root cause; what follows from it is no second error.
        level = Level.INFO if self._tools.any_failed() else Level.ERROR
        first = self.rank.identity.incarnation == 0
        self.enter(RankState.FAILED if first else RankState.DOWN, error.message, level)
        return error

    def _timeout(self, seconds: float) -> StartTimeoutError:
        return StartTimeoutError(
            f"rank {self.rank.identity.rank} was not ready after {seconds:.0f} s",
            hint="Give it longer with --start-timeout SECONDS, if its log shows that it was getting on.",
            detail=f"{self.last_lines()}\nfull log: {self.rank.spec.log_file}",
        )

    def _on_phase(self, phase: str) -> None:
        number = self.rank.identity.rank
        self._tools.emit(
            Event(message=f"rank {number} {phase}", kind=Kind.PHASE, rank=number, state=self.rank.state, phase=phase)
        )
