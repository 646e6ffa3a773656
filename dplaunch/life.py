"""The life of a group: its parts are made in order, and let go of in order."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cloudpickle
import zmq

from dplaunch import known_flags, remains, seam
from dplaunch.arrivals import Arrivals
from dplaunch.backend import Backend, RankBoot, load_backend
from dplaunch.changes import Changes
from dplaunch.client import SETTLE_S, GroupClient
from dplaunch.crew import Crew
from dplaunch.drain import drain
from dplaunch.errors import DplaunchError, GroupClosedError
from dplaunch.events import Event, Level, Listener
from dplaunch.host import GroupHost
from dplaunch.identity import Identity
from dplaunch.lengths import AnswerLengths
from dplaunch.link import RankLink, Transport
from dplaunch.logs import prepare_log_dir, prune_old, release_log_dir
from dplaunch.parts import GroupParts
from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.plan_view import is_spread, whereabouts
from dplaunch.planner import plan_launch
from dplaunch.progress import Reporter
from dplaunch.rank_env import helper_env
from dplaunch.recipes import config_request, make_boot
from dplaunch.runtime_dir import make_runtime_dir
from dplaunch.seam import frontend, wire
from dplaunch.seam.config import check_version
from dplaunch.seam.lockstep import LOOPBACK, Meetings
from dplaunch.seam.preload import exec_environment
from dplaunch.seam.server import import_server
from dplaunch.sight import Sight
from dplaunch.spec import VLLM_ENGINE, LaunchSpec, Mode
from dplaunch.supervisor import Supervisor
from dplaunch.threads import in_thread
from dplaunch.weights import Weights


class GroupLife(GroupParts):
    """The life of a group, in one event loop; `AsyncGroup` adds what it is used for.

    Args:
        spec: what to launch.
        server: whether vLLM's server flags are in `spec.vllm_argv` and will be needed.
        listeners: told everything that happens.
        quiet_vllm: keeps vLLM's own log lines in this process from being configured (the command does it itself).
    """

    def __init__(
        self,
        spec: LaunchSpec,
        *,
        server: bool = False,
        listeners: Sequence[Listener] = (),
        quiet_vllm: bool = False,
    ) -> None:
        super().__init__(spec)
        self.sight = Sight(self, self._emit)
        """What lets it be seen and steered from outside."""
        self._lengths = AnswerLengths()
        self._server = server
        self._listeners: list[Listener] = [*listeners, self.sight]
        self._quiet_vllm = quiet_vllm
        self._backend: Backend | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._address: str | None = None
        self._runtime_dir: Path | None = None
        self._arrivals: Arrivals | None = None
        self._meetings: Meetings | None = None

    # Life.

    async def open(self) -> Self:
        """Starts the ranks; returns when all are ready. What has been started is stopped when it fails.

        Raises:
            DplaunchError: see `dplaunch.errors`; its `exit_code` says which kind.
        """
        self.dead = asyncio.get_running_loop().create_future()
        try:
            await self._open()
        except BaseException as error:
            await self.close(f"the start failed ({type(error).__name__})")
            raise
        return self

    async def _open(self) -> None:
        version = check_version(seam.installed_version(), override=self.spec.any_vllm or seam.override_in(os.environ))
        known_flags.check(version, self.spec.vllm_argv)
        backend = self._backend = load_backend(self.spec.backend)
        plan = self.plan = await plan_launch(self.spec, backend, say=lambda line: self._emit(Event(message=line)))
        for warning in plan.warnings:
            self._emit(Event(message=warning, level=Level.WARNING))
        self._prepare_logs(plan)
        for listener in self._listeners:
            if isinstance(listener, Reporter):
                listener.expect(plan.ranks)
        self._planned.set()
        self._runtime_dir = make_runtime_dir()
        self.sight.open(self._runtime_dir)
        for rank in plan.ranks:
            number = rank.identity.rank
            where = f" goes to {whereabouts(plan, rank)}, and" if is_spread(plan) else ""
            self._emit(Event(message=f"rank {number}{where} waits for vLLM's import", rank=number, phase="importing"))
        first = plan.ranks[0]
        await backend.open(self.spec, exec_environment(helper_env(first.env), first.device_type), plan.ranks)
        imported = in_thread(functools.partial(frontend.import_vllm, quiet=self._quiet_vllm), "import")
        answer = await backend.call("dplaunch.seam.config:make", config_request(plan, server=self._server))
        self.config = cloudpickle.loads(answer)
        if self.config.known_flags:
            known_flags.remember(version, self.config.known_flags)
        client = self._client = GroupClient(
            wire.Codec(),
            on_engine_error=lambda rank: self.supervisor.engine_failed(rank),
            policy=self.spec.requests,
            emit=self._emit,
            settle_s=SETTLE_S,
            lockstep=plan.mode is Mode.LOCKSTEP,
            places=self.config.max_num_seqs,
            gathers=not self.spec.log_stats,
        )
        weights = self.weights = Weights(client, alike=plan.mode is not Mode.LOCKSTEP)
        self._arrivals = Arrivals(weights, lambda: [] if weights.alike else self.supervisor.ranks)
        supervisor = self._supervisor = Supervisor(
            plan,
            backend,
            client,
            make_boot=self._make_boot,
            make_link=self._make_link,
            data_path=imported,
            emit=self._emit,
            on_dead=self._on_dead,
            admit=self._arrivals.admit,
        )
        self._steer(self._crew_of(weights, client, supervisor))
        self._context = zmq.Context()
        self._address = await backend.address()
        await self._start_ranks_and_engine(backend, client, supervisor, imported)

    async def _start_ranks_and_engine(
        self, backend: Backend, client: GroupClient, supervisor: Supervisor, imported: asyncio.Future[None]
    ) -> None:
        if self.plan.mode is Mode.LOCKSTEP and self.spec.engine == VLLM_ENGINE:
            await imported  # Where the ranks meet is a store of torch's.
            self._meetings = Meetings(self._address or LOOPBACK)
        # The engine loads its tokenizer while the ranks load their weights, then waits for them at this gate.
        gate: concurrent.futures.Future[list[Mapping[str, Any]]] = concurrent.futures.Future()

        def make_engine() -> Any:
            remains.collect()
            if self._server:
                import_server()
            return frontend.make_engine(
                cloudpickle.loads(self.config.config),
                client,
                ranks=self.spec.dp,
                log_stats=self.spec.log_stats,
                log_requests=self.config.log_requests,
                quiet=self._quiet_vllm,
                ready_responses=gate.result,
            )

        async def build() -> Any:
            await imported
            return await in_thread(make_engine, "engine")

        building = asyncio.create_task(build())
        starting = asyncio.create_task(supervisor.start())
        try:
            # A tokenizer that cannot be loaded fails the launch at once, not after the weights.
            await asyncio.wait((building, starting), return_when=asyncio.FIRST_COMPLETED)
            if building.done():
                building.result()  # It waits for the gate: done means failed.
            await starting
            gate.set_result([rank.ready_response for rank in supervisor.ranks])
            self._engine = await building
            supervisor.changes = Changes(
                supervisor, backend, client, GroupHost(self, self._engine), dict(os.environ), self._emit
            )
            frontend.guard_health(self._engine, lambda: supervisor.is_healthy)
        finally:
            if not gate.done():
                gate.set_exception(GroupClosedError("the start was given up"))
            await _end([starting, building])

    def listen(self, listener: Listener) -> None:
        """Tells one more listener what happens from now on."""
        self._listeners.append(listener)

    async def close(self, reason: str = "closed by its user") -> None:
        """Stops the ranks and lets go of everything; idempotent, and safe to cancel and call again."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(reason))
        await asyncio.shield(self._closing)

    async def _close(self, reason: str) -> None:
        closed = GroupClosedError("the group is closed")
        if self._supervisor is not None and self._supervisor.changes is not None:
            await self._supervisor.changes.cancel()
        if self._engine is not None and self._client is not None and self._client.dead is None:
            await drain(self._engine, self._client, self.drain_s, closed=closed, emit=self._emit)
        if self._engine is not None:
            frontend.end_engine(self._engine, closed)
            remains.leave(self._engine)
        if self._client is not None and self._client.dead is None:
            self._client.die(closed)
        try:
            if self._supervisor is not None:
                await self._supervisor.stop(reason)
        finally:
            if self._backend is not None:
                await self._backend.close()
            if self._arrivals is not None:
                await self._arrivals.close()
            if self.weights is not None:
                self.weights.close()
            self._meetings = None
            if self._context is not None:
                self._context.destroy(linger=0)
            await self.sight.close()
            if self._planned.is_set() and self.spec.log_dir is None:
                release_log_dir(self.plan.log_dir)
            if self._runtime_dir is not None:
                shutil.rmtree(self._runtime_dir, ignore_errors=True)
            if not self.dead.done():
                self.dead.cancel()

    async def __aenter__(self) -> Self:
        return self if self._engine is not None else await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Parts.

    def _crew_of(self, weights: Weights, client: GroupClient, supervisor: Supervisor) -> Crew:
        return Crew(
            weights,
            client,
            keepers=lambda: supervisor.keepers,
            replace=supervisor.replace,
            emit=self._emit,
            forget_media=lambda: frontend.forget_media(self._engine),
        )

    def _steer(self, crew: Crew) -> None:
        """Takes what changes of the group that runs are made with; here nobody makes any."""

    def _prepare_logs(self, plan: LaunchPlan) -> None:
        own = self.spec.log_dir is None
        prepare_log_dir(plan.log_dir, owned=own)
        if own:
            prune_old(plan.log_dir.parent)

    def _make_link(self, identity: Identity, on_phase: Callable[[str], None]) -> RankLink:
        if self._context is None or self._client is None:
            raise GroupClosedError("the group is not running")
        return RankLink(
            identity.rank,
            identity.incarnation,
            context=self._context,
            transport=Transport(self._runtime_dir if self._address is None else None, self._address),
            on_phase=on_phase,
            on_output=self._client.on_output,
        )

    def _make_boot(self, spec: RankSpec, identity: Identity, link: RankLink) -> RankBoot:
        meeting = None if self._meetings is None else self._meetings.of(identity.incarnation)
        return make_boot(self.plan, self.config, spec, identity, link.handshake_address, meeting)

    def _on_dead(self, error: DplaunchError) -> None:
        if not self.dead.done():
            self.dead.set_result(error)

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels what is still running, and takes note of every result so that none is reported as lost."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
