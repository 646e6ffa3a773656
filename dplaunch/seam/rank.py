"""vLLM's engine core as the body of a rank. Runs inside the rank's process, under `rank_main`.

An independent rank runs as engine 0 of 1, so vLLM neither suffixes its names nor picks a device for it: both
are done once, by dplaunch, for every backend. Only `data_parallel_index` says which rank it is, as vLLM itself
does it for dense models (`ParallelConfig.reconfigure_for_independent_dp_rank`). A rank in lockstep runs as one of
vLLM's ranks, which suffixes its KV connector's name; what it has made of that is put right again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dplaunch.backend import RankBoot
from dplaunch.channel import COMPILING, RankChannel
from dplaunch.rank_env import PLACEMENT_GROUP_VARIABLE
from dplaunch.seam import compiled, lockstep, lora
from dplaunch.seam.older import OlderCore, master_port
from dplaunch.seam.weights import RankWeights

REPORT = "dplaunch_report"
"""A utility method that our engine core adds: who it is, the last step of a start."""

PING = "dplaunch_ping"
"""A utility method that our engine core adds: whether its loop goes round, which is what a probe asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPayload:
    """What a vLLM rank is made from.

    Args:
        config: the pickled VllmConfig that all ranks share.
        executor: "uni", "mp", "ray", or a class path.
        log_stats: whether the engine collects statistics.
        place: where the rank stands among those that it steps with; None for an independent one.
    """

    config: bytes
    executor: str
    log_stats: bool
    place: lockstep.LockstepPlace | None = None


def run_engine(boot: RankBoot, channel: RankChannel) -> None:
    """Runs vLLM's engine core until it is told to stop (SIGTERM) or fails.

    Raises:
        Exception: what vLLM raised; `rank_main` tells the launcher.
    """
    import cloudpickle
    from vllm.v1.engine import core
    from vllm.v1.executor import Executor

    payload: RankPayload = cloudpickle.loads(boot.payload)
    config = cloudpickle.loads(payload.config)
    _name(config, boot)
    config.parallel_config.distributed_executor_backend = payload.executor
    if payload.executor == "ray":
        join_cluster(config.parallel_config, os.environ)
        if payload.place is None:
            config.parallel_config.data_parallel_master_port = master_port(boot.instance_id, boot.rank)
    if boot.cpus:
        _use_cores(len(boot.cpus))
    compiled.keep_kernels(config.device_config.device_type, os.environ)
    executor_class = _with_phases(Executor.get_class(config), boot, channel, eager=config.model_config.enforce_eager)
    # In this process only, and only for this: run_engine_core looks the class up in its module.
    run_engine_core = core.EngineCoreProc.run_engine_core
    place = payload.place
    if place is None:
        core.EngineCoreProc = _reporting(core.EngineCoreProc, boot, channel)
    else:
        lockstep.take_place(config.parallel_config, place)
        core.DPEngineCoreProc = _reporting(lockstep.core_class(place), boot, channel)
    run_engine_core(
        vllm_config=config,
        local_client=True,
        handshake_address=boot.handshake_address,
        executor_class=executor_class,
        log_stats=payload.log_stats,
        dp_rank=0 if place is None else place.rank,
        local_dp_rank=0 if place is None else place.local_rank,
    )


def join_cluster(parallel: Any, environ: Mapping[str, str]) -> None:
    """Connects to the cluster that holds this rank's devices, and has vLLM's Ray executor put its workers there.

    Does nothing where the backend holds none: vLLM then makes a placement group by itself.

    Args:
        parallel: vLLM's ParallelConfig, which gets the placement group.
        environ: says which cluster and which placement group.
    """
    group = environ.get(PLACEMENT_GROUP_VARIABLE)
    if group is None:
        return
    import ray
    from ray.util.placement_group import PlacementGroup

    # Before vLLM does it: Ray takes over SIGTERM, which the engine core handles from its own start on.
    ray.init(address=environ["RAY_ADDRESS"], runtime_env=parallel.ray_runtime_env)
    parallel.placement_group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group)))


def _name(config: Any, boot: RankBoot) -> None:
    config.instance_id = boot.instance_id
    if config.kv_transfer_config is not None:
        config.kv_transfer_config.engine_id = boot.engine_id


def _use_cores(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _with_phases(base: type[Any], boot: RankBoot, channel: RankChannel, *, eager: bool) -> type[Any]:
    """The executor class, saying what it is busy with while the rank starts; it compiles in turn with other ranks."""

    class Phased(base):  # type: ignore[misc]
        def _init_executor(self) -> None:
            channel.phase("loading")
            super()._init_executor()

        def determine_available_memory(self, *args: Any, **kwargs: Any) -> Any:
            with compiled.shared(self, boot, channel):
                channel.phase("profiling" if eager else "compiling")
                return super().determine_available_memory(*args, **kwargs)

        def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
            channel.phase("allocating")
            return super().initialize_from_config(*args, **kwargs)

        def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
            channel.phase("warming" if eager else "capturing")
            return super().compile_or_warm_up_model(*args, **kwargs)

    # Logs, and vLLM where it compares names, see the class that was asked for.
    Phased.__name__, Phased.__qualname__, Phased.__module__ = (
        base.__name__,
        base.__qualname__,
        base.__module__,
    )
    return Phased


def _reporting(base: type[Any], boot: RankBoot, channel: RankChannel) -> type[Any]:
    """The engine core class that knows which rank it is and can tell."""

    class RankEngineCore(RankWeights, base, OlderCore):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            # Set before anything is built: KV event ports, seeds and compile caches follow it.
            vllm_config.parallel_config.data_parallel_index = boot.rank
            _name(vllm_config, boot)
            _set_title(boot.process_title)
            super().__init__(vllm_config, *args, **kwargs)
            # The constructor ends with VllmConfig.__post_init__, which draws a new instance_id.
            _name(vllm_config, boot)
            _tell_compiling(channel)
            if lora.needs_care(vllm_config):
                self.collective_rpc(lora.tell_apart)

        def dplaunch_report(self) -> dict[str, Any]:
            """What this rank is, as seen from inside."""
            return report(self.vllm_config, boot, type(self.model_executor).__name__)

        def dplaunch_ping(self) -> None:
            """Nothing: that it is answered says that the engine's loop goes round."""

    RankEngineCore.__name__ = RankEngineCore.__qualname__ = base.__name__
    return RankEngineCore


def _tell_compiling(channel: RankChannel) -> None:
    """Says when something is compiled while the rank serves, as vLLM's CPU sampler is at the first use of logprobs.

    That may take a minute on a busy machine, and nobody should take it for a hang. `torch._dynamo.callback` is
    torch's own way to learn of it. What a worker process compiles is not heard of here.
    """
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(lambda args: channel.phase(COMPILING))
    callback_handler.register_end_callback(lambda args: channel.phase("serving"))


def report(config: Any, boot: RankBoot, executor: str) -> dict[str, Any]:
    """A rank's account of itself, in plain values that go over the wire."""
    transfer = config.kv_transfer_config
    return {
        "rank": boot.rank,
        "incarnation": boot.incarnation,
        "pid": os.getpid(),
        "instance_id": config.instance_id,
        "engine_id": None if transfer is None else transfer.engine_id,
        "data_parallel_index": config.parallel_config.data_parallel_index,
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "cpus": sorted(os.sched_getaffinity(0)),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "executor": executor,
        "process_title": boot.process_title,
        "env": dict(os.environ),
    }


def _set_title(title: str) -> None:
    # run_engine_core has just set vLLM's own, which says "EngineCore" for every rank.
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(title)
