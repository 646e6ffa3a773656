"""What of Ray is on this machine, told from files and the process table: nothing is imported or connected to."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dplaunch.doctor import Check

INSTALL = "pip install 'dplaunch[ray]'"

NODE_PROCESS = "raylet"
"""Runs once for each node of a cluster, whoever started it."""


def check_ray() -> Iterator[Check]:
    """Ray's version and the cluster that --backend ray would use; without Ray the line that installs it."""
    from dplaunch.doctor import Check, Status

    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        yield Check("ray", Status.OK, f"not installed (only --backend ray needs it: {INSTALL})")
        return
    yield Check("ray", Status.OK, f"{version}; {describe_cluster(os.environ, running=_is_running())}")


def describe_cluster(environ: Mapping[str, str], *, running: bool) -> str:
    """Which cluster a launch would use, and how to use another.

    Args:
        environ: where `RAY_ADDRESS` and Ray's own directory are looked up.
        running: whether a node of a cluster runs on this machine.
    """
    given = environ.get("RAY_ADDRESS")
    if given:
        return f"RAY_ADDRESS={given} is what --backend ray attaches to"
    if not running:
        return "no cluster runs on this machine: --backend ray starts a local one for each launch"
    address = _noted_address(environ)
    where = f" ({address})" if address else ""
    return f"a cluster runs on this machine{where}: --ray-address auto attaches to it"


def _noted_address(environ: Mapping[str, str]) -> str:
    """The address that `ray start` left behind; it may be that of a cluster that has ended."""
    directory = Path(environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp")
    try:
        return (directory / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _is_running() -> bool:
    import psutil

    return any(process.info["name"] == NODE_PROCESS for process in psutil.process_iter(["name"]))
