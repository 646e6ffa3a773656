"""Whether the ranks fit into memory, said before anything is loaded.

vLLM's `gpu_memory_utilization` is a share of the whole device for each worker process. On CPU it is a share of
the host's whole memory, of which stock vLLM takes 0.92 in every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dplaunch.asked import Asked
from dplaunch.errors import ResourceError, UsageError
from dplaunch.inventory import Inventory
from dplaunch.placement import Place

GIB = 2**30

DEVICE_SHARE = 0.92
"""What a worker takes of its device unless told otherwise: vLLM's own default."""

HOST_SHARE = 0.8
"""What all ranks of a CPU host take of its memory together, so that the rest of the machine goes on."""

FREE_SHARE = 0.9
"""What they take of the memory that is free, where that is less."""

LEAST_SHARE = 0.02
"""The smallest share that is given out: less holds no model."""

_HOST_HINT = "Change --gpu-memory-utilization (on CPU the share of host memory for each rank)"

KV_SPACE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def host_share(places: Sequence[Place], world: int) -> float:
    """The share of its host's memory for each worker on CPU, so that all of them fit."""
    shares = [HOST_SHARE]
    for node in {each.node.name: each.node for each in places}.values():
        workers = world * sum(each.node is node for each in places)
        free = FREE_SHARE * node.memory_free / node.memory_total if node.memory_total else HOST_SHARE
        shares.append(round(min(HOST_SHARE, free) / workers, 3))
    return max(LEAST_SHARE, min(shares))


def kv_cache_bytes(asked: Asked, env: Mapping[str, str]) -> int | None:
    """The size of a worker's KV cache on CPU where the user fixed one, bytes.

    Raises:
        UsageError: when the variable for it is no whole number.
    """
    space = env.get(KV_SPACE_VARIABLE, "")
    if not space:
        return asked.size("kv_cache_memory_bytes")
    if not space.isdecimal():
        raise UsageError(f"{KV_SPACE_VARIABLE} must be a whole number of GiB, not {space!r}")
    return int(space) * GIB


def check_host(
    places: Sequence[Place], *, share: float, kv_bytes: int | None, weights: int, world: int, first: int = 0
) -> None:
    """Checks that all ranks fit into the memory of their CPU hosts.

    Args:
        places: where the ranks are.
        share: what each worker takes of its host's memory, weights included, unless kv_bytes is set.
        kv_bytes: what each worker takes besides the weights; None for what its share leaves.
        weights: size of the model's weights, bytes; 0 when not known.
        world: workers of one rank.
        first: the number of the first rank.

    Raises:
        ResourceError: names the first rank that does not fit, what it wants and what is free.
    """
    taken: dict[str, float] = {}
    several = len({each.node.name for each in places}) > 1
    for index, each in enumerate(places):
        rank, total, before = first + index, each.node.memory_total, taken.get(each.node.name, 0.0)
        if not total:
            continue  # nobody could say what that host has
        where = f" on node {each.node.name}" if several else ""
        wanted = share * total * world if kv_bytes is None else kv_bytes * world + weights
        if weights > wanted:
            raise ResourceError(
                f"rank {rank} does not fit{where}: its weights are {_gib(weights)} GiB, and its share of host memory "
                f"is {_gib(wanted)} of {_gib(total)} GiB",
                hint=f"{_HOST_HINT}, or use fewer ranks.",
            )
        free = each.node.memory_free - before
        if wanted > free:
            raise ResourceError(
                f"rank {rank} does not fit{where}: it wants {_gib(wanted)} GiB of host memory, "
                f"{_gib(free)} GiB are free{_beside(index, places, first)}",
                hint=f"{_HOST_HINT}, or --kv-cache-memory-bytes, or use fewer ranks.",
            )
        taken[each.node.name] = before + wanted


def share_warnings(inventory: Inventory, asked: Asked) -> list[str]:
    """What the user should know about workers that hold a part of a device each."""
    sized = "gpu_memory_utilization" in asked or "kv_cache_memory_bytes" in asked
    if inventory.device_type != "cuda" or inventory.share >= 1 or sized:
        return []
    return [
        f"each worker holds {inventory.share:g} of a device, but takes {DEVICE_SHARE:g} of its memory: "
        "set --gpu-memory-utilization to what is left for it"
    ]


def check_devices(places: Sequence[Place], *, share: float, first: int = 0) -> None:
    """Checks that each rank fits into the free memory of its devices.

    Args:
        places: where the ranks are.
        share: what each worker takes of its device's memory.
        first: the number of the first rank.

    Raises:
        ResourceError: names the first rank that does not fit, the device, what it wants and what is free.
    """
    taken: dict[tuple[str, str], float] = {}
    for rank, each in enumerate(places, first):
        for device in each.devices:
            key = (each.node.name, device.id)
            wanted, before = share * device.memory_total, taken.get(key, 0.0)
            free = device.memory_free - before
            if wanted > free:
                raise ResourceError(
                    f"rank {rank} does not fit on device {device.id} ({device.name}): it wants {_gib(wanted)} GiB, "
                    f"{share:g} of {_gib(device.memory_total)}, and {_gib(free)} GiB are free",
                    hint="See with nvidia-smi who holds the rest, choose other --devices, or lower "
                    "--gpu-memory-utilization.",
                )
            taken[key] = before + wanted


def _beside(index: int, places: Sequence[Place], first: int) -> str:
    """Which ranks have taken of the same node's memory before this one."""
    others = [first + other for other in range(index) if places[other].node.name == places[index].node.name]
    if not others:
        return ""
    return f" beside rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
