"""The `ray` backend: ranks are held by Ray actors, on one machine or many.

Each rank has a seat: a placement group that holds its devices and an actor in it (`seat`). Its process is forked
beside the actor by a helper that has imported vLLM already: on the launcher's own host the one that the mp backend
uses, on every other node that of an agent (`agent`). Actor and process end together.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dplaunch.backend import RankBoot
from dplaunch.errors import BackendError, UsageError
from dplaunch.inventory import Inventory, local_node
from dplaunch.plan import RankSpec
from dplaunch.spec import LaunchSpec

from . import cluster, nodes, survey
from .agent import Agent, AgentLostError
from .attachment import Attachment
from .cluster import Cluster, LocalSize
from .mp import DEFAULT_PRELOAD, MpBackend
from .needs import Need, check_devices, more_user_needs, node_of, plan_needs, user_needs
from .ray_rank import Process, RayRank
from .seat import Seat
from .seats import Seats
from .survey import ClusterNode

SCHEDULER = "Ray"


class RayBackend:
    """Makes ranks in a Ray cluster.

    Args:
        preload: "module:function" that helpers call once, to import what every rank needs.
        fork_here: whether ranks on the launcher's own host are forked by its own helper; False is for tests.

    Raises:
        BackendError: when Ray is not installed.
    """

    def __init__(self, preload: str = DEFAULT_PRELOAD, *, fork_here: bool = True) -> None:
        if importlib.util.find_spec("ray") is None:
            raise BackendError("Ray is not installed", hint="pip install 'dplaunch[ray]'")
        self._preload = preload
        self._fork_here = fork_here
        self._local = MpBackend(preload)
        self._attachment = Attachment()
        self._nodes: dict[str, ClusterNode] = {}
        self._seats = Seats()
        self._planned: dict[int, RankSpec] = {}
        self._free_before: list[ClusterNode] = []
        self._agents: dict[str, Agent] = {}
        self._ranks: list[RayRank] = []
        self._spec = LaunchSpec()
        self._env: Mapping[str, str] = {}
        self._size = LocalSize(0, 0)
        self._starting: asyncio.Task[None] | None = None

    async def inventory(self, spec: LaunchSpec, more: int = 0) -> Inventory:
        """As the protocol says. Attaches to the cluster where there is one to attach to; starts none.

        Raises:
            BackendError: when there is no such cluster, or a node of it cannot be used.
        """
        options = spec.cluster
        if more:
            await self._ready()
        address = cluster.wanted_address(options.address)
        if not more and address is None and not cluster.is_connected():
            return await self._alone(spec)
        await self._attachment.attach(address, self._size)
        looked = await self._look(options.nodes, survey.model_paths(spec), whole=bool(options.placement_groups))
        placed = await self._placed(spec, more) if options.placement_groups else None
        # Of a group that runs, nodes are known that are lost by now.
        found = tuple(each.node for each in looked)
        if not found:
            raise BackendError("the Ray cluster has no node that is alive", hint="See `ray status`.")
        return Inventory(nodes=found, placed=placed, scheduler=SCHEDULER, share=options.num_gpus)

    async def open(self, spec: LaunchSpec, env: Mapping[str, str], ranks: Sequence[RankSpec] = ()) -> None:
        self._spec, self._env = spec, env
        await self._local.open(spec, env)
        self._starting = asyncio.create_task(self._start(ranks))

    async def address(self) -> str | None:
        return (await self._ready()).address

    async def call(self, function: str, payload: bytes) -> bytes:
        return await self._local.call(function, payload)

    async def spawn(self, boot: RankBoot) -> RayRank:
        """As the protocol says.

        Raises:
            BackendError: when Ray has no place for it, or its process cannot be made.
        """
        connection = await self._ready()
        seating = await self._seat(boot)
        ahead = await self._fork_ahead(boot)
        try:
            taken = await asyncio.shield(seating)
            node = await self._node_of(taken)
        except BaseException:
            if ahead is not None:
                ahead.kill()
            raise
        process = ahead or await self._fork(self._shaped(boot, taken, node, connection), taken, node)
        self._ranks = [rank for rank in self._ranks if rank.poll() is None]
        rank = RayRank(process, taken, node.name, functools.partial(nodes.is_alive, node.id))
        self._ranks.append(rank)
        return rank

    async def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await asyncio.gather(*(rank.wait() for rank in self._ranks), return_exceptions=True)
        seats = len(self._seats)
        await self._seats.close()
        await asyncio.gather(*(agent.close() for agent in self._agents.values()), return_exceptions=True)
        await self._local.close()
        connection = await self._attachment.settle()
        if seats and connection is not None and not connection.ours:
            await nodes.free_again(self._free_before)
        await self._attachment.give_up()
        self._agents.clear()

    # The cluster.

    async def _alone(self, spec: LaunchSpec) -> Inventory:
        """What a cluster of this machine alone would have."""
        if spec.cluster.placement_groups:
            raise UsageError(
                "placement_groups are of a Ray cluster that this process is not connected to",
                hint="Call ray.init() first, as for making them.",
            )
        node = await asyncio.to_thread(local_node)
        if spec.cluster.nodes and node.name not in spec.cluster.nodes:
            raise UsageError(
                f"node {spec.cluster.nodes[0]} is not this machine, and no Ray cluster was named",
                hint="Name one with --ray-address.",
            )
        self._size = LocalSize(len(node.cores), len(node.devices))
        return Inventory(nodes=(node,), scheduler=SCHEDULER, share=spec.cluster.num_gpus)

    async def _look(
        self, allowed: Sequence[str], paths: Sequence[str], *, whole: bool = False, lenient: bool = False
    ) -> list[ClusterNode]:
        """Surveys the cluster; nodes that were known before stay known."""
        if (connection := self._attachment.cluster) is None:
            return []
        taken = {(self._nodes[rank.node].id, core) for rank in self._planned.values() for core in rank.cpus}
        found = await survey.survey(connection.node_id, allowed, paths, whole=whole, lenient=lenient, taken=taken)
        names = {each.id: name for name, each in self._nodes.items()}
        found = [each.called(names.get(each.id, each.name)) for each in found]
        if not self._planned:
            self._free_before = found
        self._nodes |= {each.name: each for each in found}
        return found

    async def _placed(self, spec: LaunchSpec, more: int) -> tuple[str, ...]:
        """The node of each rank, or of each further one, in the user's own placement groups."""
        found = more_user_needs(spec, self._seats.needs, more) if more else user_needs(spec)
        if not more:
            self._seats.needs = found
        names = {each.id: each.name for each in self._nodes.values()}
        return tuple([names[await node_of(need)] for _, need in sorted(found.items())])

    async def _start(self, ranks: Sequence[RankSpec]) -> None:
        if self._size.cpus == 0:
            self._size = LocalSize(len(os.sched_getaffinity(0)), 0)
        await self._attachment.attach(cluster.wanted_address(self._spec.cluster.address), self._size)
        if not self._nodes:
            await self._look(self._spec.cluster.nodes, ())
            self._rename(ranks)
        self._seat_all(ranks, self._seats.needs)

    async def reserve(self, ranks: Sequence[RankSpec]) -> None:
        """As the protocol says.

        Raises:
            UsageError: when the user's own placement groups have no room for them.
        """
        await self._ready()
        own = self._spec.cluster.placement_groups
        self._seat_all(ranks, more_user_needs(self._spec, self._seats.needs, len(ranks)) if own else {})

    async def release(self, rank: int) -> None:
        self._planned.pop(rank, None)
        await self._seats.release(rank)

    def _seat_all(self, ranks: Sequence[RankSpec], needs: Mapping[int, Need]) -> None:
        for node in {rank.node for rank in ranks}:
            if not self._forks_here(self._nodes[node]):
                self._agent(self._nodes[node])
        if needs:
            check_devices(ranks, needs)
        self._seats.needs |= needs or plan_needs(ranks, self._nodes, self._spec.cluster.num_gpus)
        for rank in ranks:
            self._planned[rank.identity.rank] = rank
            self._seats.take(rank.identity.rank, rank.identity.instance_id, self._nodes[rank.node].id)

    def _rename(self, ranks: Sequence[RankSpec]) -> None:
        # A cluster of our own is made after the plan, which calls its only node by the machine's name.
        if ranks and ranks[0].node not in self._nodes and len(self._nodes) == 1:
            (only,) = self._nodes.values()
            self._nodes = {ranks[0].node: only.called(ranks[0].node)}

    async def _ready(self) -> Cluster:
        if self._starting is None:
            raise BackendError("the ray backend is not open", hint="Await open() first, and nothing after close().")
        await asyncio.shield(self._starting)
        if self._attachment.cluster is None:
            raise BackendError("the ray backend is closed")
        return self._attachment.cluster

    # One rank.

    async def _seat(self, boot: RankBoot) -> asyncio.Task[Seat]:
        """The rank's seat: the one it has, or a new one where the old one was lost or never was."""
        seating = self._seats.get(boot.rank)
        return seating or self._seats.take(boot.rank, boot.instance_id, await self._node_for(boot))

    async def _fork_ahead(self, boot: RankBoot) -> Process | None:
        """The rank's process before its actor is there, where nothing that Ray has yet to say is needed for it.

        An actor is a Python process that imports Ray, and a rank that loads meanwhile is ready that much sooner.
        """
        node, need = self._nodes.get(boot.node), self._seats.needs.get(boot.rank)
        if node is None or need is None or not self._forks_here(node) or need.gpus or need.group is not None:
            return None
        return await self._local.spawn(boot) if await nodes.is_alive(node.id) else None

    async def _node_for(self, boot: RankBoot) -> str | None:
        """The planned node while it lives, or else one with room for the rank."""
        if boot.node == "":
            return None
        planned = self._nodes.get(boot.node)
        if planned is not None and await nodes.answers(planned):
            return planned.id
        found = await self._look(self._spec.cluster.nodes, survey.model_paths(self._spec), lenient=True)
        need = self._seats.need(boot.rank)
        room = [each for each in found if need.fits(each)]
        if not room:
            there = "; ".join(f"{each.name}: {each.node.note}" for each in found)
            raise BackendError(
                f"node {boot.node} was lost, and no other has room for rank {boot.rank}, which wants {need}",
                hint=f"There is {there}." if there else "No node is left.",
            )
        return max(room, key=lambda each: (each.free["GPU"], each.free["CPU"])).id

    async def _node_of(self, taken: Seat) -> ClusterNode:
        for _ in range(2):
            for each in self._nodes.values():
                if each.id == taken.sight.node_id:
                    return each
            await self._look((), (), lenient=True)
        raise BackendError(f"Ray placed {taken.name} on a node that it does not list")

    def _shaped(self, boot: RankBoot, taken: Seat, node: ClusterNode, connection: Cluster) -> RankBoot:
        """The boot with what only Ray could say: which devices, and where a nested executor finds its bundles."""
        env = taken.completed(boot.env, self._seats.need(boot.rank), connection.gcs_address)
        elsewhere = boot.node != "" and node.name != boot.node
        # The planned cores are those of another machine.
        return replace(boot, env=env, cpus=() if elsewhere else boot.cpus)

    async def _fork(self, boot: RankBoot, taken: Seat, node: ClusterNode) -> Process:
        if self._forks_here(node):
            return await self._local.spawn(boot, (taken.sight.pid,))
        try:
            return await self._agent(node).spawn(boot, taken.sight.pid)
        except AgentLostError:
            # The node may have lost its agent alone, and then takes another.
            self._agents.pop(node.id, None)
            return await self._agent(node).spawn(boot, taken.sight.pid)

    def _forks_here(self, node: ClusterNode) -> bool:
        return node.here and self._fork_here

    def _agent(self, node: ClusterNode) -> Agent:
        agent = self._agents.get(node.id)
        if agent is None:
            agent = self._agents[node.id] = Agent(node.id, self._preload)
            agent.open(str(self._spec.start_method), {**self._env, **node.node.env}, builtin=self._spec.model is None)
        return agent
