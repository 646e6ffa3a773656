"""What the seam relies on in the launcher: AsyncLLM, the server, the flags, the outputs. See names.py."""

from __future__ import annotations

from dplaunch.seam.relied import OLDEST, Relied, calls, fields

FRONTEND = (
    *calls(
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
    *calls(
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
    # Replaced in the group's own engine, so our parameters have to be vLLM's: see steered.py.
    *calls(
        "vllm.v1.engine.async_llm",
        {
            "AsyncLLM.sleep": "self, level, mode",
            "AsyncLLM.wake_up": "self, tags",
            "AsyncLLM.is_sleeping": "self",
            "AsyncLLM.pause_generation": "self, mode=, clear_cache=",
            "AsyncLLM.resume_generation": "self",
            "AsyncLLM.is_paused": "self",
            "AsyncLLM.reset_prefix_cache": "self, reset_running_requests, reset_connector",
            "AsyncLLM.add_lora": "self, lora_request",
            "AsyncLLM.remove_lora": "self, lora_id",
            "AsyncLLM.collective_rpc": "self, method, timeout, args, kwargs",
            "AsyncLLM.init_weight_transfer_engine": "self, request",
            "AsyncLLM.start_weight_update": "self",
            "AsyncLLM.update_weights": "self, request",
            "AsyncLLM.finish_weight_update": "self",
            "AsyncLLM.start_draft_weight_update": "self",
        },
    ),
    *calls(
        "vllm.v1.engine.async_llm",
        {
            "AsyncLLM.update_weight_version": "self, new_version",
            "AsyncLLM.get_weight_version": "self",
        },
        since="0.27",
    ),
    Relied("vllm.v1.engine.async_llm:AsyncLLM.release_kv_cache_memory", "self", since="0.31"),
    Relied("vllm.v1.engine.async_llm:AsyncLLM.shutdown_weight_transfer_engine", "self", since="0.32"),
    Relied("vllm.v1.metrics.loggers:StatLoggerManager.record_sleep_state", "self, sleep, level"),
    Relied("vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter", "self, request"),
    Relied("vllm.v1.engine.output_processor:OutputProcessor.propagate_error", "self, e"),
    # Called, and replaced in the group's own engine: vLLM passes `internal` by position.
    Relied("vllm.v1.engine.output_processor:OutputProcessor.abort_requests", "self, request_ids, internal="),
    Relied("vllm.v1.engine.output_processor:OutputProcessor.process_outputs", "self, engine_core_outputs"),
    Relied("vllm.v1.engine.output_processor:OutputProcessor", has=("request_states", "external_req_ids")),
    Relied(
        "vllm.v1.engine.output_processor:RequestState.track_weight_version",
        "self, weight_version",
        since="0.32",
        instead="answers do not say which weights they came from",
    ),
    Relied("vllm.v1.engine.detokenizer:IncrementalDetokenizer.num_output_tokens", "self"),
    Relied("vllm.v1.engine.output_processor:RequestOutputCollector.put", "self, output"),
    *fields(
        {
            "vllm.v1.engine.output_processor:RequestState": "parent_req queue detokenizer",
            "vllm.v1.engine.parallel_sampling:ParentRequest": "child_requests",
        }
    ),
    Relied("vllm.v1.engine.exceptions:EngineDeadError", ""),
    Relied(
        "vllm.config:VllmConfig",
        has=("logging_config",),
        since="0.31",
        instead="`VLLM_CONFIGURE_LOGGING=0` while vLLM is imported keeps it from configuring loggers",
    ),
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
    *calls(
        "vllm.renderers",
        {
            "BaseRenderer.clear_mm_cache_async": "self",
            "BaseRenderer.render_chat_async": "self, conversations, chat_params, tok_params",
            "BaseRenderer.render_cmpl": "self, prompts, tok_params",
            "BaseRenderer.render_cmpl_async": "self, prompts, tok_params",
            "BaseRenderer._tokenize_prompt": "self, prompt, params",
            "ChatParams": "chat_template_kwargs=",
        },
    ),
    Relied(
        "vllm.renderers:BaseRenderer",
        has=("default_cmpl_tok_params", "default_chat_tok_params", "_tokenize_prompt_async"),
    ),
    Relied("vllm.renderers.inputs.preprocess:parse_model_prompt", "model_config, prompt"),
)

RESIZE = (
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

CONFIG_AND_SERVER = (
    Relied("vllm.engine.arg_utils:AsyncEngineArgs.from_cli_args", "args"),
    Relied("vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config", "self, usage_context="),
    Relied("vllm.engine.arg_utils:AsyncEngineArgs", has=("enable_log_requests",)),
    Relied("vllm.transformers_utils.config:maybe_register_config_serialize_by_value", ""),
    *(
        each
        for module, since, until in (
            ("vllm.entrypoints.common.cli_args", "0.33", None),
            ("vllm.entrypoints.launchers.cli_args", "0.29", "0.32"),
            ("vllm.entrypoints.openai.cli_args", OLDEST, "0.28"),
        )
        for each in calls(
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
    *calls("vllm.envs", {"enable_envs_cache": "", "disable_envs_cache": ""}),
    Relied("vllm.reasoning:ReasoningParserManager.import_reasoning_parser", "plugin_path"),
    Relied("vllm.tool_parsers:ToolParserManager.import_tool_parser", "plugin_path"),
)

SAVED = (
    *fields(
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
    *fields({"vllm.outputs:CompletionOutput": "weight_versions"}, since="0.32"),
)
