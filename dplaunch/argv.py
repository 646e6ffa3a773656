"""A light reading of vLLM's flags, for planning only: vLLM's own parser reads them for real later."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from dplaunch.errors import UsageError

_SHORT = {
    "-ac": "attention_config",
    "-asc": "api_server_count",
    "-cc": "compilation_config",
    "-dc": "diffusion_config",
    "-dcp": "decode_context_parallel_size",
    "-dp": "data_parallel_size",
    "-dpa": "data_parallel_address",
    "-dpb": "data_parallel_backend",
    "-dpe": "data_parallel_external_lb",
    "-dph": "data_parallel_hybrid_lb",
    "-dpl": "data_parallel_size_local",
    "-dpm": "data_parallel_multi_port_external_lb",
    "-dpn": "data_parallel_rank",
    "-dpp": "data_parallel_rpc_port",
    "-dpr": "data_parallel_start_rank",
    "-ep": "enable_expert_parallel",
    "-n": "nnodes",
    "-pcp": "prefill_context_parallel_size",
    "-pp": "pipeline_parallel_size",
    "-q": "quantization",
    "-r": "node_rank",
    "-sc": "speculative_config",
    "-tp": "tensor_parallel_size",
}

_ALIASES = {"device_memory_utilization": "gpu_memory_utilization"}

# Which flags take no value and which take several is only needed to find a positional model among the values.
# Most switches say so by their name (enable, disable, no); these do not.
_SWITCHES = frozenset(
    {
        "aggregate_engine_logging",
        "allow_credentials",
        "allow_deprecated_quantization",
        "async_scheduling",
        "cohere_is_reasoning_model",
        "cudagraph_metrics",
        "data_parallel_external_lb",
        "data_parallel_hybrid_lb",
        "data_parallel_multi_port_external_lb",
        "dcp_q_replicate",
        "enforce_eager",
        "exclude_tools_when_tool_choice_none",
        "fail_on_environ_validation",
        "fully_sharded_loras",
        "grpc",
        "headless",
        "interleave_mm_strings",
        "jit_monitor_verbose",
        "kv_cache_metrics",
        "kv_sharing_fast_prefill",
        "language_model_only",
        "log_error_stack",
        "long_prefill_token_threshold_adaptive",
        "mm_device_do_normalize",
        "mm_encoder_only",
        "numa_bind",
        "ray_workers_use_nsight",
        "return_sampling_mask",
        "return_tokens_as_token_ids",
        "scheduler_reserve_full_isl",
        "skip_mm_profiling",
        "skip_tokenizer_init",
        "sleep_mode_offload_cudagraph",
        "specialize_active_lora",
        "swa_bounded_replay",
        "tokens_only",
        "trust_remote_code",
        "trust_request_chat_template",
        "trust_request_mm_kwargs",
        "use_fp64_gumbel",
        "use_replayssm",
        "use_tqdm_on_load",
    }
)
_SWITCH_PREFIXES = ("enable_", "disable_", "no_")
_VALUED_DESPITE_NAME = frozenset({"disable_access_log_for_endpoints"})

_SEVERAL = frozenset(
    {
        "allowed_media_domains",
        "api_key",
        "collect_detailed_traces",
        "cpu_offload_params",
        "cudagraph_capture_sizes",
        "ignore_patterns",
        "kv_cache_dtype_skip_layers",
        "logits_processors",
        "lora_modules",
        "lora_target_modules",
        "numa_bind_cpus",
        "numa_bind_nodes",
        "offload_params",
        "served_model_name",
        "sleep_preserve_parameter_names",
    }
)

_OWN_FLAG = {
    "data_parallel_size": "Use --dp N.",
    "data_parallel_backend": "Use --backend NAME.",
    "data_parallel_size_local": "Use --dp N; dplaunch places the ranks itself.",
}

_NOT_HERE = {
    "headless": "Leave it out: the launcher starts every rank.",
    "nnodes": "Use --backend ray for several machines; a rank does not span them.",
    "node_rank": "Use --backend ray for several machines; a rank does not span them.",
    "uds": "Use --host and --port.",
    "grpc": "Leave it out: HTTP is what dplaunch serves.",
    "grpc_port": "Leave it out: HTTP is what dplaunch serves.",
}
"""Flags of `vllm serve` that would start another kind of server, or a part of one."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag as typed.

    Args:
        name: its Python name, "tensor_parallel_size" for `-tp` too.
        typed: what the user wrote, without a value.
        values: the values that followed it.
    """

    name: str
    typed: str
    values: list[str] = field(default_factory=list)


def scan(argv: Sequence[str]) -> dict[str, str | bool]:
    """The flags by Python name: a switch is True, its `--no-` form False, several values are joined."""
    found: dict[str, str | bool] = {}
    for flag in _read(argv)[0]:
        if flag.values:
            found[flag.name] = " ".join(flag.values)
        elif flag.name.startswith("no_"):
            found[flag.name.removeprefix("no_")] = False
        else:
            found[flag.name] = True
    return found


def typed_flags(argv: Sequence[str]) -> list[str]:
    """The flags as typed, without their values."""
    return [flag.typed for flag in _read(argv)[0]]


def split_model(argv: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """The model given as a bare word, as in `vllm serve M`, and the rest.

    Raises:
        UsageError: when there is more than one bare word.
    """
    bare = _read(argv)[1]
    if not bare:
        return None, tuple(argv)
    if len(bare) > 1:
        first, second = (argv[index] for index in bare[:2])
        raise UsageError(f"one model is served, not {first!r} and {second!r}", hint="Name it with --model.")
    return argv[bare[0]], tuple(token for index, token in enumerate(argv) if index != bare[0])


def refuse_data_parallel(argv: Sequence[str]) -> None:
    """Refuses the flags of vLLM whose work dplaunch does, or that it has no part for.

    Raises:
        UsageError: when one is there; names the dplaunch flag to use instead.
    """
    for flag in _read(argv)[0]:
        if flag.name.startswith("data_parallel"):
            hint = _OWN_FLAG.get(flag.name, "Leave it out: dplaunch places the ranks itself.")
            raise UsageError(f"{flag.typed} is not for dplaunch", hint=hint)
        if flag.name in _NOT_HERE:
            raise UsageError(f"{flag.typed} cannot be served by dplaunch", hint=_NOT_HERE[flag.name])
        if flag.name == "api_server_count" and flag.values not in ([], ["0"], ["1"]):
            raise UsageError(
                f"{flag.typed} {flag.values[0]} cannot be: dplaunch runs one frontend in this version",
                hint="Leave it out.",
            )


def nearest_flag(unknown: str, known: Iterable[str]) -> str | None:
    """The known flag that `unknown` was probably meant to be; None when none is near.

    Case, a value after `=`, and `_` for `-` do not count.
    """
    plain = {_plain(flag): flag for flag in known}
    near = difflib.get_close_matches(_plain(unknown), plain, n=1, cutoff=0.7)
    return plain[near[0]] if near else None


def nearest_word(unknown: str, known: Collection[str]) -> str | None:
    """The known word that is nearest to `unknown`; None when none is near."""
    near = difflib.get_close_matches(unknown, known, n=1)
    return near[0] if near else None


def python_name(flag: str) -> str:
    """A flag's Python name: `--max-model-len` is max_model_len, `-tp` tensor_parallel_size."""
    if flag in _SHORT:
        return _SHORT[flag]
    name = flag.lstrip("-").replace("-", "_")
    return _ALIASES.get(name, name)


def _plain(flag: str) -> str:
    return flag.partition("=")[0].lower().replace("_", "-")


def _read(argv: Sequence[str]) -> tuple[list[Flag], list[int]]:
    """The flags with their values, and where the bare words are."""
    flags: list[Flag] = []
    bare: list[int] = []
    room = 0
    for index, token in enumerate(argv):
        if _is_flag(token):
            typed, equals, value = token.partition("=")
            flags.append(Flag(python_name(typed), typed, [value] if equals else []))
            room = 0 if equals else _values_of(flags[-1].name, len(argv))
        elif room:
            flags[-1].values.append(token)
            room -= 1
        else:
            bare.append(index)
    return flags, bare


def _is_flag(token: str) -> bool:
    return re.match(r"--?[^\W\d]", token) is not None


def _values_of(name: str, everything: int) -> int:
    if name in _SEVERAL:
        return everything
    is_switch = name in _SWITCHES or name.startswith(_SWITCH_PREFIXES)
    return 0 if is_switch and name not in _VALUED_DESPITE_NAME else 1
