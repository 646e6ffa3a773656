"""What a Ray cluster has: its nodes, asked one by one before anything is planned, let alone loaded."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dplaunch.asked import Asked
from dplaunch.errors import BackendError, UsageError
from dplaunch.inventory import Device, Node, local_node
from dplaunch.spec import LaunchSpec

from .probe import NodeGoneError, ask
from .whereabouts import whereabouts

NODE_LABEL = "ray.io/node-id"
"""The label by which Ray knows each node, for pinning a placement group to one."""

HOST_VARIABLES = ("VLLM_HOST_IP", "HOST_IP", "VLLM_NIXL_SIDE_CHANNEL_HOST")
"""Where the launcher has one of these, a rank elsewhere gets its own node's address."""


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """One node of the cluster.

    Args:
        id: Ray's own.
        name: for people: its address, with a part of the id where several nodes share one.
        address: its IP address.
        here: whether the launcher's own helper can make processes there: same host, same namespaces.
        node: what the plan sees.
        free: CPUs and GPUs that Ray has not given out.
    """

    id: str
    name: str
    address: str
    here: bool
    node: Node
    free: Mapping[str, float]

    def called(self, name: str) -> ClusterNode:
        """The same node by another name."""
        return replace(self, name=name, node=replace(self.node, name=name))


def free_of(node_id: str) -> Mapping[str, float]:
    """What Ray has not given out of a node."""
    return _free_resources().get(node_id, {})


async def survey(
    own_id: str,
    allowed: Sequence[str],
    paths: Sequence[str],
    *,
    whole: bool = False,
    lenient: bool = False,
    taken: Collection[tuple[str, int]] = (),
) -> list[ClusterNode]:
    """The living nodes that may be used, the launcher's own first.

    Args:
        own_id: the launcher's node.
        allowed: names or addresses; empty for all.
        paths: local paths that every node must have.
        whole: counts what Ray has given out as free: the ranks' places are among it.
        lenient: leaves out what is missing or cannot be used, where that would be an error.
        taken: cores that the group's own ranks have, each with Ray's id of its node.

    Raises:
        UsageError: when an allowed node is not in the cluster.
        BackendError: when a node lacks dplaunch, vLLM or a path, has other versions, or does not answer.
    """
    import ray

    alive = [each for each in ray.nodes() if each["Alive"]]
    chosen = _allowed(alive, allowed, lenient)
    chosen.sort(key=lambda each: each["NodeID"] != own_id)
    free = {} if whole else await asyncio.to_thread(_free_resources)
    names = _names(alive)
    others = [each["NodeID"] for each in chosen if each["NodeID"] != own_id]
    asked = await asyncio.gather(*(ask(id_, names[id_], paths) for id_ in others), return_exceptions=True)
    answers: dict[str, dict[str, Any]] = {}
    for id_, answer in zip(others, asked, strict=True):
        if not isinstance(answer, BaseException):
            answers[id_] = answer
        elif isinstance(answer, NodeGoneError):
            alive = [each for each in alive if each["NodeID"] != id_]
        elif not (lenient and isinstance(answer, BackendError)):
            raise answer
    chosen = [each for each in chosen if each["NodeID"] == own_id or each["NodeID"] in answers]
    names |= _names(alive)
    # Not this process's own CUDA_VISIBLE_DEVICES: in a task or an actor Ray hides what that did not ask for.
    here = await asyncio.to_thread(local_node, {}) if own_id in names else None
    return [
        _cluster_node(each, names, answers, here, free.get(each["NodeID"], each["Resources"]), taken) for each in chosen
    ]


def model_paths(spec: LaunchSpec) -> list[str]:
    """What of this machine's file system every node must have."""
    asked = Asked(spec)
    named = [spec.model, *(asked.get(name) for name in ("tokenizer", "hf_config_path"))]
    return [path for path in named if isinstance(path, str) and os.path.exists(os.path.expanduser(path))]


def are_free(nodes: Sequence[ClusterNode]) -> bool:
    """Whether these nodes, where they are still there, have free again what they had when they were surveyed."""
    free = _free_resources()
    known = [node for node in nodes if node.id in free]
    return all(free[node.id].get(kind, 0.0) >= count for node in known for kind, count in node.free.items())


def _allowed(alive: Sequence[dict[str, Any]], allowed: Sequence[str], lenient: bool) -> list[dict[str, Any]]:
    if not allowed:
        return list(alive)
    chosen = [each for each in alive if any(_is_named(each, name) for name in allowed)]
    unknown = [name for name in allowed if not any(_is_named(each, name) for each in alive)]
    if unknown and not lenient:
        there = ", ".join(sorted(each["NodeManagerAddress"] for each in alive))
        raise UsageError(f"node {unknown[0]} is not in the Ray cluster", hint=f"It has {there}.")
    return chosen


def _is_named(node: Mapping[str, Any], name: str) -> bool:
    known = (node["NodeManagerAddress"], node["NodeManagerHostname"], node.get("NodeName"), node["NodeID"])
    return name in known or name == _name(node, shared=True)


def _names(alive: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    shared = Counter(each["NodeManagerAddress"] for each in alive)
    return {each["NodeID"]: _name(each, shared[each["NodeManagerAddress"]] > 1) for each in alive}


def _name(node: Mapping[str, Any], shared: bool) -> str:
    address: str = node["NodeManagerAddress"]
    return f"{address}/{node['NodeID'][:6]}" if shared else address


def _free_resources() -> dict[str, dict[str, float]]:
    from ray._private import state

    found: dict[str, dict[str, float]] = state.available_resources_per_node()
    return found


def _cluster_node(
    facts: Mapping[str, Any],
    names: Mapping[str, str],
    answers: Mapping[str, Mapping[str, Any]],
    here: Node | None,
    free: Mapping[str, float],
    taken: Collection[tuple[str, int]],
) -> ClusterNode:
    id_, address = facts["NodeID"], facts["NodeManagerAddress"]
    answer = answers.get(id_)
    if answer is None:
        if here is None:
            raise BackendError(f"node {names[id_]} was not asked")
        found, is_here, env = here, True, {}
    else:
        found, is_here = _node(answer["node"]), answer["where"] == whereabouts()
        env = {} if is_here else {**answer["env"], **{name: address for name in HOST_VARIABLES if name in os.environ}}
    found = replace(found, cores=tuple(core for core in found.cores if (id_, core) not in taken))
    return ClusterNode(
        id=id_,
        name=names[id_],
        address=address,
        here=is_here,
        node=_as_ray_sees_it(found, names[id_], facts["Resources"], free, env),
        free={kind: float(free.get(kind, 0.0)) for kind in ("CPU", "GPU")},
    )


def _as_ray_sees_it(
    found: Node, name: str, total: Mapping[str, float], free: Mapping[str, float], env: Mapping[str, str]
) -> Node:
    """What the machine has, less what Ray has given to others."""
    cpus, gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
    known = int(total.get("GPU", 0.0))
    # Which devices Ray would give is not known; those with the most free memory are the likely ones.
    devices = sorted(found.devices, key=lambda device: -device.memory_free)[:known]
    # Part of a core is one that is shared.
    cores = found.cores[: max(1, int(cpus))] if cpus > 0 else ()
    return Node(
        name=name,
        cores=cores,
        memory_total=found.memory_total,
        memory_free=found.memory_free,
        devices=tuple(devices),
        free_devices=gpus,
        env=env,
        note=f"{cpus:g} of {total.get('CPU', 0.0):g} CPUs free in Ray",
    )


def _node(answer: Mapping[str, Any]) -> Node:
    devices = tuple(Device(**device) for device in answer["devices"])
    return Node(**{**answer, "devices": devices, "cores": tuple(answer["cores"])})
