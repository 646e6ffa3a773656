"""What the user asked for: frozen, validated, typed. The command, the config file and Python build the same one."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dplaunch.errors import UsageError

VLLM_ENGINE = "dplaunch.seam.rank:run_engine"
"""What runs inside a rank, unless a test says otherwise."""

DEFAULT_START_TIMEOUT_S = 1800.0
"""Seconds until a rank that is not ready fails the launch: half an hour, for weights on a slow disk."""


class StartMethod(enum.StrEnum):
    """How the mp backend makes a rank's process."""

    FORK = "fork"  # from the zygote, which has imported everything
    SPAWN = "spawn"  # a fresh interpreter that imports everything again


class ExecutorKind(enum.StrEnum):
    """How a rank drives its devices (vLLM's distributed executor backend)."""

    AUTO = "auto"  # chosen by the plan for throughput
    UNI = "uni"  # in the engine core's own process
    MP = "mp"  # one worker process a device
    RAY = "ray"  # one Ray actor a device


class Mode(enum.StrEnum):
    """Whether the ranks share one fate."""

    AUTO = "auto"  # decided by the plan
    INDEPENDENT = "independent"  # the ranks share nothing: each is a replaceable part
    LOCKSTEP = "lockstep"  # the ranks step together (expert parallelism): the group is the part


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a rank that dies while serving comes back.

    Args:
        limit: restarts of one rank allowed within the window; 0 means never.
        window_s: seconds after which a restart no longer counts.
        backoff_s: seconds before the second restart within the window; doubled for each further one.
        jitter: the share of a wait that is left to chance, so that ranks that died together do not start together.

    Raises:
        UsageError: when a value cannot be.
    """

    limit: int = 3
    window_s: float = 300.0
    backoff_s: float = 1.0
    jitter: float = 0.25

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise UsageError(f"restarts must be 0 or more, not {self.limit}", hint="0 means never.")
        if self.window_s < 0:
            raise UsageError(f"the restart window must not be negative, not {self.window_s} s")
        if self.backoff_s < 0 or not 0 <= self.jitter <= 1:
            raise UsageError(f"cannot back off by {self.backoff_s} s with jitter {self.jitter}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePolicy:
    """When a rank that says nothing is taken for hung.

    Args:
        interval_s: seconds of silence after which a rank is asked whether it is there.
        timeout_s: seconds that its engine has to answer; then it is ended and replaced. 0 means that none is asked.
        busy_timeout_s: seconds that it may be silent while it is at a call that was sent before, or compiles.

    Raises:
        UsageError: when a value cannot be.
    """

    interval_s: float = 5.0
    timeout_s: float = 60.0
    busy_timeout_s: float = 1800.0
    """Half an hour: a large model's weights from a slow disk take minutes."""

    def __post_init__(self) -> None:
        if self.interval_s <= 0 or self.timeout_s < 0:
            raise UsageError(
                f"cannot probe every {self.interval_s} s with a deadline of {self.timeout_s} s",
                hint="A deadline of 0 turns the probes off.",
            )
        if self.busy_timeout_s <= 0:
            raise UsageError(f"a rank that is busy needs some time, not {self.busy_timeout_s} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPolicy:
    """What becomes of requests when things go wrong.

    Args:
        max_failures: dying ranks that one request may have been on; then it fails by name and is moved no more.
        max_queue: requests that may be in the group at once, running and waiting; beyond that new ones are refused
            (503 with Retry-After over HTTP). 0 means no bound.
        poison_file: the text of requests that failed so is added to this file; None keeps it nowhere.

    Raises:
        UsageError: when a value cannot be.
    """

    max_failures: int = 2
    max_queue: int = 0
    poison_file: Path | None = None

    def __post_init__(self) -> None:
        if self.max_failures < 1:
            raise UsageError(f"max_request_failures must be at least 1, not {self.max_failures}")
        if self.max_queue < 0:
            raise UsageError(f"max_queue must be 0 or more, not {self.max_queue}", hint="0 means no bound.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Where in a cluster the ranks go; a backend that knows no cluster refuses all but the defaults.

    Args:
        address: the cluster to attach to ("auto", "10.0.0.1:6379"); None for the one in `RAY_ADDRESS`, else the one
            that this process is connected to already, else a local one for this launch.
        nodes: the nodes that may be used, by name or address; empty for all.
        num_gpus: the share of a device that each worker of a rank holds; below 1 leaves room for a trainer beside it.
        placement_groups: the user's own placement groups: one for each rank, or one for all.
        bundle_indices: for each rank the bundles of its placement group that are its own; None lets the backend choose.

    Raises:
        UsageError: when a value cannot be.
    """

    address: str | None = None
    nodes: tuple[str, ...] = ()
    num_gpus: float = 1.0
    placement_groups: tuple[Any, ...] = ()
    bundle_indices: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.address == "":
            raise UsageError("ray_address is empty", hint="Use auto, HOST:PORT, or leave it out.")
        if isinstance(self.num_gpus, bool) or not isinstance(self.num_gpus, int | float) or not 0 < self.num_gpus <= 1:
            raise UsageError(f"num_gpus must be above 0 and at most 1, not {self.num_gpus!r}")
        if self.bundle_indices is not None and not self.placement_groups:
            raise UsageError("bundle_indices needs placement_groups", hint="They count the bundles of your own groups.")

    def refuse(self, backend: str) -> None:
        """Raises for the first option that is set, in the name of a backend that has no use for it.

        Raises:
            UsageError: names the option, and the backend that takes it.
        """
        for each in fields(self):
            if getattr(self, each.name) != each.default:
                name = _CLUSTER_NAMES.get(each.name, each.name)
                raise UsageError(f"{name} is not for backend {backend}", hint="Use backend ray, or leave it out.")

    def check_ranks(self, dp: int) -> None:
        """Checks that what is given for each rank is there for each.

        Raises:
            UsageError: names the option and both numbers.
        """
        groups, bundles = len(self.placement_groups), self.bundle_indices
        if groups > 1 and groups != dp:
            raise UsageError(
                f"placement_groups has {groups} groups, but dp={dp}", hint="Give one for each rank, or one for all."
            )
        if bundles is not None and len(bundles) != dp:
            raise UsageError(
                f"bundle_indices names {len(bundles)} ranks, but dp={dp}",
                hint="Give one list of bundles a rank, for example [[0], [1]] for dp=2.",
            )
        for rank, indices in enumerate(bundles or ()):
            if not indices or not all(isinstance(index, int) and index >= 0 for index in indices):
                raise UsageError(
                    f"rank {rank} was given bundle_indices {list(indices)}",
                    hint="Count the bundles of its placement group from 0, and give at least one.",
                )


_CLUSTER_NAMES = {
    "address": "ray_address (--ray-address)",
    "nodes": "nodes (--nodes)",
    "num_gpus": "num_gpus (--num-gpus)",
}
"""What the user calls an option: in Python, and as a flag where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """One launch, as asked for.

    Args:
        model: a path or a hub name; None for the built-in model.
        dp: number of data-parallel ranks.
        backend: the name of a backend (entry-point group `dplaunch.backends`).
        engine_args: vLLM engine arguments by their Python names, as `vllm.LLM` takes them.
        vllm_argv: vLLM engine and server flags as typed on the command line; vLLM's parser reads them.
        devices: for each rank its devices (CUDA indices or UUIDs; cores on CPU); None lets the plan choose.
        executor: how each rank drives its devices.
        mode: independent, lockstep, or decided by the plan.
        start_method: how mp makes processes.
        start_timeout_s: seconds until a rank that is not ready fails the launch.
        shutdown_timeout_s: seconds that ranks get between SIGTERM and SIGKILL.
        restart: when a rank that dies while serving comes back.
        probe: when a rank that says nothing is taken for hung.
        requests: what becomes of requests when things go wrong.
        min_ranks: the group stops when fewer ranks than this are left and none may come back.
        log_dir: where the ranks' logs go; None for a new directory under the user's state directory.
        base_id: the group's id; None for a fresh one.
        env: variables set in every rank over its made environment.
        log_stats: whether vLLM's metrics are collected.
        cluster: where in a cluster the ranks go.
        any_vllm: whether a vLLM is tried that dplaunch was not checked with.
        engine: what runs inside a rank, as "module:function"; anything but the default is for tests.

    Raises:
        UsageError: when a value cannot be.
    """

    model: str | None = None
    dp: int = 1
    backend: str = "mp"
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    vllm_argv: tuple[str, ...] = ()
    devices: tuple[tuple[str, ...], ...] | None = None
    executor: ExecutorKind = ExecutorKind.AUTO
    mode: Mode = Mode.AUTO
    start_method: StartMethod = StartMethod.FORK
    start_timeout_s: float = DEFAULT_START_TIMEOUT_S
    shutdown_timeout_s: float = 10.0
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    probe: ProbePolicy = field(default_factory=ProbePolicy)
    requests: RequestPolicy = field(default_factory=RequestPolicy)
    min_ranks: int = 1
    log_dir: Path | None = None
    base_id: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    log_stats: bool = False
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    any_vllm: bool = False
    engine: str = VLLM_ENGINE

    def __post_init__(self) -> None:
        _check_dp(self.dp)
        if not 1 <= self.min_ranks <= self.dp:
            raise UsageError(f"min_ranks must be between 1 and dp={self.dp}, not {self.min_ranks}")
        if self.start_timeout_s <= 0:
            raise UsageError(f"start_timeout_s must be positive, not {self.start_timeout_s}")
        if self.shutdown_timeout_s < 0:
            raise UsageError(f"shutdown_timeout_s must not be negative, not {self.shutdown_timeout_s}")
        if self.devices is not None and len(self.devices) != self.dp:
            raise UsageError(
                f"devices names {len(self.devices)} ranks, but dp={self.dp}",
                hint="Give one group of devices a rank, for example devices=[['0'], ['1']] for dp=2.",
            )
        self.cluster.check_ranks(self.dp)
        refused = sorted(name for name in self.engine_args if name.startswith("data_parallel_"))
        if refused:
            raise UsageError(f"{refused[0]} is not for dplaunch", hint="Use dp=N; dplaunch places the ranks itself.")
        # Callers keep their own dicts: a frozen spec must not change with them.
        object.__setattr__(self, "engine_args", MappingProxyType(dict(self.engine_args)))
        object.__setattr__(self, "env", MappingProxyType(dict(self.env)))


def _check_dp(dp: object) -> None:
    # bool is an int to Python, but dp=True is a mistake.
    if not isinstance(dp, int) or isinstance(dp, bool):
        raise UsageError(f"dp must be a whole number of ranks, not {dp!r}", hint="For example dp=2.")
    if dp < 1:
        raise UsageError(f"dp must be at least 1, not {dp}", hint="For example dp=2, one rank for each device.")
