"""From what was asked and what there is to what will happen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dplaunch import builds
from dplaunch.errors import DplaunchError, ResourceError, UsageError
from dplaunch.inventory import Device, Inventory, Node
from dplaunch.model_info import ModelInfo, ModelKind
from dplaunch.plan import LaunchPlan
from dplaunch.planner import make_plan, plan_launch
from dplaunch.spec import ExecutorKind, LaunchSpec, Mode

GIB = 2**30
DENSE = ModelInfo(model="M", kind=ModelKind.DIRECTORY, is_moe=False, weight_bytes=GIB)
MOE = ModelInfo(model="M", kind=ModelKind.DIRECTORY, is_moe=True)
UNKNOWN = ModelInfo(model="M", kind=ModelKind.HUB)


def cpu(cores: int = 2, *, total: float = 32, free: float = 30, name: str = "host") -> Node:
    return Node(name=name, cores=tuple(range(cores)), memory_total=int(total * GIB), memory_free=int(free * GIB))


def gpu(devices: int = 8, *, free: float = 79, name: str = "host") -> Node:
    each = [
        Device(id=str(i), uuid=f"GPU-{i}", name="H", memory_total=80 * GIB, memory_free=int(free * GIB))
        for i in range(devices)
    ]
    return Node(name=name, cores=(0, 1), memory_total=64 * GIB, memory_free=60 * GIB, devices=tuple(each))


def plan_for(
    *nodes: Node,
    model: ModelInfo | None = DENSE,
    argv: str = "",
    environ: Mapping[str, str] | None = None,
    **options: Any,
) -> LaunchPlan:
    asked = {"model": model.model if model else None, "vllm_argv": tuple(argv.split())}
    return make_plan(LaunchSpec(**(asked | options)), Inventory(nodes=nodes), model, environ=environ or {})


# Mode.


@pytest.mark.parametrize(
    ("model", "argv", "dp", "mode", "why"),
    [
        (DENSE, "", 2, Mode.INDEPENDENT, "dense"),
        (DENSE, "--enable-expert-parallel", 2, Mode.INDEPENDENT, "dense"),
        (MOE, "", 2, Mode.INDEPENDENT, "without expert parallelism"),
        (MOE, "--enable-expert-parallel", 2, Mode.LOCKSTEP, "with expert parallelism"),
        (MOE, "-ep", 2, Mode.LOCKSTEP, "with expert parallelism"),
        (MOE, "--enable-expert-parallel", 1, Mode.INDEPENDENT, "one rank"),
        (UNKNOWN, "", 2, Mode.INDEPENDENT, "not asked for"),
        (UNKNOWN, "--enable-expert-parallel", 2, Mode.LOCKSTEP, "with expert parallelism"),
        (None, "", 2, Mode.INDEPENDENT, "dense"),
    ],
)
def test_the_mode_follows_from_the_model_and_its_experts(
    model: ModelInfo | None, argv: str, dp: int, mode: Mode, why: str
) -> None:
    plan = plan_for(gpu(), model=model, argv=argv, dp=dp)
    assert plan.mode is mode
    assert why in plan.mode_reason


@pytest.mark.parametrize("mode", [Mode.INDEPENDENT, Mode.LOCKSTEP])
def test_a_mode_that_was_asked_for_wins(mode: Mode) -> None:
    plan = plan_for(gpu(), model=MOE, argv="-ep", dp=2, mode=mode)
    assert (plan.mode, plan.mode_reason) == (mode, "as asked")


@pytest.mark.parametrize(("model", "dp", "words"), [(DENSE, 2, "has none"), (MOE, 1, "at least two ranks")])
def test_lockstep_is_refused_where_it_cannot_be(model: ModelInfo, dp: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_for(gpu(), model=model, dp=dp, mode=Mode.LOCKSTEP)


def test_ranks_in_lockstep_meet_where_they_are_launched() -> None:
    with pytest.raises(UsageError, match="rank 0 of a group in lockstep cannot be on worker"):
        plan_for(cpu(name="head"), gpu(name="worker"), model=MOE, argv="-ep", dp=2)
    assert plan_for(cpu(name="head"), gpu(name="worker"), model=MOE, dp=2).mode is Mode.INDEPENDENT


def test_elastic_expert_parallelism_is_refused() -> None:
    with pytest.raises(UsageError, match="keep their number"):
        plan_for(gpu(), model=MOE, argv="-ep --enable-elastic-ep", dp=2)


def test_expert_parallelism_is_read_from_python_arguments_too() -> None:
    plan = plan_for(gpu(), model=MOE, dp=2, engine_args={"enable_expert_parallel": True})
    assert plan.mode is Mode.LOCKSTEP


def test_a_lockstep_group_on_cpu_comes_with_a_warning() -> None:
    plan = plan_for(cpu(), model=MOE, argv="-ep", dp=2)
    assert any("no all-to-all on CPU" in warning for warning in plan.warnings)


def test_expert_parallelism_of_a_dense_model_comes_with_a_warning() -> None:
    assert "changes nothing" in plan_for(gpu(), argv="-ep", dp=2).warnings[0]


def test_lockstep_of_an_unfetched_model_comes_with_a_warning() -> None:
    assert "unknown until it is fetched" in plan_for(gpu(), model=UNKNOWN, argv="-ep", dp=2).warnings[0]


# Devices.


def test_devices_are_given_out_in_order() -> None:
    plan = plan_for(gpu(), dp=4, argv="-tp 2")
    assert [rank.devices for rank in plan.ranks] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7")]
    assert [rank.env["CUDA_VISIBLE_DEVICES"] for rank in plan.ranks] == ["0,1", "2,3", "4,5", "6,7"]
    assert all(rank.device_type == "cuda" and rank.cpus == () for rank in plan.ranks)


def test_a_ranks_world_is_the_product_of_its_parallel_sizes() -> None:
    plan = plan_for(gpu(), dp=1, argv="-tp 2 --pipeline-parallel-size=2 -pcp 2")
    assert len(plan.ranks[0].devices) == 8


@pytest.mark.parametrize(
    ("dp", "argv", "words"),
    [
        (9, "", "dp=9 needs 9 devices, this machine has 8"),
        (8, "-tp 2", "dp=8 with 2 devices a rank needs 16 devices, this machine has 8"),
        (1, "-tp 16", "dp=1 with 16 devices a rank needs 16 devices, this machine has 8"),
    ],
)
def test_too_few_devices_are_refused_with_the_numbers(dp: int, argv: str, words: str) -> None:
    with pytest.raises(ResourceError, match=words):
        plan_for(gpu(8), dp=dp, argv=argv)


def test_a_rank_never_spans_two_machines() -> None:
    nodes = gpu(3, name="a"), gpu(3, name="b")
    plan = plan_for(*nodes, dp=2, argv="-tp 2")
    assert [(rank.node, rank.devices) for rank in plan.ranks] == [("a", ("0", "1")), ("b", ("0", "1"))]
    with pytest.raises(ResourceError, match="6 devices, these 2 machines have 6, with room for 2 ranks"):
        plan_for(*nodes, dp=3, argv="-tp 2")


def test_chosen_devices_are_respected() -> None:
    plan = plan_for(gpu(), dp=2, devices=(("7",), ("GPU-3",)))
    assert [rank.devices for rank in plan.ranks] == [("7",), ("3",)]


@pytest.mark.parametrize(
    ("devices", "error", "words"),
    [
        ((("0",), ("9",)), ResourceError, "rank 1 was given device 9, this machine has 0, 1"),
        ((("0", "1"), ("2",)), UsageError, r"rank 0 was given 2 devices \(0, 1\), but needs 1"),
        (((), ("2",)), UsageError, "rank 0 was given 0 devices"),
    ],
)
def test_chosen_devices_that_do_not_fit_are_refused(devices: Any, error: type[DplaunchError], words: str) -> None:
    with pytest.raises(error, match=words):
        plan_for(gpu(), dp=2, devices=devices)


def test_two_ranks_may_share_a_device_when_asked_and_when_it_holds_both() -> None:
    plan = plan_for(gpu(1), dp=2, devices=(("0",), ("0",)), argv="--gpu-memory-utilization 0.4")
    assert "2 ranks share device 0" in plan.warnings[0]
    with pytest.raises(ResourceError, match="rank 1 does not fit on device 0"):
        plan_for(gpu(1), dp=2, devices=(("0",), ("0",)))


def test_a_lockstep_rank_sees_all_devices_of_its_group() -> None:
    plan = plan_for(gpu(8), model=MOE, dp=2, argv="-tp 2 -ep")
    assert [rank.env["CUDA_VISIBLE_DEVICES"] for rank in plan.ranks] == ["0,1,2,3", "0,1,2,3"]
    assert [rank.devices for rank in plan.ranks] == [("0", "1"), ("2", "3")]


@pytest.mark.parametrize("size", ["0", "-1", "x", "1.5"])
def test_a_parallel_size_that_is_no_number_is_refused(size: str) -> None:
    with pytest.raises(UsageError, match="--tensor-parallel-size must be a whole number"):
        plan_for(gpu(), argv=f"--tensor-parallel-size={size}")


# Cores.


def test_on_cpu_each_rank_gets_cores_of_its_own() -> None:
    plan = plan_for(cpu(2), dp=2)
    assert [rank.cpus for rank in plan.ranks] == [(0,), (1,)]
    assert [rank.devices for rank in plan.ranks] == [("0",), ("1",)]
    assert all(rank.env["OMP_NUM_THREADS"] == "1" for rank in plan.ranks)
    assert all(rank.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind" for rank in plan.ranks)
    assert plan.warnings == ()


def test_cores_are_split_in_contiguous_blocks() -> None:
    assert [rank.cpus for rank in plan_for(cpu(5), dp=2).ranks] == [(0, 1, 2), (3, 4)]


def test_more_ranks_than_cores_share_them_and_say_so() -> None:
    plan = plan_for(cpu(2), dp=5, model=UNKNOWN)
    assert [rank.cpus for rank in plan.ranks] == [(0,), (1,), (0,), (1,), (0,)]
    assert plan.warnings == ("5 ranks share 2 cores of host: each is slower than with a core of its own",)


def test_workers_on_cpu_are_bound_to_blocks_of_their_ranks_cores() -> None:
    plan = plan_for(cpu(8), dp=2, argv="-tp 2")
    assert plan.executor is ExecutorKind.MP
    assert plan.ranks[1].env["VLLM_CPU_OMP_THREADS_BIND"] == "4,5|6,7"


def test_more_workers_than_cores_come_with_a_warning() -> None:
    assert "rank 0 has 2 workers on 1 core" in plan_for(cpu(2), dp=2, argv="-tp 2").warnings[0]


def test_chosen_cores_are_respected() -> None:
    plan = plan_for(cpu(4), dp=2, devices=(("3",), ("0", "1")))
    assert [rank.cpus for rank in plan.ranks] == [(3,), (0, 1)]


@pytest.mark.parametrize(
    ("devices", "error", "words"),
    [
        ((("0",), ("7",)), ResourceError, "rank 1 was given core 7, this process may use 0, 1"),
        ((("0",), ("GPU-1",)), UsageError, "devices are cores here"),
        (((), ("1",)), UsageError, "rank 0 was given nothing"),
    ],
)
def test_chosen_cores_that_cannot_be_are_refused(devices: Any, error: type[DplaunchError], words: str) -> None:
    with pytest.raises(error, match=words):
        plan_for(cpu(2), dp=2, devices=devices)


def test_cpu_ranks_go_where_the_cores_are() -> None:
    plan = plan_for(cpu(4, name="a"), cpu(2, name="b"), dp=3)
    assert [(rank.node, rank.cpus) for rank in plan.ranks] == [("a", (0, 1)), ("a", (2, 3)), ("b", (0, 1))]


# Memory.


@pytest.mark.parametrize(("dp", "share"), [(1, 0.8), (2, 0.4), (3, 0.267), (8, 0.1)])
def test_on_cpu_the_ranks_share_the_hosts_memory(dp: int, share: float) -> None:
    assert plan_for(cpu(8), dp=dp).engine_defaults == {"gpu_memory_utilization": share}


def test_on_cpu_no_more_is_shared_than_is_free() -> None:
    assert plan_for(cpu(free=16), dp=2).engine_defaults == {"gpu_memory_utilization": 0.225}


def test_each_worker_of_a_rank_on_cpu_takes_a_share() -> None:
    assert plan_for(cpu(4), dp=2, argv="-tp 2").engine_defaults == {"gpu_memory_utilization": 0.2}


def test_on_cuda_nothing_is_added() -> None:
    assert plan_for(gpu(), dp=2).engine_defaults == {}


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (
            "--gpu-memory-utilization 0.92",
            {},
            "rank 1 does not fit: it wants 29.4 GiB of host memory, 0.6 GiB are free beside rank 0",
        ),
        (
            "--gpu-memory-utilization 0.01",
            {},
            r"rank 0 does not fit: its weights are 1.0 GiB, and its share of host memory is 0.3 of 32.0 GiB",
        ),
        ("--kv-cache-memory-bytes 20G", {}, "rank 1 does not fit: it wants 21.0 GiB"),
        ("", {"VLLM_CPU_KVCACHE_SPACE": "20"}, "rank 1 does not fit: it wants 21.0 GiB"),
        (
            "--kv-cache-memory-bytes 40G",
            {},
            "rank 0 does not fit: it wants 41.0 GiB of host memory, 30.0 GiB are",
        ),
    ],
)
def test_ranks_that_do_not_fit_into_host_memory_are_refused(argv: str, environ: dict[str, str], words: str) -> None:
    with pytest.raises(ResourceError, match=words):
        plan_for(cpu(), dp=2, argv=argv, environ=environ)


def test_weights_that_are_not_read_do_not_count() -> None:
    plan_for(cpu(), dp=2, argv="--gpu-memory-utilization 0.01 --load-format dummy")


def test_a_share_that_was_asked_for_stays() -> None:
    assert plan_for(cpu(), dp=2, argv="--gpu-memory-utilization 0.3").engine_defaults == {}
    assert plan_for(cpu(), dp=2, engine_args={"gpu_memory_utilization": 0.3}).engine_defaults == {}


@pytest.mark.parametrize("share", ["0", "1.5", "lots"])
def test_a_share_that_cannot_be_is_refused(share: str) -> None:
    with pytest.raises(UsageError, match="--gpu-memory-utilization must be above 0 and at most 1"):
        plan_for(cpu(), argv=f"--gpu-memory-utilization={share}")


def test_a_device_with_too_little_free_memory_is_refused() -> None:
    words = r"rank 0 does not fit on device 0 \(H\): it wants 73.6 GiB, 0.92 of 80.0, and 12.0 GiB are free"
    with pytest.raises(ResourceError, match=words):
        plan_for(gpu(free=12), dp=2)
    plan_for(gpu(free=12), dp=2, argv="--gpu-memory-utilization 0.1")


def test_a_device_of_unknown_memory_is_left_to_vllm() -> None:
    device = Device(id="MIG-1", uuid="MIG-1", name="MIG slice", memory_total=0, memory_free=0)
    node = Node(name="host", cores=(0,), memory_total=GIB, memory_free=GIB, devices=(device,))
    assert plan_for(node).ranks[0].devices == ("MIG-1",)


# Executor.


@pytest.mark.parametrize(
    ("node", "dp", "argv", "executor"),
    [
        (cpu(), 1, "", ExecutorKind.UNI),
        (cpu(), 2, "", ExecutorKind.UNI),
        (cpu(4), 2, "-tp 2", ExecutorKind.MP),
        (gpu(), 1, "", ExecutorKind.MP),
        (gpu(), 2, "", ExecutorKind.MP),
        (gpu(), 2, "-tp 2", ExecutorKind.MP),
    ],
)
def test_the_executor_is_chosen_for_throughput(node: Node, dp: int, argv: str, executor: ExecutorKind) -> None:
    plan = plan_for(node, dp=dp, argv=argv)
    assert plan.executor is executor
    assert plan.executor_reason


def test_an_executor_that_was_asked_for_wins() -> None:
    own = plan_for(gpu(), dp=2, executor=ExecutorKind.UNI)
    vllms = plan_for(cpu(), dp=2, argv="--distributed-executor-backend mp")
    assert (own.executor, own.executor_reason) == (ExecutorKind.UNI, "as asked")
    assert (vllms.executor, vllms.executor_reason) == (ExecutorKind.MP, "as asked")
    assert vllms.ranks[1].env["VLLM_CPU_OMP_THREADS_BIND"] == "1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"executor": ExecutorKind.UNI, "argv": "-tp 2"}, "uni drives one device"),
        ({"argv": "--distributed-executor-backend external_launcher"}, "cannot be 'external_launcher'"),
    ],
)
def test_an_executor_that_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_for(gpu(), **options)


# The built-in model.


def test_the_built_in_model_is_set_up_to_run_on_any_cpu() -> None:
    plan = plan_for(cpu(), model=None, dp=2)
    assert plan.engine_defaults == {
        "dtype": "float32",
        "max_model_len": 2048,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 256 * 2**20,
        "gpu_memory_utilization": 0.4,
    }


def test_what_the_user_set_for_the_built_in_model_stays() -> None:
    plan = plan_for(cpu(), model=None, argv="--dtype bfloat16 --max-model-len 512 --no-enforce-eager")
    assert plan.engine_defaults.keys() == {"kv_cache_memory_bytes", "gpu_memory_utilization"}


@pytest.mark.parametrize(
    ("argv", "environ"), [("--gpu-memory-utilization 0.2", {}), ("", {"VLLM_CPU_KVCACHE_SPACE": "1"})]
)
def test_the_built_in_models_cache_is_left_to_who_sizes_it(argv: str, environ: dict[str, str]) -> None:
    plan = plan_for(cpu(), model=None, argv=argv, environ=environ)
    assert "kv_cache_memory_bytes" not in plan.engine_defaults


def test_the_plan_says_where_the_built_in_model_is() -> None:
    where = {"builtin_path": Path("/cache/m"), "builtin_note": "SmolLM2"}
    plan = make_plan(LaunchSpec(), Inventory(nodes=(cpu(),)), None, environ={}, **where)  # type: ignore[arg-type]
    assert (plan.model, plan.model_note) == ("/cache/m", "SmolLM2")


# Names and logs.


def test_several_ranks_are_suffixed_and_a_single_one_is_not() -> None:
    two, one = plan_for(cpu(), dp=2, base_id="g"), plan_for(cpu(), dp=1, base_id="g")
    assert [rank.identity.instance_id for rank in two.ranks] == ["g_dp0", "g_dp1"]
    assert one.ranks[0].identity.instance_id == "g"


@pytest.mark.parametrize("name", ["a/b", "", "_x", "g_dp1", "g-r1_dp2", "x" * 65])
def test_a_name_that_cannot_be_part_of_others_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        plan_for(cpu(), base_id=name)


def test_each_launch_has_its_own_log_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first, second = plan_for(cpu(), dp=2), plan_for(cpu(), dp=2)
    assert first.log_dir == tmp_path / "dplaunch" / "logs" / first.base_id
    assert first.ranks[1].log_file == first.log_dir / "rank1.log"
    assert first.log_dir != second.log_dir
    assert not first.log_dir.exists()


def test_a_log_directory_that_was_asked_for_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan_for(cpu(), log_dir=Path("logs")).log_dir == tmp_path / "logs"


def test_the_launchers_environment_is_cleaned_and_the_users_variables_are_set() -> None:
    environ = {"RANK": "1", "CUDA_VISIBLE_DEVICES": "0,1", "PATH": "/bin"}
    plan = plan_for(gpu(), environ=environ, env={"HELLO": "x"})
    env = plan.ranks[0].env
    assert "RANK" not in env
    assert (env["PATH"], env["HELLO"], env["CUDA_VISIBLE_DEVICES"]) == ("/bin", "x", "0")


class StubBackend:
    """Knows the inventory only."""

    async def inventory(self, spec: LaunchSpec, more: int = 0) -> Inventory:
        return Inventory(nodes=(cpu(),))


async def test_a_plan_that_is_only_shown_makes_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from dplaunch import demo

    monkeypatch.setattr(demo, "demo_model", None)
    monkeypatch.setattr(demo, "describe", lambda: "a note")
    plan = await plan_launch(LaunchSpec(dp=2), StubBackend(), make_model=False)  # type: ignore[arg-type]
    assert (plan.model, plan.model_note) == ("(built-in)", "a note")


async def test_a_vllm_for_cuda_is_refused_where_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "build_of", lambda name: ("2.14.0+cu130", "CUDA 13.0"))
    monkeypatch.setattr(builds, "vllm_is_for_cpu", lambda: False)
    with pytest.raises(
        ResourceError, match=r"no NVIDIA device, and torch 2\.14\.0\+cu130 is built for CUDA 13.0"
    ) as raised:
        await plan_launch(LaunchSpec(), StubBackend(), make_model=False)  # type: ignore[arg-type]
    assert "dplaunch[cpu]" in str(raised.value.hint)
    # A stand-in engine needs none, and neither does a vLLM for the CPU, or who tells vLLM to use that.
    monkeypatch.setattr(builds, "vllm_is_for_cpu", lambda: True)
    assert await plan_launch(LaunchSpec(), StubBackend(), make_model=False)  # type: ignore[arg-type]
    monkeypatch.setattr(builds, "vllm_is_for_cpu", lambda: False)
    assert await plan_launch(LaunchSpec(engine="a:b"), StubBackend(), make_model=False)  # type: ignore[arg-type]
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    assert await plan_launch(LaunchSpec(), StubBackend(), make_model=False)  # type: ignore[arg-type]


async def test_a_launch_gets_the_built_in_model_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from dplaunch import demo

    made = demo.DemoModel(path=Path("/cache/m"), note="a note")
    monkeypatch.setattr(demo, "demo_model", lambda say: made)
    plan = await plan_launch(LaunchSpec(), StubBackend())  # type: ignore[arg-type]
    assert plan.model == "/cache/m"


async def test_a_plan_refuses_what_dplaunch_does_itself() -> None:
    with pytest.raises(UsageError, match="-dp is not for dplaunch"):
        await plan_launch(LaunchSpec(vllm_argv=("-dp", "2")), StubBackend())  # type: ignore[arg-type]
