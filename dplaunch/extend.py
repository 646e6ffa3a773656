"""The plan of a group that gets more ranks: pure, and those that run keep their place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dplaunch.asked import Asked
from dplaunch.backend import Backend
from dplaunch.errors import ResourceError, UsageError
from dplaunch.identity import Identity
from dplaunch.inventory import Inventory, Node
from dplaunch.memory import DEVICE_SHARE, check_devices, check_host, kv_cache_bytes
from dplaunch.model_info import ModelInfo, read_model_of
from dplaunch.placement import Place, next_devices, placement_warnings
from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.planner import Facts, rank_spec, world_size
from dplaunch.rank_env import blocks
from dplaunch.spec import LaunchSpec
from dplaunch.threads import in_thread


async def plan_more(plan: LaunchPlan, dp: int, backend: Backend, environ: Mapping[str, str]) -> LaunchPlan:
    """The plan of a running group with `dp` ranks in all, from what the backend says is free.

    Args:
        plan: that of the ranks that run.
        dp: more ranks than those.
        backend: gives the inventory.
        environ: the launcher's environment, as it was at the launch.

    Raises:
        UsageError: when the user placed the ranks by hand.
        ResourceError: when there are too few devices or too little memory; carries the numbers.
    """
    if plan.spec.devices is not None:
        raise UsageError(
            f"cannot add ranks: the devices of these {len(plan.ranks)} were chosen by hand",
            hint="Launch without --devices; CUDA_VISIBLE_DEVICES, where it is set, limits what is used.",
        )
    inventory = await backend.inventory(plan.spec, dp - len(plan.ranks))
    # In a thread: its file may be on a slow disk, and requests are being served.
    model = await in_thread(lambda: read_model_of(plan.spec), "model-info")
    return extend(plan, dp, inventory, model, environ=environ)


def extend(
    plan: LaunchPlan, dp: int, inventory: Inventory, model: ModelInfo | None, *, environ: Mapping[str, str]
) -> LaunchPlan:
    """The same plan with `dp` ranks: the first ones as they are, the others on what those do not use.

    On a host without accelerators new ranks share cores when none is left, and a warning says so.

    Args:
        plan: that of the ranks that run.
        dp: more ranks than those.
        inventory: what there is; of a scheduler's nodes, what is free.
        model: what is known about the model; None for the built-in one.
        environ: the launcher's environment, from which the ranks' are made.

    Raises:
        ResourceError: when there are too few devices or too little memory; carries the numbers.
    """
    asked, running, device_type = Asked(plan.spec), len(plan.ranks), plan.ranks[0].device_type
    world = world_size(asked)
    if device_type == "cuda":
        new = next_devices(LaunchSpec(dp=dp - running), _unused_devices(inventory, plan.ranks), world, running)
    else:
        new = _more_cores(plan.ranks, inventory, dp - running)
    _check_memory(plan, asked, model, new, environ, world)
    nodes = {node.name: node for node in inventory.nodes}
    old = [Place(node=nodes.get(rank.node) or _lost(rank.node), cpus=rank.cpus) for rank in plan.ranks]
    facts = Facts(plan.spec, asked, model, environ, device_type, world, (*old, *new), plan.mode, plan.executor)
    warnings = [] if device_type == "cuda" else placement_warnings(facts.places, inventory, world)
    return replace(
        plan,
        ranks=(*plan.ranks, *(_new_rank(facts, rank, plan) for rank in range(running, dp))),
        warnings=(*plan.warnings, *(warning for warning in warnings if warning not in plan.warnings)),
    )


def shrink(plan: LaunchPlan, dp: int) -> LaunchPlan:
    """The plan with its first `dp` ranks only."""
    return replace(plan, ranks=plan.ranks[:dp])


def _new_rank(facts: Facts, rank: int, plan: LaunchPlan) -> RankSpec:
    # The only rank of a group keeps its plain name for as long as it lives; one that joins it never has one.
    return replace(rank_spec(facts, rank, plan.base_id, plan.log_dir), identity=Identity(plan.base_id, rank))


def _lost(name: str) -> Node:
    return Node(name=name, cores=(), memory_total=0, memory_free=0)


def _unused_devices(inventory: Inventory, ranks: Sequence[RankSpec]) -> Inventory:
    held = {(rank.node, device) for rank in ranks for device in rank.devices}

    def unused(node: Node) -> Node:
        names = ((node.name, device.id) for device in node.devices)
        return replace(
            node, devices=tuple(each for each, name in zip(node.devices, names, strict=True) if name not in held)
        )

    return replace(inventory, nodes=tuple(unused(node) for node in inventory.nodes))


def _more_cores(ranks: Sequence[RankSpec], inventory: Inventory, count: int) -> tuple[Place, ...]:
    """Cores that nobody uses, as long as there are any; then those that the fewest ranks use."""
    used = Counter((rank.node, core) for rank in ranks for core in rank.cpus)
    unused = {node.name: [core for core in node.cores if (node.name, core) not in used] for node in inventory.nodes}
    nodes = _nodes_of_more(ranks, inventory, unused, count)
    together = Counter(node.name for node in nodes)
    own = {
        name: list(blocks(cores, together[name])) if len(cores) >= together[name] > 0 else [(core,) for core in cores]
        for name, cores in unused.items()
    }
    places = []
    for node in nodes:
        cpus = own[node.name].pop(0) if own[node.name] else _least_used(node, used)
        used.update((node.name, core) for core in cpus)
        places.append(Place(node=node, cpus=cpus))
    return tuple(places)


def _least_used(node: Node, used: Counter[tuple[str, int]]) -> tuple[int, ...]:
    # A scheduler's node lists what it has free; cores that our own ranks hold are ours to share.
    cores = sorted({*node.cores, *(core for name, core in used if name == node.name)})
    # Without any core a rank is not bound: the user's placement group holds what it runs on.
    return (min(cores, key=lambda core: used[node.name, core]),) if cores else ()


def _nodes_of_more(
    ranks: Sequence[RankSpec], inventory: Inventory, unused: Mapping[str, Sequence[int]], count: int
) -> list[Node]:
    """Each next rank goes where most unused cores are left for it, or else where the fewest ranks share cores."""
    if inventory.placed:
        by_name = {node.name: node for node in inventory.nodes}
        return [by_name[name] for name in inventory.placed]
    cores: defaultdict[str, set[int]] = defaultdict(set)
    for rank in ranks:
        cores[rank.node].update(rank.cpus)
    for node in inventory.nodes:
        cores[node.name].update(node.cores)
    room = [node for node in inventory.nodes if cores[node.name]]
    if not room:
        raise ResourceError(
            f"no core is left for {count} more: there is none on {', '.join(node.name for node in inventory.nodes)}",
            hint="See who holds them, or add machines.",
        )
    here, more = Counter(rank.node for rank in ranks), Counter[str]()

    def worth(node: Node) -> tuple[float, float]:
        left = len(unused[node.name]) / (more[node.name] + 1)
        crowd = (here[node.name] + more[node.name]) / len(cores[node.name])
        return (left, 0.0) if left >= 1 else (0.0, -crowd)

    chosen = []
    for _ in range(count):
        chosen.append(max(room, key=worth))
        more[chosen[-1].name] += 1
    return chosen


def _check_memory(
    plan: LaunchPlan,
    asked: Asked,
    model: ModelInfo | None,
    new: Sequence[Place],
    environ: Mapping[str, str],
    world: int,
) -> None:
    defaults, first = plan.engine_defaults, len(plan.ranks)
    share = asked.fraction("gpu_memory_utilization")
    if plan.ranks[0].device_type == "cuda":
        check_devices(new, share=share or DEVICE_SHARE, first=first)
        return
    share = share or float(str(defaults.get("gpu_memory_utilization", DEVICE_SHARE)))
    kv_bytes = kv_cache_bytes(asked, {**environ, **plan.spec.env})
    if kv_bytes is None and "kv_cache_memory_bytes" in defaults:
        kv_bytes = int(str(defaults["kv_cache_memory_bytes"]))
    weights = model.weight_bytes or 0 if model is not None and asked.get("load_format") != "dummy" else 0
    here = Counter(rank.node for rank in plan.ranks)

    def left(node: Node) -> Node:
        # What running ranks may still take of their share looks free.
        each = share * node.memory_total * world if kv_bytes is None else kv_bytes * world + weights
        free = min(node.memory_free, int(node.memory_total - here[node.name] * each))
        return replace(node, memory_free=max(0, free))

    places = [replace(each, node=left(each.node)) for each in new]
    check_host(places, share=share, kv_bytes=kv_bytes, weights=weights, world=world, first=first)
