"""What the ranks of a group are kept with: the same objects for each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from dplaunch.backend import Backend, RankBoot
from dplaunch.client import GroupClient
from dplaunch.events import Listener
from dplaunch.identity import Identity
from dplaunch.link import RankLink
from dplaunch.plan import RankSpec
from dplaunch.probe import Prober
from dplaunch.rank import Rank
from dplaunch.spec import LaunchSpec

BootMaker = Callable[[RankSpec, Identity, RankLink], RankBoot]
LinkMaker = Callable[[Identity, Callable[[str], None]], RankLink]


Admission = Callable[[Rank], Awaitable[None]]
"""Brings a rank that has proved itself to where the group is; `dplaunch.weights` has the real one."""


async def admit_as_it_is(rank: Rank) -> None:
    """Nothing in the group can have changed since its start."""
    rank.admitted = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What every rank of a group is kept with.

    Args:
        spec: what was asked for.
        backend: makes the processes.
        client: told which ranks are up.
        prober: finds ranks that hang.
        make_boot: fills in what a process needs.
        make_link: opens an incarnation's sockets.
        data_path: done when the launcher can talk to engines (vLLM is imported).
        emit: told everything that happens.
        listening: the rank that ended first is heard first: the others may have died of its death.
        any_failed: whether a rank of the group has failed for good.
        restarting: the ranks that are being restarted now.
        admit: brings a rank that comes up to where the group is, before it takes a request.
    """

    spec: LaunchSpec
    backend: Backend
    client: GroupClient
    prober: Prober
    make_boot: BootMaker
    make_link: LinkMaker
    data_path: asyncio.Future[None]
    emit: Listener
    listening: asyncio.Lock
    any_failed: Callable[[], bool]
    restarting: set[int] = field(default_factory=set)
    admit: Admission = admit_as_it_is
