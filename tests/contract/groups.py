"""Makes groups of stand-in ranks: all of dplaunch and vLLM's frontend, and engines that do as they are told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dplaunch.events import Event
from dplaunch.group import AsyncGroup
from dplaunch.spec import LaunchSpec, Mode, RestartPolicy
from dplaunch.testing import STANDIN_ENGINE, StandInPlan
from dplaunch.testing.tokens import VOCAB_SIZE

BASE_ID = "contract"

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB_SIZE,
    "torch_dtype": "float32",
}


TINY_MOE = {**TINY_LLAMA, "num_local_experts": 4}
"""One that says that it has experts, for groups in lockstep. A class that vLLM has not seen yet would cost it a
process that imports everything."""


def tiny_model(directory: Path, config: Mapping[str, Any] = TINY_LLAMA) -> Path:
    """A directory that holds all of a model that nobody loads."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config)))
    return directory


def group_spec(directory: Path, backend: str, plan: StandInPlan, dp: int, **options: Any) -> LaunchSpec:
    """A launch of stand-in engines whose model and logs are in `directory`."""
    defaults: dict[str, Any] = {
        "start_timeout_s": 60.0,
        "shutdown_timeout_s": 5.0,
        "restart": RestartPolicy(backoff_s=0.05),
        "log_dir": directory / "logs",
        "base_id": BASE_ID,
        "engine": STANDIN_ENGINE,
    }
    engine_args = options.pop("engine_args", {})
    in_lockstep = options.get("mode") is Mode.LOCKSTEP
    return LaunchSpec(
        model=str(tiny_model(directory / "model", TINY_MOE if in_lockstep else TINY_LLAMA)),
        dp=dp,
        backend=backend,
        engine_args={
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": "float32",
            "max_num_seqs": plan.max_num_seqs,
            "kv_cache_memory_bytes": 2**26,
            "standin": plan,
            **engine_args,
        },
        **(defaults | options),
    )


class Watched:
    """A group and all that happened to it."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.events: list[Event] = []
        self.group = AsyncGroup(spec, listeners=[self.events.append], quiet_vllm=True)

    def states(self, rank: int) -> list[tuple[str, int]]:
        """The states that a rank went through, each with its incarnation."""
        return [(e.state.value, e.incarnation) for e in self.events if e.rank == rank and e.state and not e.phase]

    def phases(self, rank: int) -> list[str]:
        """The phases that a rank reported."""
        return [event.phase for event in self.events if event.rank == rank and event.phase]
