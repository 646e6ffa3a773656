"""What a backend is: mechanism only. It makes processes, says when they end, and ends them.

Policy (deadlines, restarts, escalation) lives in `dplaunch.supervisor`, and nothing here knows of it. To add
a backend, write a class with these verbs and name it in the entry-point group `dplaunch.backends`;
`dplaunch.testing` has the contract that it must keep.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dplaunch.argv import nearest_word
from dplaunch.errors import BackendError
from dplaunch.inventory import Inventory
from dplaunch.spec import LaunchSpec

if TYPE_CHECKING:
    from dplaunch.plan import RankSpec

BACKEND_GROUP = "dplaunch.backends"

STACK_SIGNAL = signals.SIGUSR1
"""Has a rank write the stacks of all its threads to its log; vLLM and its workers have no use for it."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a rank ended.

    Args:
        code: the exit code; None when a signal ended it, or when nobody could collect it.
        signal: the signal that ended it; None when it exited by itself.
        reason: what the backend knows beyond the number ("node 10.0.0.7 was lost").
    """

    code: int | None = None
    signal: int | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.signal is not None:
            try:
                name = signals.Signals(self.signal).name
            except ValueError:
                name = "signal"
            text = f"{name}(-{self.signal})"
        else:
            text = "exit status unknown" if self.code is None else f"exit code {self.code}"
        return f"{text}: {self.reason}" if self.reason else text

    @classmethod
    def from_returncode(cls, returncode: int, reason: str = "") -> Exit:
        """From a code in the way of `subprocess`: negative means a signal."""
        return cls(signal=-returncode, reason=reason) if returncode < 0 else cls(code=returncode, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBoot:
    """All that a process needs to become a rank; picklable, and the same for every backend.

    Args:
        name: the process's name, also the prefix of vLLM's log lines ("EngineCore_DP3").
        rank: the global data-parallel rank.
        incarnation: 0 at first, one more at each restart.
        process_title: what `ps` shows.
        instance_id: the rank's unique id, for `VllmConfig.instance_id`.
        engine_id: the KV connector's unique id; None without a connector.
        handshake_address: the ZeroMQ address that the rank says HELLO to.
        env: the process's whole environment.
        cpus: cores to bind to; empty for no binding.
        log_file: takes stdout and stderr; None leaves them as they are.
        engine: what to run, as "module:function", called with (boot, channel).
        payload: the engine's own argument, opaque to backends.
        sys_path: the launcher's import path.
        node: the host that the plan chose, by its name in the inventory; "" leaves it to the backend.
    """

    name: str
    rank: int
    incarnation: int
    process_title: str
    instance_id: str
    engine_id: str | None = None
    handshake_address: str
    env: Mapping[str, str]
    cpus: tuple[int, ...]
    log_file: Path | None
    engine: str
    payload: bytes
    sys_path: tuple[str, ...]
    node: str = ""


class RankHandle(Protocol):
    """One incarnation of one rank, in the shape of `subprocess.Popen`."""

    @property
    def pid(self) -> int | None:
        """The process id on its node; None when it is not known."""

    @property
    def node(self) -> str:
        """The host that it runs on."""

    def describe(self) -> str:
        """Names the process in messages: "pid 4711", "actor 0a1b on node2"."""

    def poll(self) -> Exit | None:
        """None while it runs, then how it ended. Never blocks."""

    async def wait(self) -> Exit:
        """Returns how it ended, at once when it does; called by the supervisor for as long as the rank lives."""

    def settled(self) -> None:
        """It serves from now on. What it holds by now and would outlive it (shared memory) is to go with it.

        Called once it is ready: afterwards it may be killed at any moment, and then nobody can ask it any more.
        """

    def dump_stack(self) -> None:
        """Asks it to write where it is to its log (`STACK_SIGNAL`). Called when it hangs."""

    def terminate(self) -> None:
        """Asks it to end (SIGTERM). Called first, at shutdown. Does nothing when it has ended."""

    def kill(self) -> None:
        """Ends it and every process below it (SIGKILL). Called at the deadline. Does nothing when it has ended."""


class Backend(Protocol):
    """Makes ranks. One object a group; `open` is called first and `close` last, once each."""

    async def inventory(self, spec: LaunchSpec, more: int = 0) -> Inventory:
        """What there is to run on. Called before the plan is made; starts nothing and initialises no device.

        Args:
            spec: what was asked for.
            more: ranks to be added to the group, which runs; 0 before it is launched. A scheduler then gives what
                is free beside the group's own ranks.

        Raises:
            UsageError: when the spec asks for what this backend cannot do.
        """

    async def open(self, spec: LaunchSpec, env: Mapping[str, str], ranks: Sequence[RankSpec] = ()) -> None:
        """Begins to warm what can be warmed, and returns at once.

        Args:
            spec: what was asked for.
            env: what helper processes get.
            ranks: the plan's ranks, for whom room can be made already.
        """

    async def address(self) -> str | None:
        """The launcher's own IP address as ranks reach it; None when they share its host, and sockets are files.

        Called after `open`.
        """

    async def call(self, function: str, payload: bytes) -> bytes:
        """Runs "module:function" on payload in a throw-away process that has vLLM imported; returns its bytes.

        The launcher uses it for what would leave traces in the user's process, such as vLLM's config.

        Raises:
            BackendError: when the process ends without an answer; carries what it wrote to stderr.
        """

    async def reserve(self, ranks: Sequence[RankSpec]) -> None:
        """Begins to make room for ranks that join the running group, and returns at once; `spawn` follows."""

    async def release(self, rank: int) -> None:
        """Gives back the room of a rank that has ended and leaves the group. Does nothing where it has none."""

    async def spawn(self, boot: RankBoot) -> RankHandle:
        """Starts a rank that runs `dplaunch.rank_main.rank_main(boot)`; returns when the process exists.

        The one way to make a rank: at the start, at a restart and at scale-up.
        """

    async def close(self) -> None:
        """Lets go of everything that `open` and `spawn` made. Ranks have ended, or are killed here. Idempotent."""


def find_backend(name: str) -> EntryPoint:
    """The entry point of a backend, not yet imported.

    Raises:
        BackendError: when no installed package names such a backend.
    """
    found = {point.name: point for point in entry_points(group=BACKEND_GROUP)}
    if name not in found:
        known = sorted(found.keys() - {"fake"})
        near = nearest_word(name, known)
        hint = f"Did you mean {near}? " if near else ""
        hint += f"Backends on this machine: {', '.join(known) or 'none: reinstall dplaunch'}."
        raise BackendError(f"unknown backend {name!r}", hint=hint)
    return found[name]


def load_backend(name: str) -> Backend:
    """A new backend object.

    Raises:
        BackendError: when it is unknown, or when what it needs is not installed.
    """
    factory = find_backend(name).load()
    backend: Backend = factory()
    return backend
