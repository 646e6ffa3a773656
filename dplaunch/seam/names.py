"""Every private name of vLLM that the seam relies on, as data: where it is, how we use it, and in which versions.

The header of `dplaunch.seam` says what each is for. `make seam VERSION=...` checks a version's sources against this,
and tests/seam the recorded versions and the one that is installed.
"""

from __future__ import annotations

from dplaunch.seam.names_engine import COMPILED, RANK, WEIGHTS, WIRE
from dplaunch.seam.names_frontend import CONFIG_AND_SERVER, FRONTEND, RESIZE, SAVED
from dplaunch.seam.relied import numbers

RELIED = (*RANK, *COMPILED, *WEIGHTS, *WIRE, *FRONTEND, *RESIZE, *CONFIG_AND_SERVER, *SAVED)
"""All of it."""

PUBLIC = (
    "vllm.pooling_params:PoolingParams",
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
