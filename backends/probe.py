"""The question to one node of a Ray cluster: what it is, before anything is sent there."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dplaunch import seam
from dplaunch._version import __version__
from dplaunch.errors import BackendError

PROBE_TIMEOUT_S = 60.0
"""Seconds for a node to answer what it is: it starts a Python process for that."""

NEWS_S = 5.0
"""Seconds until the launcher's own node has heard of one that has just joined: until then Ray sends nothing there."""

NEWS_POLL_S = 0.2

OWN_VARIABLES = (
    *("HOSTNAME", "HOME", "USER", "LOGNAME", "PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"),
    *("TMPDIR", "XDG_RUNTIME_DIR", "CUDA_HOME"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"),
)
"""What describes the machine that a process is on: a rank elsewhere gets its own node's values."""


class NodeGoneError(BackendError):
    """Raised for a node that Ray still lists, but sends nothing to: it is dying, or dead already."""


async def ask(node_id: str, name: str, paths: Sequence[str]) -> dict[str, Any]:
    """What a node answers about itself, checked against what it must have.

    Raises:
        BackendError: see `survey`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(make_probe()).options(
        num_cpus=0, max_retries=1, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    )

    async def once_it_is_known() -> dict[str, Any]:
        patience = time.monotonic() + NEWS_S
        while True:
            try:
                found: dict[str, Any] = await task.remote(list(paths), OWN_VARIABLES)
                return found
            except ray.exceptions.TaskUnschedulableError as error:
                if time.monotonic() > patience:
                    raise NodeGoneError(f"node {name} takes nothing: {first_line(error)}") from error
            await asyncio.sleep(NEWS_POLL_S)

    try:
        answer = await asyncio.wait_for(once_it_is_known(), PROBE_TIMEOUT_S)
    except TimeoutError:
        raise BackendError(
            f"node {name} did not answer within {PROBE_TIMEOUT_S:.0f} s",
            hint="See its state with `ray status`, or leave it out: --nodes A,B names those to use.",
        ) from None
    except ray.exceptions.RayError as error:
        raise BackendError(f"node {name} could not be asked what it has: {first_line(error)}") from error
    _check(name, answer)
    return answer


def make_probe() -> Callable[[list[str], Sequence[str]], dict[str, Any]]:
    """The function that a node runs to say what it is.

    It travels by value, because it is defined inside a function: a node without dplaunch can run it and say so.
    """

    def probe(paths: list[str], names: Sequence[str]) -> dict[str, Any]:
        import os
        import platform

        answer: dict[str, Any] = {
            "python": platform.python_version(),
            "dplaunch": None,
            "vllm": None,
            "missing": [path for path in paths if not os.path.exists(os.path.expanduser(path))],
            "env": {name: os.environ[name] for name in names if name in os.environ},
        }
        try:
            from dataclasses import asdict

            from dplaunch.backends.whereabouts import whereabouts

            from dplaunch import seam
            from dplaunch._version import __version__
            from dplaunch.inventory import local_node
        except ImportError as error:
            return {**answer, "error": str(error)}
        # Not this task's own CUDA_VISIBLE_DEVICES: Ray hides all devices from what asks for none.
        found = asdict(local_node({}))
        return {
            **answer,
            "dplaunch": __version__,
            "vllm": seam.installed_version(),
            "where": whereabouts(),
            "node": found,
        }

    return probe


def _check(name: str, answer: Mapping[str, Any]) -> None:
    wanted = {"dplaunch": __version__, "vllm": seam.installed_version(), "python": platform.python_version()}
    for what, version in wanted.items():
        title = {"vllm": "vLLM", "python": "Python"}.get(what, what)
        if answer[what] is None:
            said = f" ({answer['error']})" if answer.get("error") else ""
            raise BackendError(
                f"node {name} has no {title}{said}, this machine has {version}",
                hint="Install the same on every node, or leave the node out: --nodes A,B names those to use.",
            )
        if answer[what] != version:
            raise BackendError(
                f"node {name} has {title} {answer[what]}, this machine has {version}",
                hint="Install the same on every node, or leave the node out: --nodes A,B names those to use.",
            )
    if answer["missing"]:
        raise BackendError(
            f"node {name} does not have {', '.join(answer['missing'])}",
            hint="Put it on a file system that every node sees, copy it to the same path there, or use a hub name.",
        )


def first_line(error: BaseException) -> str:
    """What an error says first; Ray's go on for a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
