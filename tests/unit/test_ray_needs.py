"""What a rank's place holds in the user's own placement groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from dplaunch.backends import cluster as connection
from dplaunch.backends import needs
from dplaunch.backends.needs import Need, check_devices, more_user_needs, node_of, plan_needs, user_needs
from dplaunch.backends.ray import RayBackend
from dplaunch.backends.survey import ClusterNode

from dplaunch.errors import BackendError, UsageError
from dplaunch.identity import Identity
from dplaunch.inventory import Inventory, Node
from dplaunch.plan import RankSpec
from dplaunch.spec import ClusterOptions, ExecutorKind, LaunchSpec
from tests.ray_for_tests import RayForTests
from tests.unit.conftest import MakeGroup


class Bundles:
    """As much of a placement group as is read before anything is started."""

    def __init__(self, *bundle_specs: dict[str, float]) -> None:
        self.bundle_specs = bundle_specs


def wanted(dp: int, *groups: Any, executor: ExecutorKind = ExecutorKind.MP, **options: Any) -> dict[int, Need]:
    cluster = ClusterOptions(placement_groups=groups, **options)
    found: dict[int, Need] = user_needs(LaunchSpec(dp=dp, cluster=cluster, executor=executor))
    return found


# The user's own placement groups.

GPU = {"GPU": 1.0}


def test_a_group_for_each_rank_is_that_ranks_as_a_whole() -> None:
    first, second = Bundles({"CPU": 1}, GPU), Bundles(GPU, GPU)
    found = wanted(2, first, second)
    assert [found[rank].group for rank in (0, 1)] == [first, second]
    assert [found[rank].bundles for rank in (0, 1)] == [(0, 1), (0, 1)]
    assert [found[rank].gpus for rank in (0, 1)] == [1, 2]


def test_a_group_for_all_ranks_is_divided_in_order_or_as_the_user_says() -> None:
    shared = Bundles(*[GPU] * 5)
    assert [need.bundles for need in wanted(2, shared).values()] == [(0, 1), (2, 3)]
    chosen = wanted(2, shared, bundle_indices=((4, 1), (0,)))
    assert [need.bundles for need in chosen.values()] == [(4, 1), (0,)]


def test_too_few_bundles_are_refused_with_the_numbers() -> None:
    with pytest.raises(UsageError, match="the placement group has 1 bundles for 2 ranks"):
        wanted(2, Bundles(GPU))
    with pytest.raises(UsageError, match=r"rank 1 was given bundles \[2\], its placement group has 2") as caught:
        wanted(2, Bundles(GPU, GPU), bundle_indices=((0,), (2,)))
    assert "from 0" in caught.value.hint


def test_devices_of_a_bundle_count_whole_and_a_part_of_one_counts_as_one() -> None:
    assert wanted(1, Bundles({"GPU": 2.0}, GPU))[0].gpus == 3
    assert wanted(1, Bundles({"GPU": 0.5}, {"CPU": 1}))[0].gpus == 1


def more(count: int, dp: int, *groups: Any, **options: Any) -> dict[int, Need]:
    """What ranks hold that join `dp` of them."""
    held = wanted(dp, *groups, **options)
    spec = LaunchSpec(dp=dp, cluster=ClusterOptions(placement_groups=groups, **options))
    found: dict[int, Need] = more_user_needs(spec, held, count)
    return found


def test_ranks_that_join_get_the_bundles_of_a_group_for_all_that_nobody_has() -> None:
    shared = Bundles(*[GPU] * 6)
    joined = more(2, 2, shared, bundle_indices=((4,), (0,)))
    assert {rank: need.bundles for rank, need in joined.items()} == {2: (1,), 3: (2,)}
    assert [(need.group, need.gpus) for need in joined.values()] == [(shared, 1)] * 2


def test_ranks_that_find_no_bundle_in_the_users_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="has 3 bundles, 1 of them unused: 2 more ranks need 2"):
        more(2, 2, Bundles(*[GPU] * 3), bundle_indices=((0,), (1,)))
    with pytest.raises(UsageError, match="each of the 2 has a placement group of its own"):
        more(1, 2, Bundles(GPU), Bundles(GPU))


def test_a_rank_that_joins_where_its_group_has_all_cpus_takes_none(tmp_path: Path) -> None:
    node = ClusterNode(
        id="n",
        name="a",
        address="a",
        here=True,
        node=Node(name="a", cores=(), memory_total=1, memory_free=1),
        free={"CPU": 0.0, "GPU": 0.0},
    )
    rank = RankSpec(
        identity=Identity("base", 2),
        node="a",
        device_type="cpu",
        devices=("0",),
        env={},
        cpus=(0,),
        log_file=tmp_path / "log",
    )
    need = plan_needs([rank], {"a": node}, 1.0)[2]
    assert (need.cpus, need.shapes()) == (0.0, [{"memory": 1.0}])
    assert need.fits(node)


def test_bundles_with_other_than_the_ranks_devices_are_refused(tmp_path: Path) -> None:
    rank = RankSpec(
        identity=Identity("base", 0),
        node="a",
        device_type="cuda",
        devices=("any", "any"),
        env={},
        cpus=(),
        log_file=tmp_path / "log",
    )
    check_devices([rank], wanted(1, Bundles(GPU, GPU)))
    with pytest.raises(UsageError, match="rank 0 needs 2 devices, its bundles hold 1"):
        check_devices([rank], wanted(1, Bundles(GPU, {"CPU": 1})))


def test_a_nested_executor_is_seen_in_either_of_its_names() -> None:
    options = ClusterOptions(placement_groups=(Bundles(GPU),))
    for spec in (
        LaunchSpec(cluster=options, executor=ExecutorKind.RAY),
        LaunchSpec(cluster=options, vllm_argv=("--distributed-executor-backend", "ray")),
    ):
        assert user_needs(spec)[0].nested
    assert not user_needs(LaunchSpec(cluster=options))[0].nested


async def test_bundles_of_a_rank_on_two_nodes_are_refused_unless_its_own_executor_spans_them(
    own_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    group = own_group({"CPU": 1}, {"CPU": 1})
    (here,) = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert await node_of(Need(group=group, bundles=(0, 1))) == here
    table = {"bundles_to_node_id": {0: "n0", 1: "n1"}}
    monkeypatch.setattr(ray.util, "placement_group_table", lambda group: table)
    with pytest.raises(UsageError, match=r"a rank's bundles \[0, 1\] are on 2 nodes") as caught:
        await node_of(Need(group=group, bundles=(0, 1)))
    assert "STRICT_PACK" in caught.value.hint
    assert await node_of(Need(group=group, bundles=(1,))) == "n1"
    assert await node_of(Need(group=group, bundles=(1, 0), nested=True)) == "n1"


async def test_a_group_that_never_gets_its_place_is_named(
    own_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "PLACE_TIMEOUT_S", 0.5)
    group = own_group({"CPU": 100})
    with pytest.raises(BackendError, match=f"placement group {group.id.hex()[:8]} was not ready after"):
        await node_of(Need(group=group, bundles=(0,)))


async def test_a_spec_that_names_another_clusters_groups_is_refused_where_there_is_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "is_connected", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options = ClusterOptions(placement_groups=(Bundles(GPU),))
    with pytest.raises(UsageError, match="not connected to"):
        await RayBackend().inventory(LaunchSpec(cluster=options))


async def test_the_inventory_names_the_node_of_each_of_the_users_groups(
    own_group: MakeGroup, cluster: RayForTests
) -> None:
    backend = RayBackend()
    options = ClusterOptions(placement_groups=(own_group({"CPU": 1}), own_group({"CPU": 1})))
    try:
        found: Inventory = await backend.inventory(LaunchSpec(dp=2, cluster=options))
        assert found.placed == (found.nodes[0].name,) * 2
    finally:
        await backend.close()
