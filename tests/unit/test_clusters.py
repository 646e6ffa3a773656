"""Plans over several nodes, and where somebody else gives out devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dplaunch import life as life_module
from dplaunch.errors import BackendError, DplaunchError, ResourceError, UsageError
from dplaunch.events import Event
from dplaunch.group import AsyncGroup
from dplaunch.inventory import Device, Inventory, Node
from dplaunch.model_info import ModelInfo, ModelKind
from dplaunch.plan import LaunchPlan
from dplaunch.plan_view import as_dict, as_text
from dplaunch.planner import make_plan
from dplaunch.spec import ExecutorKind, LaunchSpec, Mode
from dplaunch.testing.fake_backend import FakeBackend

GIB = 2**30
DENSE = ModelInfo(model="M", kind=ModelKind.DIRECTORY, is_moe=False, weight_bytes=GIB)
MOE = ModelInfo(model="M", kind=ModelKind.DIRECTORY, is_moe=True)


def cpu(name: str, cores: int = 2, *, memory: float = 30, **facts: Any) -> Node:
    return Node(name=name, cores=tuple(range(cores)), memory_total=32 * GIB, memory_free=int(memory * GIB), **facts)


def gpu(name: str, devices: int = 2, *, free: float = 79, **facts: Any) -> Node:
    each = [
        Device(id=str(i), uuid=f"GPU-{i}", name="H", memory_total=80 * GIB, memory_free=int(free * GIB))
        for i in range(devices)
    ]
    return Node(name=name, cores=(0, 1), memory_total=64 * GIB, memory_free=60 * GIB, devices=tuple(each), **facts)


def plan_for(
    *nodes: Node,
    placed: tuple[str, ...] | None = None,
    scheduler: str = "",
    share: float = 1.0,
    environ: dict[str, str] | None = None,
    model: ModelInfo = DENSE,
    argv: str = "",
    **options: Any,
) -> LaunchPlan:
    inventory = Inventory(nodes=nodes, placed=placed, scheduler=scheduler, share=share)
    spec = LaunchSpec(model=model.model, vllm_argv=tuple(argv.split()), **options)
    return make_plan(spec, inventory, model, environ=environ or {})


def on_ray(*nodes: Node, **options: Any) -> LaunchPlan:
    return plan_for(*nodes, scheduler="Ray", **options)


# A scheduler that gives out devices.


def test_a_scheduler_chooses_devices_and_the_plan_says_how_many() -> None:
    plan = on_ray(gpu("a"), gpu("b"), dp=2, argv="-tp 2", environ={"CUDA_VISIBLE_DEVICES": "0"})
    assert plan.scheduler == "Ray"
    assert [(rank.node, rank.devices) for rank in plan.ranks] == [("a", ("any", "any")), ("b", ("any", "any"))]
    assert all("CUDA_VISIBLE_DEVICES" not in rank.env for rank in plan.ranks)
    assert all(rank.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID" for rank in plan.ranks)


def test_where_the_plan_chooses_devices_no_scheduler_is_named() -> None:
    assert plan_for(gpu("a"), gpu("b"), dp=4).scheduler == ""


@pytest.mark.parametrize("node", [gpu("a"), cpu("a")])
def test_devices_cannot_be_chosen_where_a_scheduler_gives_them_out(node: Node) -> None:
    with pytest.raises(UsageError, match=r"devices \(--devices\) cannot be chosen here: Ray gives them out"):
        on_ray(node, dp=2, devices=(("0",), ("1",)))


def test_a_lockstep_rank_is_not_told_devices_that_are_not_known_yet() -> None:
    plan = on_ray(gpu("a", 4), dp=2, argv="-tp 2 -ep", model=MOE)
    assert plan.mode is Mode.LOCKSTEP
    assert "CUDA_VISIBLE_DEVICES" not in plan.ranks[0].env


def test_the_memory_of_devices_that_are_not_known_yet_is_not_judged() -> None:
    assert on_ray(gpu("a", free=1), dp=2).ranks[1].devices == ("any",)
    with pytest.raises(ResourceError, match="does not fit on device"):
        plan_for(gpu("a", free=1), dp=2)


@pytest.mark.parametrize(
    ("nodes", "options", "words"),
    [
        (
            [gpu("10.0.0.7", 1), gpu("10.0.0.8", 0)],
            {"dp": 2},
            "dp=2 needs 2 devices, Ray has 1 free: node 10.0.0.7 has 1 free device, 10.0.0.8 has 0",
        ),
        (
            [gpu("a", 8, free_devices=1), gpu("b", 8, free_devices=0)],
            {"dp": 2},
            "dp=2 needs 2 devices, Ray has 1 free: node a has 1 free device, b has 0",
        ),
        (
            [gpu("a", 3), gpu("b", 3)],
            {"dp": 3, "argv": "-tp 2"},
            "dp=3 with 2 devices a rank needs 6 devices, Ray has 6 free, with room for 2 ranks "
            "(a rank does not span machines): node a has 3 free devices, b has 3",
        ),
        (
            [gpu("a", 1)],
            {"dp": 3, "share": 0.5},
            "dp=3 at num_gpus=0.5 needs 1.5 devices, Ray has 1 free: node a has 1 free device",
        ),
        (
            [gpu("a", 2)],
            {"dp": 3, "share": 0.6},
            "dp=3 at num_gpus=0.6 needs 1.8 devices, Ray has 2 free, with room for 2 ranks "
            "(a worker does not span devices): node a has 2 free devices",
        ),
        (
            [gpu("a", 2, note="1 of 8 GPUs free in Ray"), gpu("b", 1, note="0 of 8 GPUs free in Ray")],
            {"dp": 4},
            "dp=4 needs 4 devices, Ray has 3 free: node a has 1 of 8 GPUs free in Ray, b has 0 of 8 GPUs free in Ray",
        ),
    ],
)
def test_too_few_devices_are_refused_with_what_each_node_has(nodes: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ResourceError) as caught:
        on_ray(*nodes, **options)
    assert caught.value.message == words


def test_a_refusal_names_some_of_many_nodes() -> None:
    with pytest.raises(ResourceError) as caught:
        on_ray(*(gpu(f"n{index}", 1) for index in range(20)), dp=21)
    assert caught.value.message.endswith("n7 has 1, and 12 more")


def test_a_cluster_whose_devices_are_all_held_is_not_taken_for_one_without() -> None:
    with pytest.raises(ResourceError, match="node a has 0 free devices"):
        on_ray(gpu("a", 8, free_devices=0))


# Parts of devices.


@pytest.mark.parametrize(
    ("devices", "free", "share", "room"),
    [
        (2, None, 0.5, 4),
        (2, None, 1 / 3, 6),
        (1, None, 0.1, 10),
        (2, None, 0.7, 2),
        (1, 0.5, 0.5, 1),
        (8, 4.0, 0.5, 8),
    ],
)
def test_a_device_has_room_for_as_many_workers_as_their_share_allows(
    devices: int, free: float | None, share: float, room: int
) -> None:
    node = gpu("a", devices, free_devices=free)
    assert len(on_ray(node, dp=room, share=share).ranks) == room
    with pytest.raises(ResourceError):
        on_ray(node, dp=room + 1, share=share)


def test_parts_of_several_devices_are_not_asked_of_a_scheduler_that_may_give_them_all_from_one() -> None:
    with pytest.raises(UsageError, match=r"num_gpus=0\.5 cannot be with 2 devices a rank") as caught:
        on_ray(gpu("a", 4), share=0.5, argv="-tp 2")
    assert "placement_groups" in caught.value.hint
    assert on_ray(gpu("a", 4), share=0.5, argv="-tp 2", placed=("a",)).ranks


def test_where_the_plan_gives_out_parts_a_ranks_devices_differ() -> None:
    plan = plan_for(gpu("a", 3), dp=3, share=0.5, argv="-tp 2 --gpu-memory-utilization 0.4")
    assert [rank.devices for rank in plan.ranks] == [("0", "1"), ("2", "0"), ("1", "2")]


def test_a_part_of_a_device_without_a_part_of_its_memory_comes_with_a_warning() -> None:
    (warning,) = on_ray(gpu("a"), share=0.5).warnings
    assert "holds 0.5 of a device, but takes 0.92 of its memory" in warning
    assert on_ray(gpu("a"), share=0.5, argv="--gpu-memory-utilization 0.4").warnings == ()
    assert on_ray(gpu("a")).warnings == ()
    assert on_ray(cpu("a"), share=0.5).warnings == ()


# Ranks whose nodes are decided.


@pytest.mark.parametrize("scheduler", ["", "Ray"])
@pytest.mark.parametrize("make", [cpu, gpu])
def test_ranks_go_where_they_are_placed(scheduler: str, make: Any) -> None:
    plan = plan_for(make("a"), make("b"), placed=("b", "a", "b"), scheduler=scheduler, dp=3)
    assert [rank.node for rank in plan.ranks] == ["b", "a", "b"]


def test_placed_ranks_share_their_nodes_devices_and_cores_in_order() -> None:
    devices = plan_for(gpu("a"), gpu("b"), placed=("b", "a", "b"), dp=3)
    cores = plan_for(cpu("a"), cpu("b"), placed=("b", "a", "b"), dp=3)
    assert [rank.devices for rank in devices.ranks] == [("0",), ("0",), ("1",)]
    assert [rank.cpus for rank in cores.ranks] == [(0,), (0, 1), (1,)]


def test_a_rank_placed_on_a_node_that_may_not_be_used_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"rank 1 is placed on node c, which is not one of .* used: a, b"):
        on_ray(gpu("a"), gpu("b"), placed=("a", "c"), dp=2)


def test_a_placed_rank_that_finds_no_device_left_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"rank 1 is placed on node a and needs 2 devices there, .*has 2 free"):
        plan_for(gpu("a"), gpu("b"), placed=("a", "a"), dp=2, argv="-tp 2")


@pytest.mark.parametrize("node", [gpu("a", 2, free_devices=0), cpu("a", 0)])
def test_what_the_users_own_placement_groups_hold_need_not_be_free(node: Node) -> None:
    plan = on_ray(node, placed=("a", "a"), dp=2)
    assert [rank.node for rank in plan.ranks] == ["a", "a"]
    assert plan.warnings == ()
    assert all(rank.cpus == () for rank in plan.ranks)


def test_devices_of_placed_ranks_are_looked_for_on_their_node() -> None:
    plan = plan_for(gpu("a"), gpu("b"), placed=("b", "b"), dp=2, devices=(("1",), ("0",)))
    assert [(rank.node, rank.devices) for rank in plan.ranks] == [("b", ("1",)), ("b", ("0",))]
    with pytest.raises(ResourceError, match="rank 0 was given device 1, this machine has 0"):
        plan_for(gpu("a", 4), gpu("b", 1), placed=("b",), devices=(("1",),))


def test_a_device_that_no_node_has_is_refused_with_what_each_has() -> None:
    with pytest.raises(ResourceError, match="rank 0 was given device 7, node a has 0, 1; node b has none"):
        plan_for(gpu("a"), gpu("b", 0), devices=(("7",),))


# Cores.


def test_a_node_without_a_free_core_takes_no_rank() -> None:
    plan = on_ray(cpu("a", 0, note="0 of 2 CPUs free in Ray"), cpu("b", 2), dp=3)
    assert [rank.node for rank in plan.ranks] == ["b", "b", "b"]
    assert "3 ranks share 2 cores of b" in plan.warnings[0]


def test_without_a_core_anywhere_each_node_is_named_with_what_is_missing() -> None:
    nodes = cpu("10.0.0.7", 0, note="0 of 2 CPUs free in Ray"), cpu("10.0.0.8", 0)
    with pytest.raises(ResourceError) as caught:
        on_ray(*nodes, dp=2)
    assert caught.value.message == (
        "dp=2 finds no core to run on: node 10.0.0.7 has 0 of 2 CPUs free in Ray, 10.0.0.8 has no free core"
    )
    assert caught.value.hint


def test_cores_cannot_be_chosen_on_several_machines_unless_the_ranks_are_placed() -> None:
    chosen: dict[str, Any] = {"dp": 2, "devices": (("0",), ("1",))}
    with pytest.raises(UsageError, match=r"cannot name cores of 2 machines"):
        plan_for(cpu("a"), cpu("b"), **chosen)
    plan = plan_for(cpu("a"), cpu("b"), placed=("b", "a"), **chosen)
    assert [(rank.node, rank.cpus) for rank in plan.ranks] == [("b", (0,)), ("a", (1,))]


# Memory.


def test_ranks_share_the_memory_of_their_own_host_only() -> None:
    assert plan_for(cpu("a"), cpu("b"), dp=2).engine_defaults == {"gpu_memory_utilization": 0.8}
    with pytest.raises(ResourceError, match=r"rank 3 does not fit on node b: .* 8\.0 GiB are free beside rank 2"):
        plan_for(cpu("a"), cpu("b", memory=21), dp=4, argv="--kv-cache-memory-bytes 12G")


def test_a_host_whose_memory_nobody_knows_is_left_to_vllm() -> None:
    unknown = Node(name="a", cores=(0,), memory_total=0, memory_free=0)
    assert on_ray(unknown).ranks[0].node == "a"


# The environment.


def test_a_nodes_own_values_go_over_the_launchers_and_under_the_users() -> None:
    node = cpu("b", env={"HOST_IP": "10.0.0.8", "HOME": "/b", "MINE": "node", "RANK": "7"})
    environ = {"HOST_IP": "10.0.0.7", "HOME": "/a", "PATH": "/bin"}
    plan = plan_for(cpu("a"), node, placed=("a", "b"), dp=2, environ=environ, env={"MINE": "user"})
    first, second = (rank.env for rank in plan.ranks)
    assert (first["HOST_IP"], first["HOME"], first["MINE"]) == ("10.0.0.7", "/a", "user")
    assert (second["HOST_IP"], second["HOME"], second["MINE"], second["PATH"]) == ("10.0.0.8", "/b", "user", "/bin")
    assert "RANK" not in second
    assert "  HOST_IP=10.0.0.8" in as_text(plan, launcher_env=environ)


# What is shown.


def test_the_shown_plan_says_who_chooses_devices_and_which_rank_goes_where() -> None:
    plan = on_ray(gpu("10.0.0.7", 4), gpu("10.0.0.8"), dp=3, argv="-tp 2", base_id="g", backend="ray")
    text = as_text(plan)
    assert "nodes     10.0.0.7: ranks 0-1; 10.0.0.8: rank 2" in text
    assert "2     10.0.0.8  2 x cuda, chosen by Ray  g_dp2     any    rank2.log" in text
    shown = as_dict(plan)
    assert shown["scheduler"] == "Ray"
    assert [(rank["node"], rank["devices"]) for rank in shown["ranks"]][1:] == [
        ("10.0.0.7", ["any", "any"]),
        ("10.0.0.8", ["any", "any"]),
    ]


def test_the_shown_plan_of_one_machine_does_not_list_machines() -> None:
    assert not any(line.startswith("nodes") for line in as_text(plan_for(cpu("a"), dp=2)).splitlines())
    assert as_dict(plan_for(cpu("a")))["scheduler"] == ""


class Unopened(FakeBackend):
    """Tells what there is, and cannot be opened."""

    async def open(self, *_: object) -> None:
        raise BackendError("not today")


@pytest.mark.parametrize(
    ("inventory", "said"),
    [
        (
            Inventory(nodes=(cpu("a"), cpu("b")), placed=("a", "b")),
            ["rank 0 goes to node a, cpu 0,1, and waits", "rank 1 goes to node b, cpu 0,1, and waits"],
        ),
        (
            Inventory(nodes=(gpu("a"),), scheduler="Ray"),
            [f"rank {rank} goes to node a, 1 x cuda, chosen by Ray, and waits" for rank in range(2)],
        ),
        (Inventory(nodes=(cpu("a"),)), ["rank 0 waits", "rank 1 waits"]),
    ],
)
async def test_before_anything_starts_it_is_said_which_rank_goes_where(
    inventory: Inventory, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(life_module, "load_backend", lambda name: Unopened(inventory))
    events: list[Event] = []
    spec = LaunchSpec(model=str(tmp_path), dp=2, log_dir=tmp_path / "logs", executor=ExecutorKind.UNI)
    with pytest.raises(DplaunchError, match="not today"):
        await AsyncGroup(spec, listeners=[events.append]).open()
    messages = [event.message for event in events if event.phase == "importing"]
    assert messages == [f"{start} for vLLM's import" for start in said]
