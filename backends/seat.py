"""A rank's place in a Ray cluster: bundles that hold its devices, and the actors that hold the bundles.

A seat outlives its rank: the next incarnation takes the same one, unless the node or the actor was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dplaunch.errors import BackendError
from dplaunch.rank_env import DEVICES_VARIABLE, PLACEMENT_GROUP_VARIABLE

from .cluster import ADDRESS_VARIABLE, AUTH_VARIABLE, NAMESPACE
from .loopback import LOOPBACK, LOOPBACK_VARIABLE
from .needs import PLACE_TIMEOUT_S, Need
from .survey import NODE_LABEL

_DEAD = "The actor is dead because "


@dataclass(frozen=True, slots=True)
class Sight:
    """What an actor sees where it is."""

    pid: int
    node_id: str
    devices: tuple[str, ...]


class RankActor:
    """Holds one of a rank's bundles for as long as the seat is kept. Runs in a process of Ray's."""

    async def look(self) -> Sight:
        """What there is where it landed."""
        import ray

        context = ray.get_runtime_context()
        devices = tuple(str(device) for device in context.get_accelerator_ids().get("GPU", ()))
        return Sight(os.getpid(), context.get_node_id(), devices)

    async def hold(self) -> None:
        """Never returns: the caller learns of the actor's end."""
        await asyncio.Event().wait()


class Seat:
    """See the module. Made by `take`; lives in one event loop.

    Attributes:
        sight: what the rank's own actor sees.
        devices: what Ray gave the rank, of all bundles; empty where it has none.
        lost: resolves to the reason when an actor has ended, which nobody asked for.
    """

    def __init__(self, name: str, group: Any, owned: bool, actors: Sequence[Any], sights: Sequence[Sight]) -> None:
        self.name = name
        self.group_id: str = group.id.hex()
        self.sight = sights[0]
        self.devices = tuple(device for sight in sights for device in sight.devices)
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._group = group
        self._owned = owned
        self._actors = actors
        self._holds = [asyncio.create_task(self._hold(actor)) for actor in actors]

    @property
    def actor_id(self) -> str:
        """Ray's id of the rank's own actor."""
        actor_id: str = self._actors[0]._actor_id.hex()
        return actor_id

    def completed(self, env: Mapping[str, str], need: Need, gcs_address: str) -> dict[str, str]:
        """A rank's environment with what only Ray could say.

        Args:
            env: as planned.
            need: what the seat was made for.
            gcs_address: the cluster's, for a rank whose own executor is Ray.
        """
        full = dict(env)
        if need.nested:
            full |= {ADDRESS_VARIABLE: gcs_address, PLACEMENT_GROUP_VARIABLE: self.group_id}
            full |= {name: os.environ[name] for name in (AUTH_VARIABLE,) if name in os.environ}
            if gcs_address.startswith(f"{LOOPBACK}:"):
                full[LOOPBACK_VARIABLE] = "0"
            # The launcher's own value, if any, counts the bundles of another group.
            full.pop("VLLM_RAY_BUNDLE_INDICES", None)
            if need.group is not None:
                full["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, need.bundles))
            if need.share < 1:
                # vLLM's workers would ask for whole devices, which bundles of parts never have.
                full["VLLM_RAY_PER_WORKER_GPUS"] = f"{need.share:g}"
        elif self.devices:
            full[DEVICES_VARIABLE] = ",".join(self.devices)
        return full

    def leave(self) -> None:
        """Ends the actors and gives back a group of ours. Idempotent."""
        import ray

        for task in self._holds:
            task.cancel()
        # The cluster itself may be gone.
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError, ValueError):
            for actor in self._actors:
                ray.kill(actor)
            if self._owned:
                ray.util.remove_placement_group(self._group)

    async def _hold(self, actor: Any) -> None:
        import ray

        try:
            await actor.hold.remote()
        except ray.exceptions.RayError as error:
            if not self.lost.done():
                self.lost.set_result(_why(error))


async def take(name: str, need: Need, node_id: str | None) -> Seat:
    """Makes a seat.

    Args:
        name: for its actors; unique in the cluster.
        need: what it holds.
        node_id: where; None leaves it to Ray (and to the user's own group).

    Raises:
        BackendError: when Ray gives no place, or the name is taken.
    """
    import ray

    owned = need.group is None
    group = _group(name, need, node_id) if owned else need.group
    actors: list[Any] = []
    try:
        # Workers of a nested executor take their bundles themselves: one actor is enough beside them.
        bundles = need.bundles[:1] if need.nested and not owned else range(1) if owned else need.bundles
        names = [name, *(f"{name}.{place}" for place in range(1, len(bundles)))]
        actors = [_actor(label, at, need, group) for label, at in zip(names, bundles, strict=True)]
        async with asyncio.timeout(PLACE_TIMEOUT_S):
            sights = [await actor.look.remote() for actor in actors]
    except BaseException as error:
        with contextlib.suppress(Exception):
            for actor in actors:
                ray.kill(actor)
            if owned:
                ray.util.remove_placement_group(group)
        told = _told(name, need, error)
        if told is None:
            raise
        raise told from error
    return Seat(name, group, owned, actors, sights)


def _group(name: str, need: Need, node_id: str | None) -> Any:
    import ray
    from ray.util.placement_group import placement_group

    shapes = need.shapes()
    pin = None if node_id is None else [{NODE_LABEL: node_id} for _ in shapes]
    try:
        return placement_group(shapes, strategy="STRICT_PACK", name=name, bundle_label_selector=pin)
    except ray.exceptions.RayError as error:
        raise (_taken(name) if _is_group(name) else BackendError(f"Ray could not place {name}: {error}")) from error


def _is_group(name: str) -> bool:
    import ray

    try:
        ray.util.get_placement_group(name)
    except ValueError:
        return False
    return True


def _taken(name: str) -> BackendError:
    return BackendError(
        f"the name {name!r} is taken in this Ray cluster", hint="Choose another --name, or leave it out."
    )


def _actor(name: str, bundle: int, need: Need, group: Any) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    shape = group.bundle_specs[bundle]
    owned = need.group is None
    held = shape.get("GPU", 0.0)
    # Of the user's own bundle we take no more than we were told: a trainer may have the rest.
    gpus = 0.0 if need.nested else held if owned or need.share == 1 else min(need.share, held)
    return (
        ray.remote(RankActor)
        .options(
            name=name,
            namespace=NAMESPACE,
            # A trainer in the user's own bundle may hold its CPUs.
            num_cpus=shape.get("CPU", 0.0) if owned else 0,
            num_gpus=gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
        )
        .remote()
    )


def _told(name: str, need: Need, error: BaseException) -> BackendError | None:
    """The error in our words; None for what passes as it is."""
    import ray

    if isinstance(error, TimeoutError):
        return BackendError(
            f"Ray gave {name} no place within {PLACE_TIMEOUT_S:.0f} s: it wants {need}",
            hint="See what is free with `ray status`; another job may have taken it since the plan was made.",
        )
    if isinstance(error, ValueError) and "already taken" in str(error):
        return _taken(name)
    if isinstance(error, ray.exceptions.RayError):
        return BackendError(f"Ray could not place {name}: {_why(error)}")
    return None


def _why(error: BaseException) -> str:
    """Ray's reason for an actor's end, in one line; Ray itself adds a table of ids and a page of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    for line in lines:
        if line.startswith(_DEAD):
            return f"its Ray actor is dead: {line.removeprefix(_DEAD).partition('. Worker exit')[0].rstrip('.')}"
    return lines[0]
