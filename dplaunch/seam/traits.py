"""What of an engine's config matters when its requests move to another rank."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from dplaunch.migrate import EngineTraits

LOGITS_PROCESSORS = "vllm.logits_processors"
"""The entry-point group of logits processors that vLLM loads into every engine."""


def engine_traits(config: Any) -> EngineTraits:
    """What is true for all requests of engines with this VllmConfig."""
    no_continue = no_repeat = ""
    if config.model_config.logits_processors or entry_points(group=LOGITS_PROCESSORS):
        no_continue = "the engine has logits processors of its own, which may remember"
    elif getattr(config, "watermark_config", None) is not None:  # From 0.30 on.
        no_continue = "the engine watermarks its text"
    # Up to 0.30 it is the model's config that says so.
    if getattr(config, "aux_output_config", config.model_config).enable_return_routed_experts:
        no_repeat = "the experts that its tokens went through are asked for"
    scheduler = config.scheduler_config
    slots = scheduler.max_num_seqs if scheduler.policy == "fcfs" else None
    return EngineTraits(no_continue=no_continue, no_repeat=no_repeat, slots=slots)
