"""A running group of stand-in ranks, and the hands that harm it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from dplaunch.events import Event, RankState
from dplaunch.rank import Rank
from dplaunch.spec import LaunchSpec, ProbePolicy, RequestPolicy, RestartPolicy
from dplaunch.testing import Fault, StandInPlan, When, poll_until_async
from tests.contract.groups import Watched, group_spec

RANKS = 4

POISON = 2
"""A rank that gets a prompt with this token in it dies. A reserved one: answers become prompts when they move."""

MANY = 600
"""More incarnations than any run needs."""

WHOLE_S = 240.0
"""Seconds for all ranks to be back; a new zygote imports vLLM first, on a machine that does other things too."""

DEADLY = Fault(when=When.REQUEST, nth=0, poison_token=POISON, returncode=-signal.SIGSEGV, grandchild=True)
SLOW_START_S = 1.0


def faults() -> dict[tuple[int, int], Fault]:
    """What goes wrong by itself: rank 2 starts slowly at its restarts, rank 3 fails at its first two of three."""
    planned: dict[tuple[int, int], Fault] = {}
    for again in range(1, MANY):
        if again % 2:
            planned[2, again] = _deadly(slow_start_s=SLOW_START_S)
        if again % 3 == 1:
            planned[3, again] = Fault(when=When.BEFORE_READY, returncode=7)
        if again % 3 == 2:
            planned[3, again] = Fault(when=When.AFTER_READY, returncode=8)
    return planned


def _deadly(**more: Any) -> Fault:
    return Fault(
        when=DEADLY.when,
        nth=DEADLY.nth,
        poison_token=DEADLY.poison_token,
        returncode=DEADLY.returncode,
        grandchild=True,
        **more,
    )


def chaos_spec(directory: Path, backend: str, dp: int = RANKS, **options: Any) -> LaunchSpec:
    """A group that is put through everything: restarts are never used up, and a hung rank is found soon."""
    plan = options.pop("plan", None) or StandInPlan(default=DEADLY, faults=faults(), token_delay_s=0.02)
    asked: dict[str, Any] = {
        "restart": RestartPolicy(limit=MANY, window_s=3.0, backoff_s=0.02, jitter=0.25),
        "probe": ProbePolicy(interval_s=0.5, timeout_s=3.0, busy_timeout_s=6.0),
        "requests": RequestPolicy(poison_file=directory / "poison.txt"),
        "base_id": "chaos",
        "start_timeout_s": WHOLE_S,
    }
    return group_spec(directory, backend, plan, dp, **(asked | options))


class Rig:
    """A group that is watched, and what is done to it."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.backend = spec.backend
        self.watched = Watched(spec)
        self.group = self.watched.group
        self.group._listeners.append(self._note)
        self._entered: set[tuple[int | None, RankState, int]] = set()

    def _note(self, event: Event) -> None:
        if event.state is not None:
            self._entered.add((event.rank, event.state, event.incarnation))

    @property
    def events(self) -> list[Event]:
        """All that has happened."""
        return self.watched.events

    def rank(self, number: int) -> Rank:
        """What runs for a rank."""
        return self.group.supervisor.ranks[number]

    def pid(self, number: int) -> int:
        """Its process, by its own account."""
        return int(self.rank(number).report["pid"])

    def kill(self, *numbers: int, by: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to ranks."""
        for pid in [self.pid(number) for number in numbers]:
            os.kill(pid, by)

    def kill_worker(self, number: int) -> None:
        """Kills a process that the rank has below it."""
        for worker in psutil.Process(self.pid(number)).children()[:1]:
            worker.kill()

    def kill_zygote(self, number: int) -> None:
        """Kills the process that the rank was forked from."""
        zygote = psutil.Process(self.pid(number)).parent()
        if zygote is None or "zygote" not in " ".join(zygote.cmdline()):
            raise RuntimeError(f"rank {number} was not forked by a zygote but by {zygote}")
        zygote.kill()

    async def misbehave(self, number: int, **fault: Any) -> None:
        """Gives a running rank a fault (see `dplaunch.testing.Fault`)."""
        await self.group.call("misbehave", fault, rank=number)

    async def down(self, number: int, incarnation: int | None = None) -> None:
        """Returns when an incarnation (this one) of the rank is out of routing."""
        now = self.rank(number).identity.incarnation if incarnation is None else incarnation
        death = (number, RankState.DOWN, now)
        await poll_until_async(lambda: death in self._entered, WHOLE_S, f"the death of rank {number}")

    async def failed(self, number: int) -> None:
        """Returns when the rank has been given up."""
        await poll_until_async(
            lambda: any(rank == number and state is RankState.FAILED for rank, state, _ in self._entered),
            WHOLE_S,
            f"the last death of rank {number}",
        )

    async def whole(self) -> None:
        """Returns when all ranks take requests."""
        everyone = list(range(len(self.group.supervisor.ranks)))
        await poll_until_async(lambda: self.group.client.ranks == everyone, WHOLE_S, "all ranks to be back")

    def incarnations(self) -> Mapping[int, int]:
        """Which incarnation of each rank there is."""
        return {rank.identity.rank: rank.identity.incarnation for rank in self.group.supervisor.ranks}
