"""The names of every rank on every path, as a table: unique, suffixed once with the global rank, never guessed.

What is checked comes from inside the ranks: what each says of itself when it is called.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from dplaunch.backends.mp import MpBackend

from dplaunch import life
from dplaunch.identity import base_of
from dplaunch.inventory import Inventory, local_node
from dplaunch.spec import LaunchSpec
from dplaunch.testing import StandInPlan, poll_until_async
from tests.contract.groups import Watched, group_spec
from tests.ray_for_tests import RayForTests

BASE, CONNECTOR = "table", "kv"

START_S = 60.0

EVENTS = ("start", "restart", "scale-up")


@dataclass(frozen=True)
class Cell:
    """One group: all that happens to it is one row for each of `EVENTS`."""

    backend: str
    dp: int
    connector: bool
    nodes: int

    def __str__(self) -> str:
        kv = "kv" if self.connector else "no kv"
        return f"{self.backend}-dp{self.dp}-{kv}-{self.nodes} node{'s' * (self.nodes > 1)}"


CELLS = [
    Cell(backend, dp, connector, nodes)
    # Those of two nodes beside each other: the second node is started once.
    for backend, nodes, dp, connector in itertools.product(("mp", "ray"), (1, 2), (1, 2, 3), (False, True))
]


class TwoHosts(MpBackend):  # type: ignore[misc]
    """mp has one host by nature; here the plan sees two, and all ranks are made on the one that there is.

    What it shows: whatever node a rank is planned for, its names come from its global number.
    """

    async def inventory(self, spec: LaunchSpec, more: int = 0) -> Inventory:
        node = local_node()
        return Inventory(nodes=(replace(node, name="first"), replace(node, name="second")))


Names = Mapping[int, Mapping[str, Any]]
"""For each rank what it said of itself."""


@dataclass(frozen=True)
class Record:
    """What the ranks of one group said, after each event of those that it is about."""

    names: Mapping[str, Names]
    nodes: Mapping[int, str]


async def record(cell: Cell, directory: Path) -> Record:
    """Launches the group, has its last rank die and come back, and adds a rank."""
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "engine_id": CONNECTOR}
    engine_args = {"kv_transfer_config": connector} if cell.connector else {}
    watched = Watched(
        group_spec(directory, cell.backend, StandInPlan(), cell.dp, base_id=BASE, engine_args=engine_args)
    )
    async with watched.group as group:
        ranks = group.supervisor.ranks
        names = {"start": {rank.identity.rank: rank.report for rank in ranks}}
        last = cell.dp - 1
        os.kill(ranks[last].report["pid"], signal.SIGKILL)
        await poll_until_async(lambda: ("ready", 1) in watched.states(last), START_S, "the rank's return")
        names["restart"] = {last: ranks[last].report}
        await group.scale(cell.dp + 1)
        names["scale-up"] = {cell.dp: group.supervisor.ranks[cell.dp].report}
        assert await group.call("echo", 1) == [1] * (cell.dp + 1)
        return Record(names, {rank.identity.rank: rank.spec.node for rank in group.supervisor.ranks})


_records: dict[Cell, Record] = {}


@pytest.fixture(scope="module")
def second_node(ray_cluster: RayForTests) -> Iterator[None]:
    with ray_cluster.second_node():
        yield


@pytest.fixture
async def recorded(
    cell: Cell, request: pytest.FixtureRequest, tmp_path: Path, vllm_imported: None, monkeypatch: pytest.MonkeyPatch
) -> Record:
    """The cell's record: one group for all its rows."""
    if cell.backend == "ray":
        pytest.importorskip("ray")
        request.getfixturevalue("second_node" if cell.nodes == 2 else "ray_cluster")
    elif cell.nodes == 2:
        monkeypatch.setattr(life, "load_backend", lambda name: TwoHosts())
    if cell not in _records:
        _records[cell] = await record(cell, tmp_path)
    return _records[cell]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("cell", CELLS, ids=str)
async def test_every_name_has_its_rank_once_and_its_base_within(cell: Cell, event: str, recorded: Record) -> None:
    names = recorded.names[event]
    assert set(names) == {"start": set(range(cell.dp)), "restart": {cell.dp - 1}, "scale-up": {cell.dp}}[event]
    life = "-r1" if event == "restart" else ""
    for rank, said in names.items():
        # The only rank of a group keeps its plain name; one that joins it later does not.
        suffix = "" if cell.dp == 1 and event != "scale-up" else f"_dp{rank}"
        assert said["instance_id"] == f"{BASE}{life}{suffix}"
        assert said["engine_id"] == (f"{CONNECTOR}{life}{suffix}" if cell.connector else None)
        assert base_of(said["instance_id"]) == BASE
        assert said["engine_id"] is None or base_of(said["engine_id"]) == CONNECTOR
        assert (said["data_parallel_index"], said["rank"]) == (rank, rank)
        assert said["process_title"] == f"dplaunch::{said['instance_id']}"


@pytest.mark.parametrize("cell", CELLS, ids=str)
async def test_no_two_ranks_or_incarnations_share_a_name(cell: Cell, recorded: Record) -> None:
    everyone = [said for names in recorded.names.values() for said in names.values()]
    assert len(everyone) == cell.dp + 2
    for field in ("instance_id", "process_title", *(["engine_id"] if cell.connector else [])):
        assert len({said[field] for said in everyone}) == len(everyone)
    # The scaled-up rank makes sure of the second node where one rank alone would not need it.
    assert len(set(recorded.nodes.values())) == cell.nodes
