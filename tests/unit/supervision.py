"""A supervisor over processes that are no processes, and all that it sees: for tests of policy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

from dplaunch.backend import Backend, Exit, RankBoot
from dplaunch.client import GroupClient
from dplaunch.errors import DplaunchError
from dplaunch.events import Event, RankState
from dplaunch.identity import Identity
from dplaunch.link import Failure, RankLink
from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.rank import Rank
from dplaunch.seam.rank import PING, REPORT
from dplaunch.spec import ExecutorKind, LaunchSpec, Mode, RestartPolicy
from dplaunch.supervisor import Supervisor
from dplaunch.testing import poll_until_async

KILLED = Exit(signal=9)


class FakeHandle:
    """A process that ends when it is told to, or, stubborn, only when it is killed."""

    def __init__(self, boot: RankBoot) -> None:
        self.boot = boot
        self.pid = 1000 + boot.rank
        self.node = "here"
        self.signals: list[str] = []
        self.is_settled = False
        self.stubborn = False
        self.immortal = False
        self.on_dump_stack: Callable[[], None] = lambda: None
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    def describe(self) -> str:
        return f"pid {self.pid}"

    def settled(self) -> None:
        self.is_settled = True

    def dump_stack(self) -> None:
        self.signals.append("stack")
        self.on_dump_stack()

    def poll(self) -> Exit | None:
        return self._exit.result() if self._exit.done() else None

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)

    def terminate(self) -> None:
        self.signals.append("SIGTERM")
        if not self.stubborn:
            self.end(Exit(code=0))

    def kill(self) -> None:
        if self.poll() is None:
            self.signals.append("SIGKILL")
            if not self.immortal:
                self.end(KILLED)

    def end(self, exit_: Exit) -> None:
        """Ends it from outside."""
        if not self._exit.done():
            self._exit.set_result(exit_)


class FakeLink:
    """The sockets of an incarnation."""

    def __init__(self, identity: Identity, on_phase: Callable[[str], None]) -> None:
        self.identity = identity
        self.rank = identity.rank
        self.on_phase = on_phase
        self.ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.failed = asyncio.Event()
        self.failure: Failure | None = None
        self.closed = False
        self.compiling = False
        self.opened = time.monotonic()

    def close(self) -> None:
        self.closed = True

    def say(self, kind: str, message: str) -> None:
        """The rank's last words."""
        self.failure = Failure(kind, message)
        self.failed.set()


class FakeClient:
    """Notes what the supervisor says, and answers its calls with what an honest rank would say."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.dead: list[DplaunchError] = []
        self.lie: dict[str, Any] = {}
        self.blamed: list[int] = []
        self.reasons: list[str] = []
        self.silent: set[int] = set()
        """Ranks that do not answer."""
        """Ranks that work on a user's call."""
        self.pings = 0
        self._heard: dict[FakeLink, float] = {}

    def up(self, link: FakeLink) -> None:
        self.said.append(("up", link.rank))

    def down(self, link: FakeLink, reason: str, *, blame: bool = True) -> None:
        self.said.append(("down", link.rank))
        self.reasons.append(reason)
        if blame:
            self.blamed.append(link.rank)

    def gone(self, rank: int) -> None:
        self.said.append(("gone", rank))

    def die(self, error: DplaunchError) -> None:
        self.dead.append(error)

    def hear(self, link: FakeLink) -> None:
        """A message of a rank arrives."""
        self._heard[link] = time.monotonic()

    def heard(self, link: FakeLink) -> float:
        return self._heard.get(link, link.opened)

    def calling_since(self, link: FakeLink) -> float | None:
        return None

    async def call_link(self, link: FakeLink, method: str) -> dict[str, Any]:
        if method == PING:
            self.pings += 1
            if link.rank in self.silent:
                await asyncio.Event().wait()
            self.hear(link)
            return {}
        assert method == REPORT
        self.hear(link)
        identity = link.identity
        honest = {"instance_id": identity.instance_id, "engine_id": None, "data_parallel_index": identity.rank}
        return {**honest, **self.lie}


class Clock:
    """asyncio, but its sleeps take no time and are noted."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


def make_boot(spec: RankSpec, identity: Identity, link: RankLink) -> RankBoot:
    """As much of a boot as a supervisor looks at."""
    return RankBoot(
        name="",
        rank=identity.rank,
        incarnation=identity.incarnation,
        process_title="",
        instance_id=identity.instance_id,
        engine_id=None,
        handshake_address="",
        env={},
        cpus=(),
        log_file=None,
        engine="",
        payload=b"",
        sys_path=(),
    )


class Rig:
    """A supervisor, and all that it sees."""

    def __init__(self, directory: Path, data_path: asyncio.Future[None] | None = None, **options: Any) -> None:
        self.mode = options.pop("mode", Mode.INDEPENDENT)
        self.spec = LaunchSpec(**{"dp": 2, "shutdown_timeout_s": 5.0, "restart": RestartPolicy(limit=0), **options})
        self.events: list[Event] = []
        self.client = FakeClient()
        self.handles: list[FakeHandle] = []
        self.links: list[FakeLink] = []
        self.gone: list[DplaunchError] = []
        self.on_spawn: Callable[[FakeHandle, FakeLink], None] = lambda handle, link: link.ready.set_result({"n": 1})
        self.data_path = data_path or asyncio.get_running_loop().create_future()
        if data_path is None:
            self.data_path.set_result(None)
        self.supervisor = self._supervisor(directory)

    def _supervisor(self, directory: Path) -> Supervisor:
        plan = self.plan = self._plan(directory)
        return Supervisor(
            plan,
            cast(Backend, self),
            cast(GroupClient, self.client),
            make_boot=make_boot,
            make_link=self._link,
            data_path=cast(Awaitable[None], self.data_path),
            emit=self.events.append,
            on_dead=self.gone.append,
        )

    def _plan(self, directory: Path) -> LaunchPlan:
        ranks = tuple(
            RankSpec(
                identity=Identity("base", rank),
                node="here",
                device_type="cpu",
                devices=(),
                env={},
                cpus=(),
                log_file=directory / f"{rank}.log",
            )
            for rank in range(self.spec.dp)
        )
        return LaunchPlan(
            spec=self.spec,
            base_id="base",
            model="m",
            model_note="",
            mode=self.mode,
            mode_reason="",
            executor=ExecutorKind.UNI,
            executor_reason="",
            engine_defaults={},
            log_dir=directory,
            ranks=ranks,
        )

    def _link(self, identity: Identity, on_phase: Callable[[str], None]) -> RankLink:
        self.links.append(FakeLink(identity, on_phase))
        return cast(RankLink, self.links[-1])

    async def spawn(self, boot: RankBoot) -> FakeHandle:
        """The one verb of a backend that a supervisor uses."""
        handle = FakeHandle(boot)
        self.handles.append(handle)
        link = next(link for link in self.links if link.identity.instance_id == boot.instance_id)
        self.on_spawn(handle, link)
        return handle

    @property
    def ranks(self) -> list[Rank]:
        return self.supervisor.ranks

    def states(self, rank: int) -> list[str]:
        """What a rank went through."""
        return [event.state for event in self.events if event.rank == rank and event.state and not event.phase]

    async def until(self, rank: int, state: RankState) -> None:
        """Waits until a rank is there."""
        await poll_until_async(lambda: self.ranks[rank].state is state, 5, f"rank {rank} {state}")

    async def dies(self, rank: int, incarnation: int = 0, exit_: Exit = KILLED) -> None:
        """Waits for an incarnation to be ready, and ends it."""
        await poll_until_async(
            lambda: self.ranks[rank].state is RankState.READY and self.ranks[rank].identity.incarnation == incarnation
        )
        handle = self.ranks[rank].handle
        assert isinstance(handle, FakeHandle)
        handle.end(exit_)


Make = Callable[..., Rig]
