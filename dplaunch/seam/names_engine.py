"""What the seam relies on in a rank and on the wire. See names.py."""

from __future__ import annotations

from dplaunch.seam.relied import Relied, calls, fields

RANK = (
    Relied(
        "vllm.v1.engine.core:EngineCoreProc.run_engine_core",
        "vllm_config=, local_client=, handshake_address=, executor_class=, log_stats=, dp_rank=, local_dp_rank=",
        mentions=("EngineCoreProc", "DPEngineCoreProc", "data_parallel_index", "data_parallel_rank"),
    ),
    *calls(
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
    Relied("vllm.v1.engine.core:DPEngineCoreProc._init_data_parallel", "self, vllm_config"),
    Relied(
        "vllm.v1.engine.core:DPEngineCoreProc.run_busy_loop",
        "self",
        mentions=("has_coordinator", "wave_complete=", "engines_running"),
    ),
    Relied(
        "vllm.v1.engine.core:DPEngineCoreProc._handle_client_request",
        "self, request_type, request",
        mentions=("START_DP_WAVE", "current_wave"),
    ),
    Relied("vllm.config:ParallelConfig._pick_stateless_dp_port", "self", mentions=("_coord_store_port",)),
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
    *calls(
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
    Relied(
        "vllm.v1.executor.ray_executor_v2:RayExecutorV2._select_tcpstore_port",
        "local_dp_rank, master_port",
        until="0.28",
    ),
    Relied("vllm.v1.executor.ray_utils:get_bundles_for_indices", "placement_group, bundle_indices, world_size"),
    Relied("vllm.v1.executor.ray_utils:get_bundles_sorted_by_node", "placement_group"),
    *fields(
        {
            "vllm.config:VllmConfig": "instance_id kv_transfer_config parallel_config scheduler_config model_config",
            "vllm.config:KVTransferConfig": "engine_id",
            "vllm.config:ParallelConfig": "data_parallel_index data_parallel_size data_parallel_size_local "
            "data_parallel_master_ip data_parallel_master_port _data_parallel_master_port_list _coord_store_port "
            "distributed_executor_backend placement_group ray_runtime_env",
            "vllm.config:ModelConfig": "logits_processors enforce_eager revision get_diff_sampling_param",
            "vllm.config:SchedulerConfig": "policy max_num_seqs",
        }
    ),
    Relied(
        "vllm.config:VllmConfig",
        has=("watermark_config",),
        since="0.30",
        instead="there are no watermarks that a continued answer would lose",
    ),
    Relied(
        "vllm.config:VllmConfig",
        has=("aux_output_config",),
        since="0.31",
        instead="the model's config says whether routed experts are returned",
    ),
    Relied("vllm.config:ModelConfig", has=("enable_return_routed_experts",), until="0.30"),
)

COMPILED = (
    Relied("vllm.compilation.backends:VllmBackend.__call__", mentions=("data_parallel_index", "rank", "cache_dir")),
    Relied("vllm.compilation.decorators:_support_torch_compile", mentions=("data_parallel_index", "rank")),
    Relied("vllm.compilation.compiler_interface:is_compile_cache_enabled", "vllm_additional_inductor_config"),
    Relied("vllm.config:VllmConfig.compute_hash", "self"),
    Relied("vllm.config:ParallelConfig.compute_hash", "self"),
    Relied("vllm.envs:compile_factors", ""),
    Relied("vllm.envs:VLLM_CACHE_ROOT"),
    Relied("vllm.v1.executor:Executor.collective_rpc", "self, method, args="),
    *fields(
        {
            "vllm.config:VllmConfig": "compilation_config",
            "vllm.config:CompilationConfig": "mode cache_dir local_cache_dir inductor_compile_config",
            "vllm.config:CompilationMode": "VLLM_COMPILE",
        }
    ),
)

WEIGHTS = (
    *calls(
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
    *calls(
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
    *calls(
        "vllm.distributed.weight_transfer.base",
        {
            "WeightTransferEngine": "config, vllm_config, device, model",
            "WeightTransferEngine.parse_update_info": "self, update_dict",
            "WeightTransferInitInfo": "",
        },
    ),
    *calls(
        "vllm.distributed.weight_transfer.factory",
        {
            "WeightTransferEngineFactory.register_engine": "name, module_path_or_cls",
            "WeightTransferEngineFactory.create_engine": "config, vllm_config, device, model",
        },
    ),
    *calls(
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
    Relied(
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel",
        mentions=("moe_kernel", "fused_experts", "process_weights_after_loading"),
        since="0.28",
        instead="a CPU kernel for experts is made anew each time that weights are loaded",
    ),
    Relied("vllm.lora.request:LoRARequest", "lora_name, lora_int_id, lora_path"),
    *calls(
        "vllm.v1.worker.gpu_worker",
        {
            "Worker.init_weight_transfer_engine": "self, init_info",
            "Worker.start_draft_weight_update": "self",
        },
    ),
    Relied(
        "vllm.v1.worker.gpu_worker:Worker.shutdown_weight_transfer_engine",
        "self",
        since="0.32",
        instead="workers let go of a trainer when they end, or meet the next one",
    ),
    *calls(
        "vllm.lora.ops.torch_ops.lora_ops",
        {
            "bgmv_expand": "inputs, lora_b_weights, output_tensor, lora_indices_tensor, add_inputs=",
            "bgmv_expand_slice": "inputs, lora_b_weights, output_tensor, lora_indices_tensor, slice_offset, "
            "slice_size, add_inputs=",
        },
    ),
    Relied("vllm.lora.punica_wrapper.punica_cpu:bgmv_expand"),
    Relied("vllm.lora.punica_wrapper.punica_cpu:bgmv_expand_slice"),
    Relied("vllm.config:VllmConfig", has=("lora_config", "device_config")),
)

WIRE = (
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
    *fields(
        {
            "vllm.v1.engine:EngineCoreRequest": "request_id data_parallel_rank client_index resumable "
            "abort_immediately pooling_params prompt_token_ids sampling_params mm_features prompt_embeds "
            "external_req_id",
            "vllm.v1.engine:EngineCoreOutputs": "engine_index outputs scheduler_stats utility_output finished_requests "
            "wave_complete",
            "vllm.v1.engine:EngineCoreRequestType": "ADD ABORT START_DP_WAVE UTILITY",
            "vllm.v1.engine:EngineCoreOutput": "request_id new_token_ids finish_reason new_logprobs "
            "new_prompt_logprobs_tensors events prefill_stats routed_experts",
            "vllm.v1.engine:UtilityOutput": "call_id failure_message result",
            "vllm.v1.serial_utils:UtilityResult": "result",
            "vllm.sampling_params:SamplingParams": "max_tokens min_tokens prompt_logprobs output_kind stop logprobs "
            "skip_clone",
            "vllm.sampling_params:RequestOutputKind": "FINAL_ONLY",
        }
    ),
    Relied(
        "vllm.v1.engine:EngineCoreOutputs",
        has=("weight_version",),
        since="0.32",
        instead="the frontend notes no versions of weights",
    ),
    Relied(
        "vllm.v1.engine:EngineCoreOutput",
        has=("new_sampling_mask",),
        since="0.28",
        instead="there are no sampling masks to cut when a request moves",
    ),
    Relied(
        "vllm.v1.engine:EngineCoreOutput",
        has=("prompt_token_id_logprobs",),
        since="0.31",
        instead="logprobs of chosen tokens of a prompt are not given",
    ),
    *fields({"vllm.sampling_params:SamplingParams": "prompt_logprob_token_ids prompt_logprob_start"}, since="0.31"),
)
