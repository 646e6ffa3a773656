"""Every private name of vLLM that the seam relies on, as data: where it is, how we use it, and in which versions.

The header of `dplaunch.seam` says what each is for. `make seam VERSION=...` checks a version's sources against this,
and tests/seam the recorded versions and the one that is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OLDEST, NEWEST = "0.26", "0.33"
"""The versions that the seam was checked with, both ends included."""


@dataclass(frozen=True, slots=True)
class Relied:
    """One name, or one module.

    Args:
        name: "module:qualified.name", or "module:".
        use: the arguments that we pass, or that our own method in its place takes, as in "self, one, two=": with a
            trailing = what goes by keyword, without it by position. None: it is not called.
        has: attributes that we read or set.
        mentions: names in its body, which say that it works as we think; "name=" is a keyword of a call in it.
        since: the first version that has it; earlier ones have another, or do without.
        until: the last version in which we use it.
        instead: what is done in the versions before `since`, where there is something to say.
    """

    name: str
    use: str | None = None
    has: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    since: str = OLDEST
    until: str = NEWEST
    instead: str = ""

    def is_in(self, version: str) -> bool:
        """Whether we count on it in a version such as "0.26.0"."""
        return numbers(self.since) <= numbers(version)[:2] <= numbers(self.until)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 26, 0) for "0.26.0rc1.dev3+cpu"."""
    found: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: next((place for place, each in enumerate(part) if not each.isdigit()), len(part))]
        if not digits:
            break
        found.append(int(digits))
        if digits != part:
            break
    return tuple(found)


def _calls(module: str, uses: Mapping[str, str], since: str = OLDEST, until: str = NEWEST) -> Iterable[Relied]:
    return (Relied(f"{module}:{name}", use, since=since, until=until) for name, use in uses.items())


def _fields(fields: Mapping[str, str], since: str = OLDEST) -> Iterable[Relied]:
    return (Relied(name, has=tuple(has.split()), since=since) for name, has in fields.items())


_RANK = (
    Relied(
        "vllm.v1.engine.core:EngineCoreProc.run_engine_core",
        "vllm_config=, local_client=, handshake_address=, executor_class=, log_stats=, dp_rank=, local_dp_rank=",
        mentions=("EngineCoreProc", "data_parallel_index"),
    ),
    *_calls(
        "vllm.v1.engine.core",
        {
            "EngineCoreProc.__init__": "self, vllm_config=, local_client=, handshake_address=, executor_class=, "
            "log_stats=, engine_index=",
            "EngineCoreProc.pause_scheduler": "self, mode, clear_cache",
            "EngineCoreProc.resume_scheduler": "self",
            "EngineCore.collective_rpc": "self, method, args=",
            "EngineCore.reset_prefix_cache": "self, reset_running_requests, reset_connector",
            "EngineCore.sleep": "self, level, mode",
            "EngineCore.wake_up": "self, tags",
            "EngineCore.add_lora": "self, lora_request",
            "EngineCore.remove_lora": "self, lora_id",
        },
    ),
    Relied(
        "vllm.v1.engine.core:EngineCore.set_weight_version",
        "self, weight_version",
        since="0.27",
        instead="only the launcher knows the version",
    ),
    Relied(
        "vllm.v1.engine.core:EngineCore.compute_weight_checksums",
        "self",
        since="0.32",
        instead="digests of the same parameters, made by us",
    ),
    *_calls(
        "vllm.v1.executor",
        {
            "Executor.get_class": "vllm_config",
            "Executor._init_executor": "self",
            "Executor.determine_available_memory": "self",
            "Executor.initialize_from_config": "self, kv_cache_configs",
        },
    ),
    Relied(
        "vllm.v1.executor:Executor.compile_or_warm_up_model",
        "self",
        since="0.27",
        instead='`initialize_from_config` does it; the phase "capturing" is told as "allocating"',
    ),
    Relied("vllm.v1.executor.ray_utils:build_actor_name", "instance_id, rank, tp_size, pp_size, pcp_size"),
    Relied("vllm.v1.executor.ray_utils:initialize_ray_cluster", "parallel_config"),
    Relied("vllm.v1.executor.ray_utils:get_bundles_for_indices", "placement_group, bundle_indices, world_size"),
    Relied("vllm.v1.executor.ray_utils:get_bundles_sorted_by_node", "placement_group"),
    *_fields(
        {
            "vllm.config:VllmConfig": "instance_id kv_transfer_config parallel_config scheduler_config model_config",
            "vllm.config:KVTransferConfig": "engine_id",
            "vllm.config:ParallelConfig": "data_parallel_index data_parallel_size data_parallel_size_local "
            "distributed_executor_backend placement_group ray_runtime_env",
            "vllm.config:ModelConfig": "logits_processors enforce_eager revision get_diff_sampling_param",
            "vllm.config:SchedulerConfig": "policy max_num_seqs",
        }
    ),
)

_WEIGHTS = (
    *_calls(
        "vllm.v1.worker.gpu_worker",
        {
            "Worker.start_weight_update": "self",
            "Worker.update_weights": "self, update_info",
            "Worker.finish_weight_update": "self",
            "Worker.reload_weights": "self, weights_path=",
        },
    ),
    Relied(
        "vllm.v1.worker.gpu_worker:Worker",
        has=("weight_transfer_engine", "model_runner", "vllm_config", "device", "model_config", "rank"),
    ),
    *_calls(
        "vllm.v1.worker.gpu_model_runner",
        {
            "GPUModelRunner.reload_weights": "self, weights_path=",
            "GPUModelRunner.reset_encoder_cache": "self",
            "GPUModelRunner.reset_mm_cache": "self",
            "GPUModelRunner.get_model": "self",
        },
    ),
    Relied("vllm.config:set_current_vllm_config", "vllm_config"),
    Relied("vllm.config.weight_transfer:WeightTransferConfig", "backend="),
    *_calls(
        "vllm.distributed.weight_transfer.base",
        {
            "WeightTransferEngine": "config, vllm_config, device, model",
            "WeightTransferEngine.parse_update_info": "self, update_dict",
            "WeightTransferInitInfo": "",
        },
    ),
    *_calls(
        "vllm.distributed.weight_transfer.factory",
        {
            "WeightTransferEngineFactory.register_engine": "name, module_path_or_cls",
            "WeightTransferEngineFactory.create_engine": "config, vllm_config, device, model",
        },
    ),
    *_calls(
        "vllm.model_executor.model_loader.reload",
        {"initialize_layerwise_reload": "model", "finalize_layerwise_reload": "model, model_config"},
    ),
    Relied(
        "vllm.model_executor.model_loader.mtp_validation:disable_mtp_completeness_check",
        "",
        since="0.27",
        instead="there is no check to turn off",
    ),
    Relied("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", "layer, remove_weight"),
    Relied("vllm.lora.request:LoRARequest", "lora_name, lora_int_id, lora_path"),
)

_WIRE = (
    Relied("vllm.v1.serial_utils:MsgpackEncoder", ""),
    Relied("vllm.v1.serial_utils:MsgpackEncoder.encode", "self, obj"),
    Relied("vllm.v1.serial_utils:MsgpackDecoder", "t"),
    Relied("vllm.v1.serial_utils:MsgpackDecoder.decode", "self, bufs"),
    Relied("vllm.v1.pool.late_interaction:get_late_interaction_engine_index", "pooling_params, num_engines"),
    Relied(
        "vllm.v1.engine.utils:EngineZmqAddresses",
        "inputs=, outputs=, coordinator_input=, coordinator_output=, frontend_stats_publish_address=",
    ),
    Relied("vllm.v1.engine.utils:EngineHandshakeMetadata", "addresses=, parallel_config="),
    *_fields(
        {
            "vllm.v1.engine:EngineCoreRequest": "request_id data_parallel_rank client_index resumable "
            "abort_immediately pooling_params prompt_token_ids sampling_params mm_features prompt_embeds "
            "external_req_id",
            "vllm.v1.engine:EngineCoreOutputs": "engine_index outputs scheduler_stats utility_output finished_requests",
            "vllm.v1.engine:EngineCoreOutput": "request_id new_token_ids finish_reason new_logprobs "
            "new_prompt_logprobs_tensors events prefill_stats",
            "vllm.v1.engine:UtilityOutput": "call_id failure_message result",
            "vllm.v1.serial_utils:UtilityResult": "result",
        }
    ),
)

_FRONTEND = (
    *_calls(
        "vllm.v1.engine.core_client",
        {
            "EngineCoreClient.make_async_mp_client": "vllm_config, executor_class=, log_stats=, client_addresses=, "
            "client_count=, client_index=",
            "AsyncMPClient._apply_ready_response": "self, payload",
            "AsyncMPClient.get_output_async": "self",
            "AsyncMPClient.add_request_async": "self, request",
            "AsyncMPClient.abort_requests_async": "self, request_ids",
            "AsyncMPClient.call_utility_async": "self, method, *args",
            "AsyncMPClient.dp_engines_running": "self",
            "AsyncMPClient.ensure_alive": "self",
            "AsyncMPClient.shutdown": "self, timeout",
        },
    ),
    Relied(
        "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async",
        "self, method, *args",
        since="0.32",
        instead="every utility method comes down to `call_utility_async`",
    ),
    Relied("vllm.v1.engine.async_llm:AsyncLLM.__init__", mentions=("make_async_mp_client",)),
    Relied(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "vllm_config=, executor_class=, log_stats=, log_requests=",
        has=("logger_manager", "output_handler", "output_processor", "engine_core", "renderer", "model_config"),
    ),
    *_calls(
        "vllm.v1.engine.async_llm",
        {
            "AsyncLLM.shutdown": "self",
            "AsyncLLM.add_request": "self, request_id, prompt, params, data_parallel_rank=, lora_request=",
            "AsyncLLM.generate": "self, prompt, sampling_params, request_id, prompt_text=, data_parallel_rank=, "
            "lora_request=",
            "AsyncLLM.abort": "self, request_id, internal=",
            "AsyncLLM.check_health": "self",
            "AsyncLLM.get_supported_tasks": "self",
        },
    ),
    Relied("vllm.v1.engine.output_processor:OutputProcessor.propagate_error", "self, e"),
    Relied("vllm.v1.engine.output_processor:OutputProcessor.abort_requests", "self, request_ids, internal="),
    Relied("vllm.v1.engine.output_processor:OutputProcessor", has=("request_states",)),
    Relied("vllm.v1.engine.output_processor:RequestOutputCollector.put", "self, output"),
    *_fields(
        {
            "vllm.v1.engine.output_processor:RequestState": "parent_req queue",
            "vllm.v1.engine.parallel_sampling:ParentRequest": "child_requests",
        }
    ),
    Relied("vllm.v1.engine.exceptions:EngineDeadError", ""),
    Relied(
        "vllm.exceptions:GracefulHTTPError",
        has=("http_status",),
        since="0.29",
        instead="`GenerationError` carries the status, and `AsyncLLM.generate` and `encode` are wrapped to hand it on",
    ),
    Relied("vllm.v1.engine.async_llm:AsyncLLM.generate", mentions=("GracefulHTTPError",), since="0.29"),
    Relied("vllm.v1.engine.async_llm:AsyncLLM.encode", mentions=("GracefulHTTPError",), since="0.29"),
    # In place of the former: see older.py.
    Relied("vllm.v1.engine.exceptions:EngineGenerateError", until="0.28"),
    Relied("vllm.entrypoints.openai.engine.protocol:GenerationError", has=("status_code",), until="0.28"),
    *_calls(
        "vllm.renderers",
        {
            "BaseRenderer.clear_mm_cache_async": "self",
            "BaseRenderer.render_chat_async": "self, conversations, chat_params, tok_params",
            "BaseRenderer.render_cmpl_async": "self, prompts, tok_params",
            "ChatParams": "chat_template_kwargs=",
        },
    ),
    Relied("vllm.renderers:BaseRenderer", has=("default_cmpl_tok_params", "default_chat_tok_params")),
    Relied("vllm.renderers.inputs.preprocess:parse_model_prompt", "model_config, prompt"),
)

_RESIZE = (
    Relied("vllm.v1.metrics.loggers:StatLoggerManager", has=("engine_indexes", "stat_loggers")),
    Relied("vllm.v1.metrics.loggers:PerEngineStatLoggerAdapter", has=("engine_indexes", "per_engine_stat_loggers")),
    Relied(
        "vllm.v1.metrics.loggers:PrometheusStatLogger",
        "vllm_config, engine_indexes",
        has=("engine_indexes", "_counter_cls", "_gauge_cls", "_histogram_cls"),
    ),
    Relied("vllm.v1.metrics.loggers:PrometheusStatLogger.log_engine_initialized", "self"),
    Relied("vllm.v1.engine.input_processor:InputProcessor.process_inputs", mentions=("data_parallel_size",)),
)

_CONFIG_AND_SERVER = (
    Relied("vllm.engine.arg_utils:AsyncEngineArgs.from_cli_args", "args"),
    Relied("vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config", "self, usage_context="),
    Relied("vllm.engine.arg_utils:AsyncEngineArgs", has=("enable_log_requests",)),
    Relied("vllm.transformers_utils.config:maybe_register_config_serialize_by_value", ""),
    *(
        each
        for module, since, until in (
            ("vllm.entrypoints.common.cli_args", "0.33", NEWEST),
            ("vllm.entrypoints.launchers.cli_args", "0.29", "0.32"),
            ("vllm.entrypoints.openai.cli_args", OLDEST, "0.28"),
        )
        for each in _calls(
            module, {"make_arg_parser": "parser", "validate_parsed_serve_args": "args"}, since=since, until=until
        )
    ),
    Relied(
        "vllm.entrypoints.launchers.app:build_app",
        "args, supported_tasks, model_config",
        since="0.29",
        instead="`vllm.entrypoints.openai.api_server` has it",
    ),
    Relied("vllm.entrypoints.openai.api_server:build_app", "args, supported_tasks, model_config", until="0.28"),
    Relied(
        "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
        "engine_client, state, args, supported_tasks",
        since="0.29",
    ),
    Relied(
        "vllm.entrypoints.openai.api_server:init_app_state",
        "engine_client, state, args, supported_tasks",
        until="0.28",
    ),
    Relied("vllm.reasoning:ReasoningParserManager.import_reasoning_parser", "plugin_path"),
    Relied("vllm.tool_parsers:ToolParserManager.import_tool_parser", "plugin_path"),
)

_SAVED = (
    *_fields(
        {
            "vllm.outputs:RequestOutput": "request_id prompt prompt_token_ids prompt_logprobs outputs finished "
            "lora_request num_cached_tokens",
            "vllm.outputs:CompletionOutput": "index text token_ids cumulative_logprob logprobs finish_reason "
            "stop_reason lora_request",
            "vllm.outputs:PoolingRequestOutput": "request_id outputs prompt_token_ids num_cached_tokens finished",
            "vllm.outputs:PoolingOutput": "data",
            "vllm.logprobs:Logprob": "logprob rank decoded_token",
        }
    ),
    Relied(
        "vllm.outputs:WeightVersionSpan",
        has=("version", "start", "end"),
        since="0.32",
        instead="answers do not say which weights they came from",
    ),
    *_fields({"vllm.outputs:CompletionOutput": "weight_versions"}, since="0.32"),
)

RELIED = (*_RANK, *_WEIGHTS, *_WIRE, *_FRONTEND, *_RESIZE, *_CONFIG_AND_SERVER, *_SAVED)
"""All of it."""

PUBLIC = (
    "vllm:PoolingParams",
    "vllm:SamplingParams",
    "vllm.sampling_params:RequestOutputKind",
    "vllm.usage.usage_lib:UsageContext",
    "vllm.utils.argparse_utils:FlexibleArgumentParser",
    "vllm.v1.engine:FinishReason",
    "vllm.model_executor.models:ModelRegistry",
    "vllm.v1.engine.async_llm:",
    "vllm.entrypoints.openai.chat_completion.serving:",
)
"""Names that vLLM documents for its users, and modules that are imported for their side effects alone."""


def modules_of(name: str) -> tuple[str, ...]:
    """The modules that have had a name of their own level, newest first."""
    places = [relied for relied in RELIED if relied.name.partition(":")[2] == name]
    newest_first = sorted(places, key=lambda relied: numbers(relied.since), reverse=True)
    return tuple(dict.fromkeys(relied.name.partition(":")[0] for relied in newest_first))
