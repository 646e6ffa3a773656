"""Where ranks go that join a running group; those that run stay where they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dplaunch.errors import ResourceError, UsageError
from dplaunch.extend import extend, plan_more, shrink
from dplaunch.inventory import Inventory, Node
from dplaunch.plan import LaunchPlan
from tests.unit.test_planner import DENSE, cpu, gpu, plan_for


def more(plan: LaunchPlan, dp: int, *nodes: Node, **facts: Any) -> LaunchPlan:
    return extend(plan, dp, Inventory(nodes=nodes, **facts), DENSE, environ={"PATH": "/bin"})


KV = "--kv-cache-memory-bytes 1G"


def test_new_ranks_get_devices_that_nobody_has_and_the_others_keep_theirs() -> None:
    plan = plan_for(gpu(), dp=2, argv="-tp 2", base_id="g")
    grown = more(plan, 4, gpu())
    assert grown.ranks[:2] == plan.ranks
    assert [rank.devices for rank in grown.ranks[2:]] == [("4", "5"), ("6", "7")]
    assert [rank.env["CUDA_VISIBLE_DEVICES"] for rank in grown.ranks[2:]] == ["4,5", "6,7"]
    assert [rank.identity.instance_id for rank in grown.ranks] == ["g_dp0", "g_dp1", "g_dp2", "g_dp3"]
    assert [rank.log_file.name for rank in grown.ranks[2:]] == ["rank2.log", "rank3.log"]


def test_devices_of_ranks_that_left_are_given_out_again() -> None:
    plan = shrink(plan_for(gpu(4), dp=4), 2)
    assert [rank.devices for rank in more(plan, 4, gpu(4)).ranks] == [("0",), ("1",), ("2",), ("3",)]


def test_too_few_devices_are_refused_with_what_is_free() -> None:
    plan = plan_for(gpu(4), dp=2)
    with pytest.raises(ResourceError, match="4 more ranks beside 2 need 4 devices, this machine has 2 free") as caught:
        more(plan, 6, gpu(4))
    assert "--dp 4" in caught.value.hint
    with pytest.raises(ResourceError, match="1 more rank beside 4 needs 1 device, this machine has 0 free"):
        more(plan_for(gpu(4), dp=4), 5, gpu(4))


def test_a_device_that_somebody_else_fills_is_refused_by_the_ranks_number() -> None:
    plan = plan_for(gpu(4), dp=2)
    with pytest.raises(ResourceError, match="rank 2 does not fit on device 2 "):
        more(plan, 3, gpu(4, free=10))


def test_the_only_rank_keeps_its_plain_name_and_those_that_join_have_none() -> None:
    grown = more(plan_for(gpu(), dp=1, base_id="g"), 3, gpu())
    assert [rank.identity.instance_id for rank in grown.ranks] == ["g", "g_dp1", "g_dp2"]


def test_a_schedulers_devices_are_those_that_it_has_free() -> None:
    node = replace(gpu(4), free_devices=4.0)
    facts = {"scheduler": "Ray"}
    plan = plan_for(node, dp=2)
    with pytest.raises(ResourceError, match="2 more ranks beside 2 need 2 devices, Ray has 1 free"):
        more(plan, 4, replace(node, free_devices=1.0), **facts)
    assert more(plan, 3, replace(node, free_devices=1.0), **facts).ranks[2].is_scheduled


def test_new_ranks_get_cores_that_nobody_has_first() -> None:
    plan = shrink(plan_for(cpu(8), dp=4, argv=KV), 2)
    assert [rank.cpus for rank in more(plan, 4, cpu(8)).ranks] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [rank.cpus for rank in more(plan, 3, cpu(8)).ranks[2:]] == [(4, 5, 6, 7)]


def test_without_a_free_core_new_ranks_share_those_that_the_fewest_use_and_a_warning_says_so() -> None:
    plan = plan_for(cpu(2), dp=2, argv=KV)
    grown = more(plan, 5, cpu(2))
    assert [rank.cpus for rank in grown.ranks] == [(0,), (1,), (0,), (1,), (0,)]
    assert grown.ranks[2].env["OMP_NUM_THREADS"] == "1"
    assert grown.warnings[len(plan.warnings) :] == (
        "5 ranks share 2 cores of host: each is slower than with a core of its own",
    )
    # One core that is free goes to the first.
    grown = more(shrink(plan_for(cpu(3), dp=3, argv=KV), 2), 4, cpu(3))
    assert [rank.cpus for rank in grown.ranks[2:]] == [(2,), (0,)]


def test_of_several_nodes_each_next_rank_goes_where_most_is_free_and_then_where_fewest_share() -> None:
    plan = shrink(plan_for(cpu(4, name="a"), cpu(4, name="b"), dp=4, argv=KV), 3)
    assert [rank.node for rank in plan.ranks] == ["a", "a", "b"]
    grown = more(plan, 6, cpu(4, name="a"), cpu(4, name="b"))
    assert [rank.node for rank in grown.ranks[3:]] == ["b", "b", "a"]


def test_cores_that_a_scheduler_has_none_free_of_are_shared_with_our_own_ranks_or_not_at_all() -> None:
    plan = plan_for(cpu(2), dp=2, argv=KV)
    grown = more(plan, 3, replace(cpu(2), cores=()), scheduler="Ray")
    assert grown.ranks[2].cpus == (0,)
    with pytest.raises(ResourceError, match="no core is left for 1 more: there is none on other"):
        more(plan, 3, replace(cpu(2), cores=(), name="other"), scheduler="Ray")


def test_ranks_go_to_the_nodes_of_the_users_own_placement_groups() -> None:
    plan = plan_for(cpu(2, name="a"), cpu(2, name="b"), dp=2, argv=KV)
    grown = more(plan, 4, cpu(2, name="a"), cpu(2, name="b"), placed=("b", "b"))
    assert [rank.node for rank in grown.ranks[2:]] == ["b", "b"]


def test_host_memory_is_counted_with_what_running_ranks_may_still_take() -> None:
    # Each rank takes 0.4 of the memory; those that run have not touched theirs yet.
    plan = plan_for(cpu(total=32, free=30), dp=2)
    assert plan.engine_defaults["gpu_memory_utilization"] == 0.4
    with pytest.raises(ResourceError, match=r"rank 2 does not fit: it wants 12.8 GiB of host memory, 6.4 GiB are free"):
        more(plan, 3, cpu(total=32, free=30))
    small = plan_for(cpu(total=32, free=30), dp=2, argv=KV)
    with pytest.raises(ResourceError, match=r"rank 15 does not fit: .* 1\.0 GiB are free beside ranks 2, 3"):
        more(small, 40, cpu(total=32, free=27))
    assert len(more(small, 6, cpu(total=32, free=27)).ranks) == 6


async def test_ranks_whose_devices_were_chosen_by_hand_get_no_others() -> None:
    plan = plan_for(gpu(), dp=2, devices=(("0",), ("1",)))
    with pytest.raises(UsageError, match="the devices of these 2 were chosen by hand"):
        await plan_more(plan, 3, Nobody(), {})  # type: ignore[arg-type]


class Nobody:
    """Is not asked."""
