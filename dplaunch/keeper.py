"""One rank's life: its start and proof, its watch, its restarts. What the group makes of it is the supervisor's."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from dplaunch.backend import Exit, RankBoot
from dplaunch.backoff import backoff_s, counted
from dplaunch.diagnose import describe_failure
from dplaunch.errors import DplaunchError, StartTimeoutError
from dplaunch.events import Event, Kind, Level, RankState
from dplaunch.link import RankLink
from dplaunch.logs import tail
from dplaunch.plan import RankSpec
from dplaunch.rank import Rank
from dplaunch.seam.rank import REPORT
from dplaunch.tools import Tools
from dplaunch.watch import RankWatch


class RankKeeper:
    """Keeps one rank as it should be. The one spawn path: start, restart and scale-up all call `bring_up`."""

    def __init__(self, spec: RankSpec, tools: Tools) -> None:
        self.rank = Rank(spec, spec.identity)
        self._tools = tools
        self._watch = RankWatch(self.rank, tools)

    async def bring_up(self, deadline: float, *, join: bool = True) -> None:
        """Spawns the rank's next incarnation, then waits for ready and exit together; the deadline is for all of it.

        Args:
            deadline: monotonic time, seconds.
            join: whether it takes requests as soon as it is ready; else from `join` on.

        Raises:
            RankFailedError: when the rank ends before it is ready.
            StartTimeoutError: when it is not ready in time.
        """
        rank, tools = self.rank, self._tools
        number, started = rank.identity.rank, time.monotonic()
        self.enter(RankState.STARTING, f"rank {number} is starting")
        link = rank.link = tools.make_link(rank.identity, self._on_phase)
        boot = tools.make_boot(rank.spec, rank.identity, link)
        self._watch.begin()
        try:
            async with asyncio.timeout_at(deadline):
                rank.handle = await tools.backend.spawn(boot)
        except TimeoutError:
            raise self._failed(self._timeout(time.monotonic() - started)) from None
        await self._until_proven(boot, link, started, deadline)
        rank.handle.settled()
        if rank.stale:
            words = f"rank {number} takes no requests until the next update: its weights are stale, since {rank.stale}"
            self.enter(RankState.STALE, words, Level.WARNING, {"why": rank.stale})
        else:
            self._say_ready(time.monotonic() - started)
        if join:
            self.join()

    async def _until_proven(self, boot: RankBoot, link: RankLink, started: float, deadline: float) -> None:
        handle = self.rank.handle
        if handle is None:
            raise RuntimeError("there is no process to wait for")
        exited = asyncio.ensure_future(handle.wait())
        proven = asyncio.ensure_future(self._prove(boot, link))
        try:
            await asyncio.wait(
                (exited, proven), timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            if proven.done():
                proven.result()
            elif exited.done():
                async with self._tools.listening:
                    raise self._failed(await self.failure(link, exited.result()))
            else:
                raise self._failed(self._timeout(time.monotonic() - started))
        finally:
            exited.cancel()
            proven.cancel()

    async def _prove(self, boot: RankBoot, link: RankLink) -> None:
        """Waits for ready, then asks the engine itself who it is."""
        rank, tools = self.rank, self._tools
        rank.ready_response = await link.ready
        await asyncio.shield(tools.data_path)
        report: dict[str, Any] = await tools.client.call_link(link, REPORT)
        rank.report = report
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
        await tools.admit(rank)

    def _say_ready(self, started_s: float) -> None:
        rank = self.rank
        process = "" if rank.handle is None else f", {rank.handle.describe()}"
        number, away = rank.identity.rank, rank.down_since
        if away is None:
            self.enter(RankState.READY, f"rank {number} is ready after {started_s:.1f} s{process}")
            return
        away_s = time.monotonic() - away
        rank.down_since = None
        rank.recovery_s.append(away_s)
        # Whoever was warned that it died is told that it is back.
        self.enter(RankState.READY, f"rank {number} is back after {away_s:.1f} s{process}", Level.WARNING)

    def join(self) -> None:
        """Puts the rank, which is ready, into routing; one that is stale stays out of it."""
        if self.rank.link is not None and self.rank.state is RankState.READY:
            self.rank.answers = True
            self._tools.client.up(self.rank.link)

    def is_current(self, version: str) -> None:
        """The rank, which was stale, has the group's weights now."""
        self.rank.down_since = None
        self.enter(RankState.READY, f"rank {self.rank.identity.rank} has weights {version} and takes requests")
        self.join()

    async def live(self) -> str:
        """Watches the rank, and brings it back when it dies or is down; returns, with the cause, when it stays away."""
        cause = ""
        if self.rank.state is RankState.DOWN:
            cause = f"rank {self.rank.identity.rank} did not come back when it was restarted on request"
            if not await self._restart():
                return cause
        while self.rank.handle is not None and self.rank.link is not None:
            cause = await self.until_down()
            if not await self._restart():
                break
        return cause

    async def until_down(self) -> str:
        """Returns when the rank, which is ready, has ended unasked or was ended because it hung; says of what.

        It is out of routing at the first sign of that.
        """
        words, advice = await self._watch.until_ended()
        rank = self.rank
        self.let_go()
        data = {"exit": str(rank.last_exit), "advice": advice, "log": str(rank.spec.log_file)}
        self.enter(RankState.DOWN, f"{words}; log: {rank.spec.log_file}", Level.WARNING, data)
        return words

    def engine_failed(self) -> None:
        """The rank's engine says that it is about to end."""
        self._watch.engine_failed()

    async def end(self, reason: str) -> None:
        """Ends the rank at once, for no fault of its requests: they move without blame. It is DOWN then."""
        rank = self.rank
        rank.admitted = False
        if rank.link is not None and rank.answers:
            self._watch.leave(rank.link, reason, blame=False)
        rank.answers = False
        if rank.handle is not None:
            rank.handle.kill()
            rank.last_exit = await self._watch.killed(rank.handle)
        self.let_go()
        if rank.state in (RankState.STARTING, RankState.READY, RankState.STALE):
            self.enter(RankState.DOWN, f"rank {rank.identity.rank} is ended: {reason}")

    async def _restart(self) -> bool:
        """Brings the rank back, as often as the policy allows; False when it does not come back."""
        rank, policy, restarting = self.rank, self._tools.spec.restart, self._tools.restarting
        number = rank.identity.rank
        while True:
            now = time.monotonic()
            rank.restarts = counted(rank.restarts, policy, now)
            if len(rank.restarts) >= policy.limit:
                return False
            wait_s = backoff_s(len(rank.restarts), policy, alone=not restarting)
            restarting.add(number)
            try:
                if wait_s:
                    await asyncio.sleep(wait_s)
                rank.restarts.append(now)
                self.renew()
                await self.bring_up(time.monotonic() + self._tools.spec.start_timeout_s)
            except Exception as error:  # whatever it was: the others serve on, and the policy says how often to try
                await self.put_down(error)
            else:
                return True
            finally:
                restarting.discard(number)

    def renew(self) -> None:
        """Gives the rank the names of its next incarnation, before it is brought up again."""
        self.rank.identity = self.rank.identity.restarted()
        self.rank.restart_count += 1

    async def put_down(self, error: BaseException) -> None:
        """Ends what is left of an incarnation that did not become ready; the rank is DOWN then."""
        rank = self.rank
        if rank.handle is not None:
            rank.handle.kill()
            rank.last_exit = await self._watch.killed(rank.handle)
        self.let_go()
        if rank.state is not RankState.DOWN:
            said = error.message if isinstance(error, DplaunchError) else f"{type(error).__name__}: {error}"
            words = f"rank {rank.identity.rank} could not be started again: {said}"
            self.enter(RankState.DOWN, words, Level.WARNING)

    def ask_to_stop(self, reason: str) -> None:
        """Asks the rank to end: by SIGTERM when it serves, by SIGKILL otherwise."""
        rank = self.rank
        serves = rank.state is RankState.READY and rank.answers
        rank.answers = False
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
        """What to say of a rank that ended before it served: its exit, what it said it died of, its last log lines."""
        self.rank.last_exit = died
        said = await self._watch.last_words(link, died)
        return describe_failure(self.rank.identity.rank, died, self.rank.spec.log_file, said)

    def enter(
        self, state: RankState, message: str, level: Level = Level.INFO, data: dict[str, Any] | None = None
    ) -> None:
        """Changes the rank's state and says so."""
        identity = self.rank.identity
        self.rank.enter(state)
        number, incarnation = identity.rank, identity.incarnation
        self._tools.emit(
            Event(
                message=message,
                kind=Kind.STATE,
                rank=number,
                incarnation=incarnation,
                state=state,
                level=level,
                data=data or {},
            )
        )

    def let_go(self) -> None:
        """Closes the incarnation's sockets."""
        self.rank.admitted, self.rank.stale = False, ""
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
        number, incarnation = self.rank.identity.rank, self.rank.identity.incarnation
        self._tools.emit(
            Event(
                message=f"rank {number} {phase}",
                kind=Kind.PHASE,
                rank=number,
                incarnation=incarnation,
                state=self.rank.state,
                phase=phase,
            )
        )
