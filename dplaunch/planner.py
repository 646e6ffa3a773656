"""From what was asked and what there is to what will happen."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from dplaunch.argv import refuse_data_parallel
from dplaunch.asked import Asked
from dplaunch.builds import check_build
from dplaunch.choices import choose_executor, choose_mode, mode_warnings
from dplaunch.errors import UsageError
from dplaunch.identity import Identity, base_of, new_base_id
from dplaunch.inventory import Inventory
from dplaunch.memory import DEVICE_SHARE, check_devices, check_host, host_share, kv_cache_bytes, share_warnings
from dplaunch.model_info import ModelInfo, read_model_of
from dplaunch.placement import Place, place, placement_warnings
from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.rank_env import make_env
from dplaunch.spec import ExecutorKind, LaunchSpec, Mode

if TYPE_CHECKING:
    from dplaunch.backend import Backend

BUILTIN_MODEL = "(built-in)"
"""Stands for the built-in model's path in a plan that is only shown."""

BUILTIN_MAX_LEN = 2048
"""Tokens of the built-in model's context: enough to try it, and quick to start."""

BUILTIN_KV_BYTES = 256 * 2**20
"""The built-in model's KV cache on CPU, bytes: some 5000 tokens for each rank."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


async def plan_launch(
    spec: LaunchSpec,
    backend: Backend,
    *,
    make_model: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> LaunchPlan:
    """The plan of a launch, from what the backend and the model's files say.

    Args:
        spec: what was asked for.
        backend: gives the inventory.
        make_model: whether the built-in model is made when it is wanted; else it is only named.
        say: told, in the event loop's thread, what takes long: making the built-in model for the first time.

    Raises:
        DplaunchError: when the launch cannot be: UsageError, ModelError, ResourceError, BackendError.
    """
    refuse_data_parallel(spec.vllm_argv)
    model = read_model_of(spec)
    inventory = await backend.inventory(spec)
    check_build(spec, inventory)
    path, note = (None, "") if model is not None else await _builtin(make_model, say)
    return make_plan(spec, inventory, model, environ=os.environ, builtin_path=path, builtin_note=note)


async def _builtin(make: bool, say: Callable[[str], None]) -> tuple[Path | None, str]:
    from dplaunch import demo
    from dplaunch.threads import in_thread

    if not make:
        return None, demo.describe()
    loop = asyncio.get_running_loop()

    def pass_on(line: str) -> None:
        loop.call_soon_threadsafe(say, line)

    built = await in_thread(lambda: demo.demo_model(pass_on), "builtin-model")
    return built.path, built.note


def make_plan(
    spec: LaunchSpec,
    inventory: Inventory,
    model: ModelInfo | None,
    *,
    environ: Mapping[str, str],
    builtin_path: Path | None = None,
    builtin_note: str = "",
) -> LaunchPlan:
    """What a launch will do; reads and starts nothing.

    Args:
        spec: what was asked for.
        inventory: what there is to run on.
        model: what is known about the model; None for the built-in one.
        environ: the launcher's environment, from which the ranks' are made.
        builtin_path: where the built-in model is.
        builtin_note: which one it is.

    Raises:
        UsageError: when an option cannot be, or not together with another.
        ResourceError: when there are too few devices or too little memory; carries the numbers.
    """
    asked, device_type = Asked(spec), inventory.device_type
    world = world_size(asked)
    mode, mode_reason = choose_mode(spec, asked, model)
    executor, executor_reason = choose_executor(spec, asked, device_type, world)
    _check_share(inventory, world)
    places = place(spec, inventory, world)
    if mode is Mode.LOCKSTEP and places[0].node is not inventory.nodes[0]:
        raise UsageError(
            f"rank 0 of a group in lockstep cannot be on {places[0].node.name}: the ranks meet where it is launched",
            hint=f"Launch it there, or give rank 0 a place on {inventory.nodes[0].name}.",
        )
    facts = Facts(spec, asked, model, environ, device_type, world, places, mode, executor)
    base_id = _base_id(spec)
    log_dir = _log_dir(spec, base_id)
    return LaunchPlan(
        spec=spec,
        base_id=base_id,
        model=_model_name(spec, model, builtin_path),
        model_note=builtin_note if spec.model is None else "",
        mode=mode,
        mode_reason=mode_reason,
        executor=executor,
        executor_reason=executor_reason,
        engine_defaults=MappingProxyType(_engine_defaults(facts)),
        log_dir=log_dir,
        ranks=tuple(rank_spec(facts, rank, base_id, log_dir) for rank in range(spec.dp)),
        warnings=(
            *mode_warnings(mode, spec, asked, model, device_type),
            *placement_warnings(places, inventory, world),
            *share_warnings(inventory, asked),
        ),
        scheduler=inventory.scheduler,
    )


@dataclass(frozen=True, slots=True)
class Facts:
    """What the parts of a plan are made from."""

    spec: LaunchSpec
    asked: Asked
    model: ModelInfo | None
    environ: Mapping[str, str]
    device_type: str
    world: int
    places: tuple[Place, ...]
    mode: Mode
    executor: ExecutorKind


def _check_share(inventory: Inventory, world: int) -> None:
    # A scheduler that is asked for parts of several devices may give them all from one.
    chooses = inventory.device_type == "cuda" and inventory.scheduler and inventory.placed is None
    if chooses and inventory.share < 1 < world:
        raise UsageError(
            f"num_gpus={inventory.share:g} cannot be with {world} devices a rank: {inventory.scheduler} may put "
            "several of its parts on one device",
            hint="Give placement_groups of your own, with one device in each bundle.",
        )


def world_size(asked: Asked) -> int:
    """Devices, or workers, of one rank."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
    tensor, pipeline, context = (asked.whole(name, 1) for name in sizes)
    return tensor * pipeline * context


def _model_name(spec: LaunchSpec, model: ModelInfo | None, builtin_path: Path | None) -> str:
    if spec.model is None:
        return str(builtin_path or BUILTIN_MODEL)
    return spec.model if model is None else model.model


def _engine_defaults(facts: Facts) -> dict[str, object]:
    """Checks that the ranks fit into memory; returns the engine arguments to add where the user set none."""
    asked, builtin = facts.asked, facts.spec.model is None
    share = asked.fraction("gpu_memory_utilization")
    defaults: dict[str, object] = {"max_model_len": BUILTIN_MAX_LEN} if builtin else {}
    if facts.device_type == "cuda":
        check_devices(facts.places, share=share or DEVICE_SHARE)
    else:
        kv_bytes = kv_cache_bytes(asked, {**facts.environ, **facts.spec.env})
        if builtin:
            defaults |= {"dtype": "float32", "enforce_eager": True}
            if kv_bytes is None and share is None:
                kv_bytes = defaults["kv_cache_memory_bytes"] = BUILTIN_KV_BYTES
        if share is None:
            share = defaults["gpu_memory_utilization"] = host_share(facts.places, facts.world)
        loads = asked.get("load_format") != "dummy"
        weights = facts.model.weight_bytes if facts.model is not None and loads else None
        check_host(facts.places, share=share, kv_bytes=kv_bytes, weights=weights or 0, world=facts.world)
    return {name: value for name, value in defaults.items() if name not in asked}


def rank_spec(facts: Facts, rank: int, base_id: str, log_dir: Path) -> RankSpec:
    """One rank of a plan."""
    own = facts.places[rank]
    env = make_env(
        {**facts.environ, **own.node.env},
        device_type=facts.device_type,
        devices=_visible(facts, own),
        cpus=own.cpus,
        extra=facts.spec.env,
        workers=0 if facts.executor is ExecutorKind.UNI else facts.world,
    )
    return RankSpec(
        identity=Identity(base_id, rank, suffixed=facts.spec.dp > 1),
        node=own.node.name,
        device_type=facts.device_type,
        devices=own.names,
        env=env,
        cpus=own.cpus,
        log_file=log_dir / f"rank{rank}.log",
        executor=facts.executor,
    )


def _visible(facts: Facts, own: Place) -> tuple[str, ...] | None:
    if own.scheduled:
        return None  # the backend says it, once the scheduler has chosen
    if facts.mode is Mode.INDEPENDENT:
        return own.names
    # NCCL warms up minutes slower between processes that see different devices: a lockstep rank sees all of its
    # group's on its node and is told which are its own.
    return tuple(dict.fromkeys(name for each in facts.places if each.node is own.node for name in each.names))


def _base_id(spec: LaunchSpec) -> str:
    if spec.base_id is None:
        return new_base_id()
    # It becomes part of file, socket and actor names.
    if not _NAME.fullmatch(spec.base_id):
        raise UsageError(
            f"name {spec.base_id!r} cannot be",
            hint="Use up to 64 letters, digits, dots, dashes, underscores.",
        )
    if base_of(spec.base_id) != spec.base_id:
        raise UsageError(f"name {spec.base_id!r} ends like a rank's own name", hint=f"Use {base_of(spec.base_id)!r}.")
    return spec.base_id


def _log_dir(spec: LaunchSpec, base_id: str) -> Path:
    if spec.log_dir is not None:
        return spec.log_dir.expanduser().absolute()
    import platformdirs

    return platformdirs.user_state_path("dplaunch") / "logs" / base_id
