"""For which device the installed packages were built, read from their files: nothing is imported."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from pathlib import Path

from dplaunch import seam
from dplaunch.errors import ResourceError
from dplaunch.inventory import Inventory
from dplaunch.spec import VLLM_ENGINE, LaunchSpec

Build = tuple[str, str]
"""A package's version, and for what it was built: "CPU", "CUDA 13.0", or "" where it does not say."""

NO_DEVICE_HINT = (
    "`nvidia-smi` says whether the driver finds one; CUDA_VISIBLE_DEVICES, where it is set, limits what is used. "
    "For ranks on the CPU install dplaunch[cpu] in place of dplaunch[cuda]."
)


def check_build(spec: LaunchSpec, inventory: Inventory) -> None:
    """Refuses what vLLM would fail on later, with "Failed to infer device type".

    Raises:
        ResourceError: when torch is built for CUDA and there is no device.
    """
    if spec.engine != VLLM_ENGINE or inventory.device_type == "cuda":
        return
    # vLLM's own word for it (0.33, platforms/__init__.py); whether its wheel can do it is seen then.
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return
    if (torch := in_need_of_device()) is not None:
        where = "this machine has" if len(inventory.nodes) == 1 else f"these {len(inventory.nodes)} machines have"
        raise ResourceError(
            f"{where} no NVIDIA device, and torch {torch[0]} is built for {torch[1]}", hint=NO_DEVICE_HINT
        )


def in_need_of_device() -> Build | None:
    """The build of a torch that vLLM uses with an NVIDIA device only; None where it runs on the CPU."""
    torch = build_of("torch")
    # vLLM for the CPU runs on a torch for CUDA too, which is what pip takes for it from the default index.
    return None if torch is None or not torch[1].startswith("CUDA") or vllm_is_for_cpu() else torch


def vllm_is_for_cpu() -> bool:
    """Whether the installed vLLM is the CPU build: by its name, or by its version ("0.32.0+cpu")."""
    return "cpu" in " ".join(seam.installed() or ())


def build_of(name: str) -> Build | None:
    """The version of a package built against torch, and for what: "CPU", "CUDA 13.0" or ""; None when missing."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    source = ""
    with contextlib.suppress(OSError):
        source = Path(str(distribution.locate_file(f"{name}/version.py"))).read_text()
    # The wheel's own name may lack the "+cpu" or "+cu130" that the code inside carries.
    stated = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", source, re.MULTILINE)
    version = stated[1] if stated else distribution.version
    cuda = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", source, re.MULTILINE)
    return version, _build_of(version, cuda[1] if cuda else None)


def _build_of(version: str, cuda: str | None) -> str:
    _, _, local = version.partition("+")
    if cuda is not None:
        return f"CUDA {cuda}"
    if local.startswith("cu"):
        digits = local.removeprefix("cu")
        return f"CUDA {digits[:-1]}.{digits[-1:]}" if digits.isdecimal() else "CUDA"
    return "CPU" if local.startswith("cpu") else ""
