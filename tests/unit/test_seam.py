"""The one place that knows vLLM: what it counts on is there, and what it makes of it is what we say."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from dplaunch import seam
from dplaunch.errors import RequestError, VllmError
from dplaunch.rank_env import PLACEMENT_GROUP_VARIABLE
from dplaunch.seam import failures, frontend, rank, wire
from dplaunch.seam.config import check_version
from dplaunch.seam.preload import exec_environment
from tests.contract.groups import tiny_model

ROOT = Path(__file__).resolve().parents[2]

SIGNATURES: Mapping[str, str] = {
    # rank.py
    "vllm.v1.engine.core:EngineCoreProc.run_engine_core": "*args, dp_rank=, local_dp_rank=, **kwargs",
    "vllm.v1.engine.core:EngineCoreProc.__init__": (
        "self, vllm_config, local_client, handshake_address, executor_class, log_stats, client_handshake_address=, "
        "tensor_queue=, *, engine_index="
    ),
    "vllm.v1.executor:Executor.get_class": "vllm_config",
    "vllm.v1.executor:Executor._init_executor": "self",
    "vllm.v1.executor:Executor.determine_available_memory": "self",
    "vllm.v1.executor:Executor.initialize_from_config": "self, kv_cache_configs",
    "vllm.v1.executor:Executor.compile_or_warm_up_model": "self",
    "vllm.v1.executor.ray_utils:build_actor_name": "instance_id, rank, tp_size, pp_size, pcp_size",
    "vllm.v1.executor.ray_utils:initialize_ray_cluster": "parallel_config, ray_address=, require_gpu_on_driver=",
    "vllm.v1.executor.ray_utils:get_bundles_for_indices": "placement_group, bundle_indices, world_size",
    "vllm.v1.executor.ray_utils:get_bundles_sorted_by_node": "placement_group",
    # weights.py
    "vllm.v1.engine.core:EngineCore.collective_rpc": "self, method, timeout=, args=, kwargs=",
    "vllm.v1.engine.core:EngineCore.compute_weight_checksums": "self",
    "vllm.v1.engine.core:EngineCore.set_weight_version": "self, weight_version",
    "vllm.v1.engine.core:EngineCore.reset_prefix_cache": "self, reset_running_requests=, reset_connector=",
    "vllm.v1.engine.core:EngineCoreProc.pause_scheduler": "self, mode=, clear_cache=",
    "vllm.v1.engine.core:EngineCoreProc.resume_scheduler": "self",
    "vllm.v1.engine.core:EngineCore.sleep": "self, level=, mode=",
    "vllm.v1.engine.core:EngineCore.wake_up": "self, tags=",
    "vllm.v1.engine.core:EngineCore.add_lora": "self, lora_request",
    "vllm.v1.engine.core:EngineCore.remove_lora": "self, lora_id",
    "vllm.v1.worker.gpu_worker:Worker.start_weight_update": "self",
    "vllm.v1.worker.gpu_worker:Worker.update_weights": "self, update_info",
    "vllm.v1.worker.gpu_worker:Worker.finish_weight_update": "self",
    "vllm.v1.worker.gpu_worker:Worker.reload_weights": "self, *args, **kwargs",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights": (
        "self, weights_iterator=, weights_path=, is_checkpoint_format="
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reset_encoder_cache": "self",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reset_mm_cache": "self",
    "vllm.config.weight_transfer:WeightTransferConfig": "backend=",
    "vllm.distributed.weight_transfer.base:WeightTransferEngine": "config, vllm_config, device, model",
    "vllm.distributed.weight_transfer.base:WeightTransferEngine.parse_update_info": "self, update_dict",
    "vllm.distributed.weight_transfer.base:WeightTransferInitInfo": "",
    "vllm.distributed.weight_transfer.factory:WeightTransferEngineFactory.register_engine": (
        "name, module_path_or_cls, class_name="
    ),
    "vllm.distributed.weight_transfer.factory:WeightTransferEngineFactory.create_engine": (
        "config, vllm_config, device, model"
    ),
    "vllm.model_executor.model_loader.mtp_validation:disable_mtp_completeness_check": "",
    "vllm.model_executor.model_loader.reload:initialize_layerwise_reload": "model",
    "vllm.model_executor.model_loader.reload:finalize_layerwise_reload": "*args, **kwargs",
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": "layer, remove_weight",
    "vllm.lora.request:LoRARequest": (
        "lora_name, lora_int_id, lora_path=, base_model_name=, load_inplace=, is_3d_lora_weight="
    ),
    # lora.py
    "vllm.lora.punica_wrapper.punica_cpu:bgmv_expand": (
        "inputs, lora_b_weights, output_tensor, lora_indices_tensor, add_inputs="
    ),
    "vllm.lora.ops.torch_ops.lora_ops:bgmv_expand": (
        "inputs, lora_b_weights, output_tensor, lora_indices_tensor, add_inputs="
    ),
    "vllm.lora.ops.torch_ops.lora_ops:bgmv_expand_slice": (
        "inputs, lora_b_weights, output_tensor, lora_indices_tensor, slice_offset, slice_size, add_inputs="
    ),
    # wire.py
    "vllm.v1.serial_utils:MsgpackEncoder": "size_threshold=, oob_tensor_consumer=",
    "vllm.v1.serial_utils:MsgpackEncoder.encode": "self, obj",
    "vllm.v1.serial_utils:MsgpackDecoder": "t=, share_mem=, oob_tensor_provider=",
    "vllm.v1.serial_utils:MsgpackDecoder.decode": "self, bufs",
    "vllm.v1.pool.late_interaction:get_late_interaction_engine_index": "pooling_params, num_engines",
    # frontend.py
    "vllm.v1.engine.core_client:EngineCoreClient.make_async_mp_client": (
        "vllm_config, executor_class, log_stats, client_addresses=, client_count=, client_index=, renderer="
    ),
    "vllm.v1.engine.core_client:AsyncMPClient._apply_ready_response": "self, payload",
    "vllm.v1.engine.core_client:AsyncMPClient.get_output_async": "self",
    "vllm.v1.engine.core_client:AsyncMPClient.add_request_async": "self, request",
    "vllm.v1.engine.core_client:AsyncMPClient.abort_requests_async": "self, request_ids",
    "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async": "self, method, *args",
    "vllm.v1.engine.core_client:AsyncMPClient.call_utility_async": "self, method, *args",
    "vllm.v1.engine.core_client:AsyncMPClient.dp_engines_running": "self",
    "vllm.v1.engine.core_client:AsyncMPClient.ensure_alive": "self",
    "vllm.v1.engine.core_client:AsyncMPClient.shutdown": "self, timeout=",
    "vllm.v1.engine.async_llm:AsyncLLM": (
        "vllm_config, executor_class, log_stats, usage_context=, mm_registry=, log_requests=, start_engine_loop=, "
        "stat_loggers=, aggregate_engine_logging=, client_addresses=, client_count=, client_index=, profiler="
    ),
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown": "self, timeout=",
    "vllm.v1.engine.output_processor:OutputProcessor.propagate_error": "self, e",
    "vllm.v1.engine.output_processor:OutputProcessor.abort_requests": "self, request_ids, internal",
    "vllm.v1.engine.output_processor:RequestOutputCollector.put": "self, output",
    "vllm.exceptions:GracefulHTTPError": "message, http_status",
    "vllm.entrypoints.serve.exception_handling.error_response:create_error_response": (
        "message, err_type=, status_code=, param="
    ),
    "vllm.v1.engine.exceptions:EngineDeadError": "*args, suppress_context=, **kwargs",
    # resize.py
    "vllm.v1.metrics.loggers:StatLoggerManager": (
        "vllm_config, engine_idxs=, custom_stat_loggers=, enable_default_loggers=, aggregate_engine_logging=, "
        "client_count="
    ),
    "vllm.v1.metrics.loggers:PerEngineStatLoggerAdapter": (
        "vllm_config, engine_indexes, per_engine_stat_logger_factory"
    ),
    "vllm.v1.metrics.loggers:PrometheusStatLogger": "vllm_config, engine_indexes=",
    "vllm.v1.metrics.loggers:PrometheusStatLogger.log_engine_initialized": "self",
    # config.py
    "vllm.engine.arg_utils:AsyncEngineArgs.from_cli_args": "args",
    "vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config": "self, usage_context=, headless=",
    "vllm.entrypoints.launchers.cli_args:make_arg_parser": "parser",
    "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args": "args",
    "vllm.transformers_utils.config:maybe_register_config_serialize_by_value": "",
    # server.py
    "vllm.entrypoints.launchers.app:build_app": "args, supported_tasks=, model_config=",
    "vllm.entrypoints.launchers.api_server.app_state:init_app_state": "engine_client, state, args, supported_tasks=",
    "vllm.reasoning:ReasoningParserManager.import_reasoning_parser": "plugin_path",
    "vllm.tool_parsers:ToolParserManager.import_tool_parser": "plugin_path",
    # prompts.py
    "vllm.renderers:ChatParams": (
        "chat_template=, chat_template_content_format=, chat_template_kwargs=, media_io_kwargs=, "
        "mm_processor_kwargs=, tool_choice=, response_format="
    ),
    "vllm.renderers:BaseRenderer.render_chat_async": (
        "self, conversations, chat_params, tok_params=, *, prompt_extras=, skip_mm_cache="
    ),
    "vllm.renderers:BaseRenderer.render_cmpl_async": "self, prompts, tok_params=, *, prompt_extras=, skip_mm_cache=",
    "vllm.renderers.inputs.preprocess:parse_model_prompt": "model_config, prompt",
    "vllm.v1.engine.async_llm:AsyncLLM.add_request": (
        "self, request_id, prompt, params, arrival_time=, lora_request=, tokenization_kwargs=, trace_headers=, "
        "priority=, data_parallel_rank=, session_id=, prompt_text=, reasoning_ended=, reasoning_parser_kwargs=, "
        "kv_hints="
    ),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": (
        "self, prompt, sampling_params, request_id, *, prompt_text=, lora_request=, tokenization_kwargs=, "
        "trace_headers=, priority=, data_parallel_rank=, session_id=, kv_hints=, reasoning_ended=, "
        "reasoning_parser_kwargs="
    ),
    "vllm.v1.engine.async_llm:AsyncLLM.abort": "self, request_id, internal=",
    "vllm.v1.engine.async_llm:AsyncLLM.check_health": "self",
    "vllm.renderers:BaseRenderer.clear_mm_cache_async": "self",
    # steered.py
    "vllm.v1.engine.async_llm:AsyncLLM.sleep": "self, level=, mode=",
    "vllm.v1.engine.async_llm:AsyncLLM.wake_up": "self, tags=",
    "vllm.v1.engine.async_llm:AsyncLLM.is_sleeping": "self",
    "vllm.v1.engine.async_llm:AsyncLLM.pause_generation": "self, *, mode=, clear_cache=",
    "vllm.v1.engine.async_llm:AsyncLLM.resume_generation": "self",
    "vllm.v1.engine.async_llm:AsyncLLM.is_paused": "self",
    "vllm.v1.engine.async_llm:AsyncLLM.release_kv_cache_memory": "self",
    "vllm.v1.engine.async_llm:AsyncLLM.reset_prefix_cache": "self, reset_running_requests=, reset_connector=",
    "vllm.v1.engine.async_llm:AsyncLLM.add_lora": "self, lora_request",
    "vllm.v1.engine.async_llm:AsyncLLM.remove_lora": "self, lora_id",
    "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc": "self, method, timeout=, args=, kwargs=",
    "vllm.v1.engine.async_llm:AsyncLLM.init_weight_transfer_engine": "self, request",
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown_weight_transfer_engine": "self",
    "vllm.v1.engine.async_llm:AsyncLLM.start_weight_update": "self",
    "vllm.v1.engine.async_llm:AsyncLLM.start_draft_weight_update": "self",
    "vllm.v1.engine.async_llm:AsyncLLM.update_weights": "self, request",
    "vllm.v1.engine.async_llm:AsyncLLM.finish_weight_update": "self, weight_version=",
    "vllm.v1.engine.async_llm:AsyncLLM.update_weight_version": "self, new_version",
    "vllm.v1.engine.async_llm:AsyncLLM.get_weight_version": "self",
    "vllm.v1.metrics.loggers:StatLoggerManager.record_sleep_state": "self, sleep=, level=",
    "vllm.v1.worker.gpu_worker:Worker.init_weight_transfer_engine": "self, init_info",
    "vllm.v1.worker.gpu_worker:Worker.shutdown_weight_transfer_engine": "self",
    "vllm.v1.worker.gpu_worker:Worker.start_draft_weight_update": "self",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter": "self, request",
}
"""What we call or override, as "module:name", with its parameters; a trailing = means that there is a default."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.engine:EngineCoreRequest": (
        *("request_id", "data_parallel_rank", "client_index", "resumable", "abort_immediately", "pooling_params"),
        *("prompt_token_ids", "sampling_params", "mm_features", "prompt_embeds", "external_req_id"),
    ),
    "vllm.v1.engine:EngineCoreOutputs": (
        *("engine_index", "outputs", "scheduler_stats", "utility_output", "finished_requests", "weight_version"),
    ),
    "vllm.v1.engine:EngineCoreOutput": (
        *("request_id", "new_token_ids", "finish_reason", "new_logprobs", "new_prompt_logprobs_tensors", "events"),
        *("prompt_token_id_logprobs", "prefill_stats", "new_sampling_mask"),
    ),
    "vllm.v1.engine.output_processor:RequestState": ("parent_req", "queue"),
    "vllm.v1.engine.parallel_sampling:ParentRequest": ("child_requests",),
    "vllm.v1.engine:UtilityOutput": ("call_id", "failure_message", "result"),
    "vllm.v1.serial_utils:UtilityResult": ("result",),
    "vllm.config:VllmConfig": (
        *("instance_id", "kv_transfer_config", "parallel_config", "scheduler_config", "model_config"),
    ),
    "vllm.config:KVTransferConfig": ("engine_id",),
    "vllm.config:ParallelConfig": (
        *("data_parallel_index", "data_parallel_size", "data_parallel_size_local", "distributed_executor_backend"),
        *("placement_group", "ray_runtime_env"),
    ),
    # saved.py
    "vllm.outputs:RequestOutput": (
        *("request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished", "lora_request"),
        "num_cached_tokens",
    ),
    "vllm.outputs:CompletionOutput": (
        *("index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason", "stop_reason"),
        *("lora_request", "weight_versions"),
    ),
    "vllm.outputs:WeightVersionSpan": ("version", "start", "end"),
    "vllm.outputs:PoolingRequestOutput": ("request_id", "outputs", "prompt_token_ids", "num_cached_tokens", "finished"),
    "vllm.outputs:PoolingOutput": ("data",),
    "vllm.logprobs:Logprob": ("logprob", "rank", "decoded_token"),
}
"""The attributes that we read or set."""

PUBLIC = {
    # Names that vLLM documents for its users, and modules that are imported for their side effects alone.
    *("vllm:PoolingParams", "vllm:SamplingParams", "vllm.sampling_params:RequestOutputKind"),
    *("vllm.usage.usage_lib:UsageContext", "vllm.utils.argparse_utils:FlexibleArgumentParser"),
    *("vllm.v1.engine:FinishReason", "vllm.model_executor.models:ModelRegistry"),
    *("vllm.v1.engine.async_llm:", "vllm.entrypoints.openai.chat_completion.serving:"),
    *("vllm.entrypoints.launchers.api_server.app_state:", "vllm.entrypoints.launchers.app:"),
}


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """Imported with os.environ left as it was."""
    frontend.import_vllm(quiet=True)


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


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_we_call_in_vllm_takes_the_arguments_that_we_know(name: str) -> None:
    assert written(look_up(name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", FIELDS)
def test_what_we_read_and_set_in_vllm_is_there(name: str) -> None:
    owner = look_up(name)
    there = set(getattr(owner, "__annotations__", ())) | set(dir(owner))
    there |= set(inspect.signature(owner).parameters)
    there |= set(owner.__init__.__code__.co_names) if inspect.isfunction(owner.__init__) else set()
    assert set(FIELDS[name]) - there == set()


def test_every_name_that_the_seam_imports_is_pinned_here() -> None:
    pinned = {name.partition(":")[0] + ":" + name.partition(":")[2].split(".")[0] for name in [*SIGNATURES, *FIELDS]}
    pinned |= {
        f"{name.partition(':')[0].rpartition('.')[0]}:{name.partition(':')[0].rpartition('.')[2]}" for name in pinned
    }
    imported = {name for path in (ROOT / "dplaunch/seam").glob("*.py") for name in vllm_imports(path)}
    assert imported - pinned - PUBLIC == set()


def test_run_engine_core_looks_its_class_up_in_its_module() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    names = EngineCoreProc.run_engine_core.__code__.co_names
    assert "EngineCoreProc" in names
    assert "reconfigure_for_independent_dp_rank" in names


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


# A rank whose own executor is Ray.


def test_only_the_newer_ray_executor_names_its_workers_and_it_does_so_after_the_instance() -> None:
    pytest.importorskip("ray")
    from vllm.v1.executor.ray_executor import RayDistributedExecutor
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
    from vllm.v1.executor.ray_utils import build_actor_name

    newer, older = RayExecutorV2._init_executor, RayDistributedExecutor._init_workers_ray
    assert {"instance_id", "build_actor_name"} <= set(newer.__code__.co_names)
    assert re.search(r"\bname=", inspect.getsource(newer))
    assert not re.search(r"\bname=", inspect.getsource(older))
    assert build_actor_name("g_dp1", 3, 4, 1, 1) == "vllm_Worker_g_dp1_TP3"
    # The older one too puts workers into those bundles only that have a device.
    assert {"bundle_specs", "ray_device_key"} <= set(older.__code__.co_names)


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


def test_an_error_of_ours_is_one_that_vllm_hands_on_and_knows_the_status_of() -> None:
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.exceptions import GracefulHTTPError

    for retryable, status in ((True, 503), (False, 500)):
        failure = failures.as_failure(RequestError("rank 1 died of it", retryable=retryable))
        assert isinstance(failure, GracefulHTTPError)
        assert (failure.message, failure.retryable) == ("rank 1 died of it", retryable)
        answer = create_error_response(failure).error
        assert (answer.message, answer.code) == ("rank 1 died of it", status)


def test_vllm_hands_such_an_error_on_as_it_is() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    for method in (AsyncLLM.generate, AsyncLLM.encode):
        assert "except (VLLMClientError, GracefulHTTPError)" in inspect.getsource(method)


# vLLM's version.


def test_the_installed_vllm_is_one_that_the_seam_was_checked_with() -> None:
    found = seam.installed_version()
    assert check_version(found) == found
    assert seam.is_supported(str(found))


@pytest.mark.parametrize("found", ["0.31.2", "0.33.0", "0.3", "0.320.1", "1.0"])
def test_another_version_is_refused_with_what_to_do(found: str) -> None:
    with pytest.raises(VllmError, match=rf"vLLM {found} is installed, but this dplaunch works with 0\.32") as caught:
        check_version(found)
    assert "pip install" in caught.value.hint
    assert check_version(found, override=True) == found


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
    env = exec_environment({"LD_PRELOAD": "/usr/lib/mine.so"}, "cpu")
    names = env["LD_PRELOAD"].split(":")
    assert names[-1] == "/usr/lib/mine.so"
    assert all(Path(name).exists() for name in names[:-1])
    for present in (env["LD_PRELOAD"], "libiomp5.so"):
        assert exec_environment({"LD_PRELOAD": present}, "cpu")["LD_PRELOAD"] == present
    assert "LD_PRELOAD" not in exec_environment({}, "cuda")


# From flags to a config, and the names within it.


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `seam_probe` found out in a process of its own."""
    model = tiny_model(tmp_path_factory.mktemp("seam") / "model")
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.seam_probe", str(model)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
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
    assert len(parts) == 7
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
