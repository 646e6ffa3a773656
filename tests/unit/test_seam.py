"""The one place that knows vLLM: what it counts on is there, and what it makes of it is what we say."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from dplaunch import seam
from dplaunch.errors import ExitCode, RequestError, VllmError
from dplaunch.identity import Identity, new_base_id
from dplaunch.rank_env import PLACEMENT_GROUP_VARIABLE
from dplaunch.seam import failures, frontend, older, preload, rank, weights, wire
from dplaunch.seam.config import check_version
from dplaunch.seam.names import PUBLIC, RELIED
from dplaunch.seam.relied import Relied, numbers
from tests.contract.groups import tiny_model
from tests.seam.check import misfit
from tests.unit.served_errors import create_error_response

ROOT = Path(__file__).resolve().parents[2]

MODULES = {
    "vllm.v1.engine:core",
    "vllm:envs",
    "vllm:exceptions",
    "vllm.lora.ops.torch_ops:lora_ops",
    "vllm.lora.punica_wrapper:punica_cpu",
}
"""Imported whole, from the package that they are in; what is used of them is relied on by name."""

INSTALLED = str(seam.installed_version())
CALLED = [relied for relied in RELIED if relied.use is not None and relied.is_in(INSTALLED)]
READ = [relied for relied in RELIED if relied.has and relied.is_in(INSTALLED)]


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> Iterator[None]:
    """Imported with os.environ left as it was, and without what some of its modules start when they are imported."""
    frontend.import_vllm(quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in preload.QUIET_IMPORTS.items():
            patch.setenv(name, value)
        yield


def look_up(name: str) -> Any:
    module, _, attribute = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in filter(None, attribute.split(".")):
        found = getattr(found, part)
    return found


def written(function: Any) -> str:
    """A signature without annotations and without the defaults' values."""
    parts = []
    seen_star = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not seen_star:
            parts.append("*")
        seen_star = seen_star or parameter.kind in (parameter.VAR_POSITIONAL, parameter.KEYWORD_ONLY)
        stars = "*" * (parameter.kind is parameter.VAR_POSITIONAL) + "**" * (parameter.kind is parameter.VAR_KEYWORD)
        parts.append(f"{stars}{parameter.name}{'' if parameter.default is parameter.empty else '='}")
    return ", ".join(parts)


# What we count on.


@pytest.mark.parametrize("relied", CALLED, ids=lambda relied: relied.name)
def test_what_we_call_in_vllm_takes_what_we_pass(relied: Relied) -> None:
    assert relied.use is not None
    assert misfit(relied.use, written(look_up(relied.name))) == ""


@pytest.mark.parametrize("relied", READ, ids=lambda relied: relied.name)
def test_what_we_read_and_set_in_vllm_is_there(relied: Relied) -> None:
    owner = look_up(relied.name)
    there = set(getattr(owner, "__annotations__", ())) | set(dir(owner))
    there |= set(inspect.signature(owner).parameters)
    for each in owner.__mro__:
        there |= set(each.__init__.__code__.co_names) if inspect.isfunction(each.__init__) else set()
    # What is set elsewhere than in a constructor is seen in the sources alone.
    assert set(relied.has) - there <= {"weight_transfer_engine", "model_runner", "device", "output_handler"}


def test_every_name_that_the_seam_imports_is_relied_on_by_name() -> None:
    relied = {each.name.partition(":")[0] + ":" + each.name.partition(":")[2].split(".")[0] for each in RELIED}
    imported = {name for path in (ROOT / "dplaunch/seam").glob("*.py") for name in vllm_imports(path)}
    assert imported - relied - set(PUBLIC) - MODULES == set()


def test_what_the_helper_imports_may_start_nothing_and_ranks_do_not_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = preload.QUIET_IMPORTS
    monkeypatch.delenv(name)
    saw: list[str | None] = []
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr(importlib, "import_module", lambda module: saw.append(os.environ.get(name)))
    preload.preload()
    assert set(saw) == {"1"}
    assert name not in os.environ


def test_run_engine_core_looks_its_class_up_in_its_module() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    names = EngineCoreProc.run_engine_core.__code__.co_names
    assert "EngineCoreProc" in names
    assert "data_parallel_index" in names


def test_asyncllm_makes_its_client_in_the_one_place_that_we_replace() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "make_async_mp_client" in AsyncLLM.__init__.__code__.co_names


def test_every_utility_method_of_vllms_client_comes_down_to_the_verbs_that_we_override() -> None:
    from vllm.v1.engine.core_client import AsyncMPClient

    ours = set(frontend._adapter_class().__dict__)
    for name, method in inspect.getmembers(AsyncMPClient, inspect.iscoroutinefunction):
        if not name.endswith("_async") or name in ours or name.startswith("_"):
            continue
        used = method.__code__.co_names
        assert any(name.startswith("call_utility_") for name in used), name


def test_what_moved_is_found_where_the_installed_vllm_has_it() -> None:
    for name in ("make_arg_parser", "validate_parsed_serve_args", "build_app", "init_app_state"):
        assert older.moved(name).__name__ == name
    with pytest.raises(ImportError, match="in any of"):
        older.moved("no_such_name")


def test_a_module_that_is_there_and_lacks_what_it_needs_is_no_older_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_there.py").write_text("import not_installed_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(older, "modules_of", lambda name: ("half_there",))
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        older.moved("anything")


# A rank whose own executor is Ray.


def test_only_the_newer_ray_executor_names_its_workers_and_it_does_so_after_the_instance() -> None:
    pytest.importorskip("ray")
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
    from vllm.v1.executor.ray_utils import build_actor_name

    newer = RayExecutorV2._init_executor
    assert {"instance_id", "build_actor_name"} <= set(newer.__code__.co_names)
    assert re.search(r"\bname=", inspect.getsource(newer))
    assert build_actor_name("g_dp1", 3, 4, 1, 1) == "vllm_Worker_g_dp1_TP3"
    # It is the only one from 0.33 on.
    assert numbers(INSTALLED) >= (0, 33) or _older_ray_executor_places_its_workers_without_a_name()


def _older_ray_executor_places_its_workers_without_a_name() -> bool:
    older = look_up("vllm.v1.executor.ray_executor:RayDistributedExecutor._init_workers_ray")
    # It too puts workers into those bundles only that have a device.
    placed = {"bundle_specs", "ray_device_key"} <= set(older.__code__.co_names)
    return placed and not re.search(r"\bname=", inspect.getsource(older))


class FakeParallelConfig:
    """What of vLLM's config has to do with Ray."""

    def __init__(self) -> None:
        self.placement_group: Any = None
        self.ray_runtime_env = {"env_vars": {"A": "1"}}


def test_a_ray_executor_is_handed_the_placement_group_of_the_ranks_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    joined: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **options: joined.append(options))
    parallel = FakeParallelConfig()
    group_id = "0123456789abcdef" * 2 + "0400"
    assert len(group_id) == 2 * ray.PlacementGroupID.size()
    rank.join_cluster(parallel, {"RAY_ADDRESS": "10.0.0.1:6379", PLACEMENT_GROUP_VARIABLE: group_id})
    assert joined == [{"address": "10.0.0.1:6379", "runtime_env": {"env_vars": {"A": "1"}}}]
    assert type(parallel.placement_group).__name__ == "PlacementGroup"
    assert parallel.placement_group.id.hex() == group_id


def test_without_a_seat_the_placement_group_is_left_to_vllm() -> None:
    parallel = FakeParallelConfig()
    rank.join_cluster(parallel, {"RAY_ADDRESS": "10.0.0.1:6379"})
    assert parallel.placement_group is None


def test_ranks_whose_executors_are_ray_look_for_their_ports_in_places_of_their_own() -> None:
    def ports(base: str, number: int, incarnation: int = 0) -> set[int]:
        name = Identity(base, number, incarnation).instance_id
        first = older.master_port(name, number) + older.PORTS_BEHIND
        return set(range(first, first + older.PORTS_EACH))

    for base in (new_base_id() for _ in range(50)):
        group = [ports(base, number) for number in range(64)]
        assert len(set.union(*group)) == 64 * older.PORTS_EACH
        assert set.union(*group) <= set(older.PORTS)
        assert ports(base, 3, incarnation=2) == group[3]


def test_an_older_ray_executor_finds_different_ports_for_two_ranks() -> None:
    pytest.importorskip("ray")
    executor: Any = importlib.import_module("vllm.v1.executor.ray_executor_v2").RayExecutorV2
    if not hasattr(executor, "_select_tcpstore_port"):
        pytest.skip("this vLLM's Ray executor looks for no port")
    found = {executor._select_tcpstore_port(0, older.master_port(f"dpl-1_dp{number}", number)) for number in range(4)}
    assert len(found) == 4
    assert found <= set(older.PORTS)


# Nobody else knows vLLM.


def vllm_imports(path: Path) -> Iterator[str]:
    """What a source file imports of vLLM, at any depth, as "module:name"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (f"{alias.name}:" for alias in node.names if alias.name.split(".")[0] == "vllm")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from (f"{node.module}:{alias.name}" for alias in node.names)


def test_no_module_outside_the_seam_imports_vllm() -> None:
    sources = [*(ROOT / "dplaunch").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
    assert len(sources) > 40
    outside = [path for path in sources if "seam" not in path.relative_to(ROOT).parts]
    assert {str(path.relative_to(ROOT)): names for path in outside if (names := list(vllm_imports(path)))} == {}


def test_importing_dplaunch_imports_nothing_heavy() -> None:
    heavy = ("torch", "vllm", "ray", "rich", "zmq", "transformers", "numpy")
    code = (
        "import sys, dplaunch; dplaunch.DplaunchError, dplaunch.LaunchSpec, dplaunch.launch\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_seams_own_modules_import_nothing_heavy_until_they_are_used() -> None:
    modules = ", ".join(f"dplaunch.seam.{path.stem}" for path in (ROOT / "dplaunch/seam").glob("[a-z]*.py"))
    code = f"import sys, {modules}\nprint(sorted({{'torch', 'vllm', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The wire.


def test_the_answer_to_hello_is_what_vllm_reads() -> None:
    from vllm.v1.engine.utils import EngineHandshakeMetadata

    read = msgspec.msgpack.decode(wire.encode_addresses(["ipc://i"], ["ipc://o"]), type=EngineHandshakeMetadata)
    assert (read.addresses.inputs, read.addresses.outputs) == (["ipc://i"], ["ipc://o"])
    assert read.addresses.coordinator_input is None
    assert read.addresses.coordinator_output is None
    assert read.parallel_config == {}


def test_the_answer_to_hello_names_every_address_that_vllm_knows() -> None:
    from vllm.v1.engine.utils import EngineHandshakeMetadata, EngineZmqAddresses

    own = EngineHandshakeMetadata(addresses=EngineZmqAddresses(inputs=["i"], outputs=["o"]), parallel_config={})
    assert msgspec.msgpack.decode(wire.encode_addresses(["i"], ["o"])) == msgspec.msgpack.decode(
        msgspec.msgpack.encode(own)
    )


def test_the_kinds_of_messages_are_vllms_own_bytes() -> None:
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import EngineCoreProc

    assert EngineCoreRequestType.ADD.value == wire.ADD
    assert EngineCoreRequestType.ABORT.value == wire.ABORT
    assert EngineCoreRequestType.UTILITY.value == wire.UTILITY
    assert EngineCoreProc.ENGINE_CORE_DEAD == wire.ENGINE_DEAD


def test_a_request_arrives_as_it_was_sent() -> None:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    sent = EngineCoreRequest(
        *("id", [1, 2, 3], None, SamplingParams(max_tokens=5, temperature=0.5, seed=3), None),
        *(1.5, None, "salt", 1),
        resumable=True,
    )
    got = MsgpackDecoder(EngineCoreRequest).decode(wire.Codec().encode(sent))
    assert (got.request_id, got.prompt_token_ids, got.data_parallel_rank) == ("id", [1, 2, 3], 1)
    assert (got.sampling_params.max_tokens, got.sampling_params.seed, got.resumable) == (5, 3, True)


def test_outputs_with_tensors_arrive_as_an_engine_sends_them() -> None:
    import torch
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.serial_utils import MsgpackEncoder

    vector = torch.arange(2000, dtype=torch.float32)  # large enough for a frame of its own
    output = EngineCoreOutput("id", [7], pooling_output=vector, finish_reason=FinishReason.STOP)
    got = wire.Codec().decode([bytes(frame) for frame in MsgpackEncoder().encode(EngineCoreOutputs(outputs=[output]))])
    assert got.outputs[0].new_token_ids == [7]
    assert got.outputs[0].finish_reason is FinishReason.STOP
    assert torch.equal(got.outputs[0].pooling_output, vector)


def test_a_utility_call_and_its_answer_arrive_whole() -> None:
    from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

    codec = wire.Codec()
    assert MsgpackDecoder().decode(codec.encode((0, 4, "sleep", (1, "abort")))) == [0, 4, "sleep", [1, "abort"]]
    answer = EngineCoreOutputs(utility_output=UtilityOutput(4, None, UtilityResult({"free": 3})))
    got = codec.decode(MsgpackEncoder().encode(answer)).utility_output
    assert (got.call_id, got.failure_message, got.result.result) == (4, None, {"free": 3})


def test_an_error_of_ours_is_one_that_vllms_server_knows_the_status_of() -> None:
    for retryable, status in ((True, 503), (False, 500)):
        failure = failures.as_failure(RequestError("rank 1 died of it", retryable=retryable))
        assert (failure.message, failure.retryable) == ("rank 1 died of it", retryable)
        answer = create_error_response(failure).error
        assert (answer.message, answer.code) == ("rank 1 died of it", status)


class QueuedFailure:
    """What AsyncLLM's methods need of it, with a failure in each request's queue."""

    log_requests = False

    def __init__(self, failure: Exception) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        self.failure = failure
        self.generate = functools.partial(AsyncLLM.generate, self)
        self.encode = functools.partial(AsyncLLM.encode, self)
        older.pass_on_failures(self)

    async def add_request(self, *args: Any, **kwargs: Any) -> Any:
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.output_processor import RequestOutputCollector

        queue = RequestOutputCollector(RequestOutputKind.DELTA, "id")
        queue.put(self.failure)
        return queue

    async def abort(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to abort."""


@pytest.mark.parametrize("method", ["generate", "encode"])
async def test_vllm_hands_such_an_error_on_as_it_is(method: str) -> None:
    failure = failures.as_failure(RequestError("rank 1 died of it", retryable=True))
    engine = QueuedFailure(failure)
    with pytest.raises(RequestError) as caught:
        async for _ in getattr(engine, method)([1], None, "id"):
            pass
    assert caught.value is failure


class EngineThatFails:
    """An AsyncLLM of before 0.29, whose requests fail after one output."""

    def __init__(self, error: Exception, cause: Exception) -> None:
        self.error, self.cause, self.closed = error, cause, 0

    async def generate(self, prompt: str) -> AsyncIterator[str]:
        try:
            yield prompt
            raise self.error from self.cause
        finally:
            self.closed += 1


async def test_before_0_29_an_error_is_handed_on_and_closing_early_reaches_the_request() -> None:
    from vllm.v1.engine.exceptions import EngineGenerateError

    ours, others = RequestError("rank 1 died of it", retryable=True), ValueError("of vLLM's own")
    for cause, raised in ((ours, RequestError), (others, EngineGenerateError)):
        engine = EngineThatFails(EngineGenerateError(), cause)
        stream = older._passing_on(engine.generate)("prompt")
        assert await anext(stream) == "prompt"
        with pytest.raises(raised) as caught:
            await anext(stream)
        assert engine.closed == 1
        assert (caught.value is ours) == (cause is ours)
    engine = EngineThatFails(EngineGenerateError(), ours)
    stream = older._passing_on(engine.generate)("prompt")
    assert await anext(stream) == "prompt"
    await cast(Any, stream).aclose()
    assert engine.closed == 1


def test_before_0_29_an_error_of_ours_is_one_of_vllms_with_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    class GenerationError(Exception):
        """As vLLM had it."""

    monkeypatch.setattr(older, "moved", lambda name: {"GenerationError": GenerationError}[name])
    for retryable, status in ((True, 503), (False, 500)):
        failure = older.failure_class()("rank 1 died of it", retryable=retryable)
        assert isinstance(failure, GenerationError)
        assert (failure.message, failure.retryable, cast(Any, failure).status_code) == (
            *("rank 1 died of it", retryable),
            status,
        )


def test_what_an_older_engine_core_lacks_stands_behind_what_it_has() -> None:
    import torch

    class Newer:
        def set_weight_version(self, weight_version: str) -> None:
            told.append(weight_version)

    class Both(Newer, older.OlderCore):
        def collective_rpc(self, method: Any) -> list[Any]:
            return [method(SimpleNamespace(rank=rank, model_runner=runner)) for rank in range(2)]

    model = torch.nn.Linear(2, 1, dtype=torch.bfloat16)
    runner = SimpleNamespace(get_model=lambda: model)
    told: list[str] = []
    Both().set_weight_version("v")
    assert told == ["v"]
    first = Both().compute_weight_checksums()
    assert [sorted(part) for part in first] == [[f"worker{n}:bias", f"worker{n}:weight"] for n in range(2)]
    assert weights.combined(first) == weights.combined(Both().compute_weight_checksums())
    with torch.no_grad():
        model.bias += 1
    assert weights.combined(first) != weights.combined(Both().compute_weight_checksums())


# vLLM's version.


def test_the_installed_vllm_is_one_that_the_seam_was_checked_with() -> None:
    found = seam.installed_version()
    assert check_version(found) == found
    assert seam.is_supported(str(found))


@pytest.mark.parametrize("found", ["0.25.1", "0.34.0", "0.3", "0.320.1", "1.0", "0.2.6"])
def test_another_version_is_refused_with_what_to_do(found: str) -> None:
    words = rf"vLLM {found} is installed, but this dplaunch works with 0\.26 to 0\.33"
    with pytest.raises(VllmError, match=words) as caught:
        check_version(found)
    assert all(way in caught.value.hint for way in ("pip install", "--any-vllm", "any_vllm=True", "DPLAUNCH_ANY_VLLM"))
    assert caught.value.exit_code is ExitCode.VLLM
    assert check_version(found, override=True) == found


@pytest.mark.parametrize("found", ["0.26.0", "0.27.1", "0.33.0", "0.33.1.dev4+g12ab", "0.26.0rc1", "0.32.0+cpu"])
def test_a_version_within_the_window_is_taken(found: str) -> None:
    assert check_version(found) == found


def test_the_environment_can_ask_for_any_vllm() -> None:
    assert [seam.override_in(env) for env in ({}, {seam.OVERRIDE: "0"}, {seam.OVERRIDE: ""}, {seam.OVERRIDE: "1"})] == [
        *(False, False, False, True)
    ]


def test_a_missing_vllm_is_told_with_the_install_line() -> None:
    with pytest.raises(VllmError, match="vLLM is not installed") as caught:
        check_version(None, override=True)
    assert "dplaunch[cpu]" in caught.value.hint


# The user's process.


def test_importing_vllm_and_building_the_codec_leave_the_environment_alone() -> None:
    before = dict(os.environ)
    with frontend.preserved_environ():
        os.environ["DPLAUNCH_TEST_NEW"] = "1"
        os.environ["PATH"] = "changed"
        os.environ.pop("HOME", None)
    assert dict(os.environ) == before


def test_vllms_own_factory_stays_for_everyone_else() -> None:
    from vllm.v1.engine.core_client import EngineCoreClient

    original = inspect.getattr_static(EngineCoreClient, "make_async_mp_client")
    try:
        frontend._install_factory()
        installed = inspect.getattr_static(EngineCoreClient, "make_async_mp_client")
        frontend._install_factory()
        assert inspect.getattr_static(EngineCoreClient, "make_async_mp_client") is installed
        with pytest.raises((AttributeError, TypeError)):
            EngineCoreClient.make_async_mp_client(None, None, False)  # vLLM's own, which wants a real config
    finally:
        EngineCoreClient.make_async_mp_client = original


def test_the_zygote_of_cpu_ranks_is_loaded_with_libraries_only_where_they_are_not_yet() -> None:
    env = preload.exec_environment({"LD_PRELOAD": "/usr/lib/mine.so"}, "cpu")
    names = env["LD_PRELOAD"].split(":")
    assert names[-1] == "/usr/lib/mine.so"
    assert all(Path(name).exists() for name in names[:-1])
    for present in (env["LD_PRELOAD"], "libiomp5.so"):
        assert preload.exec_environment({"LD_PRELOAD": present}, "cpu")["LD_PRELOAD"] == present
    assert "LD_PRELOAD" not in preload.exec_environment({}, "cuda")


# From flags to a config, and the names within it.


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `seam_probe` found out in a process of its own."""
    model = tiny_model(tmp_path_factory.mktemp("seam") / "model")
    # As in a user's process: a test before may have imported vLLM in this one.
    environ = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_COMPILE_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.seam_probe", str(model)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_arguments_become_a_config(told: dict[str, Any]) -> None:
    plain = told["plain"]
    assert (plain["max_num_seqs"], plain["max_model_len"]) == (7, 128)
    assert plain["executor"] == "uni"
    assert plain["kv_engine_id"] is None
    assert not plain["server_args"]
    assert not plain["log_requests"]


def test_flags_become_a_config_and_win_over_the_plans_defaults(told: dict[str, Any]) -> None:
    assert told["served"] == {"max_num_seqs": 9, "model_len": 64, "flag": 9}


def test_ranks_get_what_vllm_set_in_the_environment_but_not_what_was_there(told: dict[str, Any]) -> None:
    environ = told["plain"]["environ"]
    assert environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1"  # vLLM sets it for itself
    assert not {"CALLER", "PATH", "OPENBLAS_NUM_THREADS"} & set(environ)


def test_a_rank_is_named_once_whatever_vllm_draws_and_suffixes(told: dict[str, Any]) -> None:
    plain, connected, restarted, alone = told["reports"]
    assert told["kv_engine_id"] == "peer-name"
    assert (plain["instance_id"], plain["engine_id"]) == ("base_dp3", None)
    assert (connected["instance_id"], connected["engine_id"]) == ("base_dp3", "peer-name_dp3")
    assert (restarted["instance_id"], restarted["engine_id"]) == ("base-r1_dp3", "peer-name-r1_dp3")
    assert (alone["instance_id"], alone["engine_id"]) == ("base", "peer-name")


def test_a_rank_knows_its_number_before_anything_is_built(told: dict[str, Any]) -> None:
    assert [report["seen_index"] for report in told["reports"]] == [3, 3, 3, 0]
    assert [report["data_parallel_index"] for report in told["reports"]] == [3, 3, 3, 0]


@pytest.mark.parametrize(
    ("case", "kind", "words", "hint"),
    [
        ("misspelt argument", "UsageError", ["'max_modell_len'"], "max_model_len"),
        ("argument like no other", "UsageError", ["'zzzzzzzz'"], "vllm serve --help=all"),
        ("bad value", "UsageError", ["max_model_len", "greater than"], ""),
        ("value of the wrong type", "UsageError", ["dtype"], ""),
        ("longer than the model", "UsageError", ["10000000", "512"], ""),
        ("misspelt flag", "UsageError", ["--max-modle-len"], "--max-model-len"),
        ("flag of the wrong type", "UsageError", ["--max-model-len", "abc"], "vllm serve --help=all"),
        ("tool choice without a parser", "UsageError", ["--enable-auto-tool-choice"], ""),
        ("no such model", "ModelError", ["/there/is/no/such/model"], ""),
    ],
)
def test_what_vllm_refuses_is_told_in_one_line(
    told: dict[str, Any], case: str, kind: str, words: list[str], hint: str
) -> None:
    error = told["errors"][case]
    assert error["type"] == kind, error
    assert all(word in error["message"] for word in words), error
    assert "\n" not in error["message"]
    assert hint in error["hint"]


# Another number of ranks.


def test_vllms_metrics_are_all_made_through_classes_that_can_be_replaced() -> None:
    from prometheus_client import Counter, Gauge, Histogram
    from vllm.v1.metrics import loggers

    own = loggers.PrometheusStatLogger
    assert {own._counter_cls, own._gauge_cls, own._histogram_cls} == {Counter, Gauge, Histogram}
    parts = [name for name in dir(own) if name.endswith("_cls")]
    assert len(parts) >= 6  # one more from 0.31 on
    for name in parts:
        if getattr(own, name) not in (Counter, Gauge, Histogram):
            assert [part for part in dir(getattr(own, name)) if part.endswith("_cls")]
    # Whatever it makes it makes so.
    names = own.__init__.__code__.co_names
    assert not {"Counter", "Gauge", "Histogram"} & set(names)


def test_vllm_counts_ranks_and_their_loggers_where_we_change_their_number() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter, StatLoggerManager

    assert "data_parallel_size" in inspect.getsource(InputProcessor.process_inputs)
    handler = inspect.getsource(AsyncLLM._run_output_handler)
    # The manager stays the same object: only what it has is replaced.
    assert "self._logger_ref = [self.logger_manager]" in handler
    assert {"engine_indexes", "stat_loggers"} <= set(StatLoggerManager.__init__.__code__.co_names)
    assert "per_engine_stat_loggers" in PerEngineStatLoggerAdapter.record.__code__.co_names


def test_a_rank_says_when_torch_compiles_something() -> None:
    import torch
    from torch._dynamo.callback import callback_handler

    phases: list[str] = []
    before = list(callback_handler.start_callbacks), list(callback_handler.end_callbacks)
    rank._tell_compiling(cast(Any, SimpleNamespace(phase=phases.append)))
    try:
        compiled = torch.compile(lambda x: x + 1, backend="eager")
        assert compiled(torch.zeros(1)).item() == 1.0
        assert phases == ["compiling", "serving"]
    finally:
        callback_handler.start_callbacks, callback_handler.end_callbacks = before
