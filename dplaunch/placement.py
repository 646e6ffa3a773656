"""Which devices or cores each rank gets. Where there is no accelerator, cores are the devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dplaunch.errors import ResourceError, UsageError
from dplaunch.inventory import Device, Inventory, Node, find_device
from dplaunch.plan import ANY_DEVICE
from dplaunch.rank_env import blocks
from dplaunch.spec import LaunchSpec

_MASK_HINT = "CUDA_VISIBLE_DEVICES, where it is set, limits what is used."

NAMED_NODES = 8
"""How many nodes a refusal names: more do not fit into a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one rank runs.

    Args:
        node: its host.
        devices: its accelerators, in the order of its workers; empty on a CPU host.
        cpus: its cores; empty where accelerators are the devices.
        scheduled: how many of its node's accelerators it will get, where a scheduler chooses which.
    """

    node: Node
    devices: tuple[Device, ...] = ()
    cpus: tuple[int, ...] = ()
    scheduled: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Its devices' indices, `ANY_DEVICE` for each that is chosen later, or its cores' numbers."""
        if self.scheduled:
            return (ANY_DEVICE,) * self.scheduled
        return tuple(device.id for device in self.devices) or tuple(map(str, self.cpus))


def place(spec: LaunchSpec, inventory: Inventory, world: int) -> tuple[Place, ...]:
    """A place for each rank, in rank order.

    Args:
        spec: how many ranks, and their devices where the user chose them.
        inventory: what there is.
        world: devices that one rank needs.

    Raises:
        ResourceError: when there are too few devices, or no core; names what is missing on which node.
        UsageError: when the devices that the user chose do not fit the ranks, or are not the user's to choose.
    """
    if spec.devices and inventory.scheduler:
        raise UsageError(
            f"devices (--devices) cannot be chosen here: {inventory.scheduler} gives them out",
            hint="Leave it out; --nodes says which machines may be used.",
        )
    if inventory.device_type == "cuda":
        return _chosen_devices(spec, inventory, world) if spec.devices else next_devices(spec, inventory, world)
    return _chosen_cores(spec, inventory) if spec.devices else _even_cores(spec, inventory)


def placement_warnings(places: Sequence[Place], inventory: Inventory, world: int) -> list[str]:
    """What the user should know about how the ranks share devices or cores."""
    if inventory.device_type == "cuda":
        return _shared_device_warnings(places)
    warnings = []
    for node in inventory.nodes:
        here = [(rank, each) for rank, each in enumerate(places) if each.node is node]
        cores = {core for _, each in here for core in each.cpus}
        if sum(len(each.cpus) for _, each in here) > len(cores):
            warnings.append(
                f"{len(here)} ranks share {_count(len(cores), 'core')} of {node.name}: each is slower than "
                "with a core of its own"
            )
    for rank, each in enumerate(places):
        if 0 < len(each.cpus) < world:
            warnings.append(f"rank {rank} has {world} workers on {_count(len(each.cpus), 'core')}: they take turns")
    return warnings


def _placed_nodes(inventory: Inventory) -> list[Node]:
    """The node of each rank, where that was decided before the plan; none where the plan decides."""
    nodes = {node.name: node for node in inventory.nodes}
    for rank, name in enumerate(inventory.placed or ()):
        if name not in nodes:
            raise ResourceError(
                f"rank {rank} is placed on node {name}, which is not one of those that may be used: {', '.join(nodes)}",
                hint="Name it with --nodes too, or use another placement group.",
            )
    return [nodes[name] for name in inventory.placed or ()]


def next_devices(spec: LaunchSpec, inventory: Inventory, world: int, running: int = 0) -> tuple[Place, ...]:
    """Devices in order, node by node; a rank never spans two nodes.

    Args:
        spec: how many ranks.
        inventory: what there is.
        world: devices that one rank needs.
        running: ranks that run already, whose devices are not among these.

    Raises:
        ResourceError: when there are too few; names what is missing on which node.
    """
    placed = _placed_nodes(inventory)
    if placed and inventory.scheduler:
        # The user's placement groups hold the devices already: they are not among the free ones.
        return tuple(Place(node=node, scheduled=world) for node in placed)
    rooms = {node.name: _rooms(node, inventory, world) for node in inventory.nodes}
    if placed:
        return tuple(_next_room(rank, node, rooms[node.name], world) for rank, node in enumerate(placed, running))
    places = [room for node in inventory.nodes for room in rooms[node.name]]
    if len(places) < spec.dp:
        _refuse_too_few(spec, inventory, world, len(places), running)
    return tuple(places[: spec.dp])


def _next_room(rank: int, node: Node, rooms: list[Place], world: int) -> Place:
    if not rooms:
        raise ResourceError(
            f"rank {rank} is placed on node {node.name} and needs {_count(world, 'device')} there, but none is left: "
            f"{_free_devices([node])} for all ranks",
            hint="Place it elsewhere, or use fewer ranks.",
        )
    return rooms.pop(0)


def _rooms(node: Node, inventory: Inventory, world: int) -> list[Place]:
    """The places for ranks on one node; where devices are shared, each is used once before any is used again."""
    if len(node.devices) < world:
        return []
    # The margin is for shares such as 1/3, which three times over may come out just above 1.
    in_a_device, free = (int(amount / inventory.share + 1e-9) for amount in (1, _free(node)))
    slots = (node.devices * in_a_device)[:free]
    starts = range(0, len(slots) - world + 1, world)
    if inventory.scheduler:
        return [Place(node=node, scheduled=world) for _ in starts]
    return [Place(node=node, devices=slots[start : start + world]) for start in starts]


def _refuse_too_few(spec: LaunchSpec, inventory: Inventory, world: int, room: int, running: int) -> None:
    nodes, scheduler, share = inventory.nodes, inventory.scheduler, inventory.share
    total, needed = sum(_free(node) for node in nodes), spec.dp * world * share
    wanted = f"dp={spec.dp}" if not running else f"{_count(spec.dp, 'more rank')} beside {running}"
    if world > 1:
        wanted += f" with {world} devices a rank"
    if share < 1:
        wanted += f" at num_gpus={share:g}"
    where = "this machine has" if len(nodes) == 1 else f"these {len(nodes)} machines have"
    message = f"{wanted} {'need' if running and spec.dp > 1 else 'needs'} {_count(needed, 'device')}, "
    message += f"{scheduler} has {total:g} free" if scheduler else f"{where} {total:g}{' free' if running else ''}"
    if total >= needed:
        whole = "a rank does not span machines" if world > 1 else "a worker does not span devices"
        message += f", with room for {_count(room, 'rank')} ({whole})"
    if scheduler or len(nodes) > 1:
        message += f": {_free_devices(nodes)}"
    hint = (
        f"Use --dp {running + room}." if room else "Use a smaller --tensor-parallel-size or --pipeline-parallel-size."
    )
    limit = f"See who holds the rest in {scheduler}, or add machines." if scheduler else _MASK_HINT
    raise ResourceError(message, hint=f"{hint} {limit}" if world > 1 or room else limit)


def _free(node: Node) -> float:
    return len(node.devices) if node.free_devices is None else node.free_devices


def _free_devices(nodes: Sequence[Node]) -> str:
    """ "node a has 1 free device, b has 0"."""
    first, *rest = nodes
    facts = [f"node {first.name} has {first.note or _count(_free(first), 'free device')}"]
    facts += [f"{node.name} has {node.note or format(_free(node), 'g')}" for node in rest[: NAMED_NODES - 1]]
    return _shortened(facts, len(nodes))


def _free_cores(nodes: Sequence[Node]) -> str:
    """ "node a has 0 of 2 CPUs free in Ray, b has no free core"."""
    facts = [f"{node.name} has {node.note or 'no free core'}" for node in nodes[:NAMED_NODES]]
    return f"node {_shortened(facts, len(nodes))}"


def _shortened(facts: Sequence[str], nodes: int) -> str:
    left = nodes - len(facts)
    return ", ".join(facts) + (f", and {left} more" if left else "")


def _chosen_devices(spec: LaunchSpec, inventory: Inventory, world: int) -> tuple[Place, ...]:
    placed = _placed_nodes(inventory)
    return tuple(
        _chosen_place(rank, names, placed[rank : rank + 1] or inventory.nodes, world)
        for rank, names in enumerate(spec.devices or ())
    )


def _chosen_place(rank: int, names: Sequence[str], nodes: Sequence[Node], world: int) -> Place:
    if len(names) != world:
        raise UsageError(
            f"rank {rank} was given {_count(len(names), 'device')} ({', '.join(names)}), but needs {world}",
            hint="tensor-parallel-size times pipeline-parallel-size is what a rank needs.",
        )
    if len(set(names)) != len(names):
        raise UsageError(f"rank {rank} was given the same device twice ({', '.join(names)})")
    for node in nodes:
        found = [find_device(node.devices, name) for name in names]
        devices = tuple(device for device in found if device is not None)
        if len(devices) == world:
            return Place(node=node, devices=devices)
    there = {node.name: ", ".join(device.id for device in node.devices) or "none" for node in nodes}
    where = f"this machine has {there[nodes[0].name]}"
    if len(there) > 1:
        where = "; ".join(f"node {name} has {devices}" for name, devices in there.items())
    raise ResourceError(f"rank {rank} was given device {', '.join(names)}, {where}", hint=_MASK_HINT)


def _even_cores(spec: LaunchSpec, inventory: Inventory) -> tuple[Place, ...]:
    nodes = _nodes_of_ranks(spec, inventory)
    ranks = Counter(node.name for node in nodes)
    shares = {node.name: _core_shares(node.cores, ranks[node.name]) for node in inventory.nodes}
    return tuple(Place(node=node, cpus=next(shares[node.name])) for node in nodes)


def _core_shares(cores: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    if count > len(cores):
        # Without any core a rank is not bound: the user's placement group holds what it runs on.
        yield from ((cores[index % len(cores)],) if cores else () for index in range(count))
    elif count:
        yield from blocks(cores, count)


def _nodes_of_ranks(spec: LaunchSpec, inventory: Inventory) -> list[Node]:
    placed = _placed_nodes(inventory)
    if placed:
        return placed
    if not any(node.cores for node in inventory.nodes):
        raise ResourceError(
            f"dp={spec.dp} finds no core to run on: {_free_cores(inventory.nodes)}",
            hint="See who holds them, or add machines.",
        )
    ranks = _ranks_per_node(spec.dp, inventory.nodes)
    return [node for node, count in zip(inventory.nodes, ranks, strict=True) for _ in range(count)]


def _ranks_per_node(ranks: int, nodes: Sequence[Node]) -> list[int]:
    """Each next rank goes where it finds the most cores; a node without any takes none."""
    counts = [0] * len(nodes)
    for _ in range(ranks):
        best = max(range(len(nodes)), key=lambda index: len(nodes[index].cores) / (counts[index] + 1))
        counts[best] += 1
    return counts


def _chosen_cores(spec: LaunchSpec, inventory: Inventory) -> tuple[Place, ...]:
    placed = _placed_nodes(inventory) or [_only_node(inventory)] * spec.dp
    places = []
    for rank, names in enumerate(spec.devices or ()):
        if not names or not all(name.isdecimal() for name in names):
            raise UsageError(
                f"rank {rank} was given {', '.join(names) or 'nothing'}, but devices are cores here",
                hint='Name cores by their numbers, as in --devices "0,1;2,3".',
            )
        node = placed[rank]
        missing = [name for name in names if int(name) not in node.cores]
        if missing:
            there = ", ".join(map(str, node.cores))
            raise ResourceError(
                f"rank {rank} was given core {', '.join(missing)}, this process may use {there}",
                hint="Leave --devices out to have the cores split evenly.",
            )
        places.append(Place(node=node, cpus=tuple(int(name) for name in names)))
    return tuple(places)


def _only_node(inventory: Inventory) -> Node:
    if len(inventory.nodes) > 1:
        raise UsageError(
            f"devices (--devices) cannot name cores of {len(inventory.nodes)} machines: each has the same numbers",
            hint="Leave it out to have the cores split evenly.",
        )
    return inventory.nodes[0]


def _shared_device_warnings(places: Sequence[Place]) -> list[str]:
    used = Counter((each.node.name, device.id) for each in places for device in each.devices)
    return [
        f"{count} ranks share device {device} of {node}: each needs its own share of --gpu-memory-utilization"
        for (node, device), count in used.items()
        if count > 1
    ]


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
