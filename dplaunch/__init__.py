"""The launcher for vLLM data parallelism: one engine core a rank, each a replaceable part.

with dplaunch.launch(model="M", dp=8) as group:
    outputs = group.generate(prompts, SamplingParams(max_tokens=64))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dplaunch._version import __version__
from dplaunch.errors import (
    AddressError,
    BackendError,
    DplaunchError,
    ExitCode,
    GroupClosedError,
    GroupDeadError,
    LogDirError,
    ModelError,
    NoGroupError,
    RankFailedError,
    RequestError,
    ResourceError,
    ResultsFileError,
    StandstillError,
    StartTimeoutError,
    UsageError,
    VllmError,
    WeightsError,
)

if TYPE_CHECKING:
    from dplaunch.api import launch, launch_async
    from dplaunch.batch_progress import BatchState
    from dplaunch.group import AsyncGroup
    from dplaunch.spec import LaunchSpec, ProbePolicy, RequestPolicy, RestartPolicy
    from dplaunch.sync import Group

__all__ = [
    "AddressError",
    "AsyncGroup",
    "BackendError",
    "BatchState",
    "DplaunchError",
    "ExitCode",
    "Group",
    "GroupClosedError",
    "GroupDeadError",
    "LaunchSpec",
    "LogDirError",
    "ModelError",
    "NoGroupError",
    "ProbePolicy",
    "RankFailedError",
    "RequestError",
    "RequestPolicy",
    "ResourceError",
    "RestartPolicy",
    "ResultsFileError",
    "StandstillError",
    "StartTimeoutError",
    "UsageError",
    "VllmError",
    "WeightsError",
    "__version__",
    "launch",
    "launch_async",
]

_WHERE = {
    "AsyncGroup": "dplaunch.group",
    "BatchState": "dplaunch.batch_progress",
    "Group": "dplaunch.sync",
    "LaunchSpec": "dplaunch.spec",
    "ProbePolicy": "dplaunch.spec",
    "RequestPolicy": "dplaunch.spec",
    "RestartPolicy": "dplaunch.spec",
    "launch": "dplaunch.api",
    "launch_async": "dplaunch.api",
}


def __getattr__(name: str) -> Any:
    # Looked up on first use: `dplaunch --help` needs none of it.
    if name not in _WHERE:
        raise AttributeError(f"module 'dplaunch' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
