"""What a rank's place in a Ray cluster has to hold: from the plan, or from the user's own placement groups."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dplaunch.asked import Asked
from dplaunch.errors import BackendError, UsageError
from dplaunch.plan import RankSpec
from dplaunch.spec import ExecutorKind, LaunchSpec

from .survey import ClusterNode

PLACE_TIMEOUT_S = 60.0
"""Seconds for Ray to give a rank its place; longer means that somebody else has it."""

LEAST_CPUS = 0.001
"""What a rank asks for when it needs no CPU of its own: a bundle must hold something."""

NO_CPU = {"memory": 1.0}
"""What the bundle of a rank holds that shares the CPUs of others of its group, since Ray has none left: a byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a rank's seat holds.

    Args:
        cpus: Ray's CPUs, may be a fraction.
        gpus: devices, each with its own bundle where `nested`.
        share: the share of each device that the rank takes.
        nested: the rank's own executor is Ray, and places its workers in the bundles by itself.
        group: the user's own placement group; None for one of ours.
        bundles: which of its bundles.
    """

    cpus: float = LEAST_CPUS
    gpus: int = 0
    share: float = 1.0
    nested: bool = False
    group: Any = None
    bundles: tuple[int, ...] = ()

    def shapes(self) -> list[dict[str, float]]:
        """The bundles of a group of ours; the first is the rank actor's."""
        own = {"CPU": self.cpus} if self.cpus else {}
        if not own and (self.nested or not self.gpus):
            own = dict(NO_CPU)
        if not self.gpus:
            return [own]
        if self.nested:
            return [own, *({"GPU": self.share} for _ in range(self.gpus))]
        return [own | {"GPU": self.gpus * self.share}]

    def held(self) -> dict[str, float]:
        """What it takes of its node, of CPUs and devices."""
        return {"CPU": self.cpus, "GPU": self.gpus * self.share}

    def fits(self, node: ClusterNode) -> bool:
        """Whether a node has room for it."""
        return node.free["CPU"] >= self.cpus and node.free["GPU"] >= self.gpus * self.share

    def __str__(self) -> str:
        devices = f" and {self.gpus * self.share:g} GPU" if self.gpus else ""
        return f"{self.cpus:g} CPU{devices}"


def plan_needs(ranks: Sequence[RankSpec], nodes: Mapping[str, ClusterNode], share: float) -> dict[int, Need]:
    """What each rank's seat holds, from the plan: its devices, or as many CPUs as it has cores.

    Ranks that share their node's cores share its CPUs too, so that all of them fit; one that joins ranks which hold
    them all takes none.
    """
    beside = Counter(rank.node for rank in ranks)
    needs = {}
    for rank in ranks:
        free = nodes[rank.node].free["CPU"]
        if rank.device_type == "cuda":
            cpus = min(1.0, free / beside[rank.node])
            gpus, nested = len(rank.devices), rank.executor is ExecutorKind.RAY
        else:
            cpus, gpus, nested = min(float(len(rank.cpus)), free / beside[rank.node]), 0, False
        # Ray counts in ten-thousandths.
        cpus = int(cpus * 1000) / 1000 or (LEAST_CPUS if free >= LEAST_CPUS * beside[rank.node] else 0.0)
        needs[rank.identity.rank] = Need(cpus=cpus, gpus=gpus, share=share, nested=nested)
    return needs


def user_needs(spec: LaunchSpec) -> dict[int, Need]:
    """The same in the user's own placement groups: one for each rank, or one that all share.

    Raises:
        UsageError: when there are too few bundles.
    """
    options = spec.cluster
    nested = ExecutorKind.RAY in (spec.executor, Asked(spec).get("distributed_executor_backend"))
    groups = options.placement_groups * spec.dp if len(options.placement_groups) == 1 else options.placement_groups
    shared = len(options.placement_groups) == 1 and spec.dp > 1
    needs = {}
    for rank, group in enumerate(groups):
        count = len(group.bundle_specs)
        each = count // spec.dp if shared else count
        if each == 0:
            raise UsageError(f"the placement group has {count} bundles for {spec.dp} ranks")
        chosen = tuple(range(rank * each, (rank + 1) * each)) if shared else tuple(range(count))
        if options.bundle_indices is not None:
            chosen = options.bundle_indices[rank]
        if not chosen or max(chosen) >= count or min(chosen) < 0:
            raise UsageError(
                f"rank {rank} was given bundles {list(chosen)}, its placement group has {count}",
                hint="bundle_indices counts from 0.",
            )
        devices = [group.bundle_specs[index].get("GPU", 0.0) for index in chosen]
        # Part of a device is a device that is shared.
        gpus = sum(max(1, int(count)) for count in devices if count > 0)
        needs[rank] = Need(gpus=gpus, share=options.num_gpus, nested=nested, group=group, bundles=chosen)
    return needs


def more_user_needs(spec: LaunchSpec, held: Mapping[int, Need], more: int) -> dict[int, Need]:
    """The same for ranks that join those that hold `held`.

    Raises:
        UsageError: when each rank has a placement group of its own, or the group for all has too few bundles left.
    """
    groups = spec.cluster.placement_groups
    if len(groups) > 1:
        raise UsageError(
            f"cannot add ranks: each of the {len(held)} has a placement group of its own",
            hint="Launch with one placement group for all, or without any.",
        )
    used = {index for need in held.values() for index in need.bundles}
    left = [index for index in range(len(groups[0].bundle_specs)) if index not in used]
    pattern = held[min(held)]
    size, first = len(pattern.bundles), max(held) + 1
    if len(left) < more * size:
        raise UsageError(
            f"the placement group has {len(used) + len(left)} bundles, {len(left)} of them unused: "
            f"{more} more ranks need {more * size}",
            hint="Use a group with more bundles; bundle_indices says which are whose at the start.",
        )
    return {
        first + place: replace(pattern, bundles=tuple(left[place * size : (place + 1) * size])) for place in range(more)
    }


def check_devices(ranks: Sequence[RankSpec], needs: Mapping[int, Need]) -> None:
    """Checks that each rank's bundles hold as many devices as it has workers.

    Raises:
        UsageError: names the first rank that they do not fit.
    """
    for rank in ranks:
        number, wanted = rank.identity.rank, len(rank.devices) if rank.device_type == "cuda" else 0
        if wanted and needs[number].gpus != wanted:
            raise UsageError(
                f"rank {number} needs {wanted} devices, its bundles hold {needs[number].gpus}",
                hint="tensor-parallel-size times pipeline-parallel-size is what a rank needs.",
            )


async def node_of(need: Need) -> str:
    """Ray's id of the node that the bundles of the user's group are on; waits until the group is there.

    Raises:
        BackendError: when that takes too long.
        UsageError: when they are on several nodes.
    """
    import ray

    try:
        await asyncio.wait_for(need.group.ready(), PLACE_TIMEOUT_S)
    except TimeoutError:
        raise BackendError(
            f"placement group {need.group.id.hex()[:8]} was not ready after {PLACE_TIMEOUT_S:.0f} s",
            hint="See with `ray status` what it waits for.",
        ) from None
    table = await asyncio.to_thread(ray.util.placement_group_table, need.group)
    nodes = {table["bundles_to_node_id"][index] for index in need.bundles}
    if len(nodes) > 1 and not need.nested:
        raise UsageError(
            f"a rank's bundles {list(need.bundles)} are on {len(nodes)} nodes",
            hint="Make the placement group with strategy STRICT_PACK, or choose bundle_indices of one node.",
        )
    node: str = table["bundles_to_node_id"][need.bundles[0]]
    return node
