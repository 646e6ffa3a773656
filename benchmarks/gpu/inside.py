"""What a worker says of its own device; vLLM adds it to its worker class (`worker_extension_cls`)."""

from __future__ import annotations

import os
from typing import Any

EXTENSION = "benchmarks.gpu.inside.Inside"
"""The engine argument's value."""

FACTS = "dplaunch_gpu_facts"
"""The method that answers through vLLM's `collective_rpc`."""


class Inside:
    """Methods for vLLM's worker class; nothing of its own is kept."""

    def dplaunch_gpu_facts(self) -> dict[str, Any]:
        """Process, device and memory, as the worker itself sees them."""
        import torch

        facts: dict[str, Any] = {"pid": os.getpid(), "uuid": "", "allocated": 0, "reserved": 0}
        if torch.cuda.is_available():
            at = torch.cuda.current_device()
            facts["uuid"] = str(torch.cuda.get_device_properties(at).uuid).removeprefix("GPU-").lower()
            facts["allocated"] = torch.cuda.memory_allocated(at)
            facts["reserved"] = torch.cuda.memory_reserved(at)
        return facts
