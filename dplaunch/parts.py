"""The parts of a running group, and who may have which when. They are made and let go of in `dplaunch.life`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dplaunch.client import GroupClient
from dplaunch.drain import drain_seconds
from dplaunch.errors import DplaunchError, GroupClosedError
from dplaunch.plan import LaunchPlan
from dplaunch.spec import LaunchSpec
from dplaunch.status import Seen
from dplaunch.supervisor import Supervisor
from dplaunch.weights import Weights

if TYPE_CHECKING:
    from dplaunch.seam.config import ConfigResult


class GroupParts:
    """What a group consists of while it runs."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self.plan: LaunchPlan
        """What was launched; set when the start begins."""
        self.config: ConfigResult
        """What came of vLLM's flags; set during the start."""
        self.dead: asyncio.Future[DplaunchError]
        """Done when the group cannot go on; carries the root cause."""
        self.weights: Weights | None = None
        """What the ranks should have; None before there are any."""
        self._engine: Any = None
        self._supervisor: Supervisor | None = None
        self._client: GroupClient | None = None
        self._closing: asyncio.Task[None] | None = None
        self._planned = asyncio.Event()
        self._drain_s: float | None = None

    async def planned(self) -> None:
        """Returns when `plan` is there and its log directory exists; the start goes on."""
        await self._planned.wait()

    @property
    def is_planned(self) -> bool:
        """Whether `plan` is there and its log directory exists."""
        return self._planned.is_set()

    @property
    def engine(self) -> Any:
        """The group as vLLM's own AsyncLLM, for code that wants one. The group owns it: do not shut it down.

        Raises:
            GroupClosedError: before the start and after `close`.
            GroupDeadError: when the group has lost more ranks than it can do without.
        """
        if self._engine is None or self._closing is not None:
            raise GroupClosedError("the group is not running", hint="Use it inside its with block.")
        if self.dead.done():
            raise self.dead.result()
        return self._engine

    @property
    def client(self) -> GroupClient:
        """The data path: which ranks are up, and what each has in flight."""
        if self._client is None or self._closing is not None:
            raise GroupClosedError("the group is not running", hint="Use it inside its with block.")
        return self._client

    @property
    def supervisor(self) -> Supervisor:
        """The ranks as they are."""
        if self._supervisor is None:
            raise GroupClosedError("the group is not running", hint="Use it inside its with block.")
        return self._supervisor

    @property
    def seen(self) -> Seen:
        """What there is by now, for whoever only looks: nothing here raises."""
        is_dead = self.dead.done() and not self.dead.cancelled()
        return Seen(
            supervisor=self._supervisor,
            client=self._client,
            error=self.dead.result() if is_dead else None,
            is_open=self._engine is not None,
            is_closing=self._closing is not None,
        )

    @property
    def drain_s(self) -> float:
        """Seconds that requests in flight get when the group ends; vLLM's `shutdown_timeout` unless it is set."""
        return drain_seconds(self.spec) if self._drain_s is None else self._drain_s

    @drain_s.setter
    def drain_s(self, seconds: float) -> None:
        self._drain_s = seconds
