"""What the plan decides for the user, each time with the reason why: the mode and the executor."""

from __future__ import annotations

from dplaunch.asked import Asked
from dplaunch.errors import UsageError
from dplaunch.model_info import ModelInfo
from dplaunch.spec import ExecutorKind, LaunchSpec, Mode


def choose_mode(spec: LaunchSpec, asked: Asked, model: ModelInfo | None) -> tuple[Mode, str]:
    """Whether the ranks share one fate, and why.

    Raises:
        UsageError: when lockstep, or what belongs to it, was asked for and cannot be.
    """
    name, is_moe = spec.model or "the built-in model", has_experts(spec, model)
    if asked.truth("enable_elastic_ep"):
        raise UsageError(
            "--enable-elastic-ep cannot be used: ranks in lockstep keep their number while they run",
            hint="Leave it out. Without expert parallelism ranks can be added and taken away (dplaunch scale).",
        )
    if spec.mode is Mode.LOCKSTEP:
        _check_lockstep(spec, name, is_moe)
    if spec.mode is not Mode.AUTO:
        return spec.mode, "as asked"
    if spec.dp == 1:
        return Mode.INDEPENDENT, "there is one rank"
    if is_moe is not False and asked.truth("enable_expert_parallel"):
        return (
            Mode.LOCKSTEP,
            "with expert parallelism each rank holds a part of the experts, so all step together",
        )
    if is_moe is None:
        unknown = f"whether {name} has experts is unknown until it is fetched"
        return Mode.INDEPENDENT, f"expert parallelism was not asked for ({unknown})"
    if is_moe:
        return (
            Mode.INDEPENDENT,
            "without expert parallelism each rank holds all the experts: they share nothing",
        )
    return Mode.INDEPENDENT, "the model is dense: the ranks share nothing"


def mode_warnings(mode: Mode, spec: LaunchSpec, asked: Asked, model: ModelInfo | None, device_type: str) -> list[str]:
    """What the user should know about the mode."""
    name, is_moe = spec.model or "the built-in model", has_experts(spec, model)
    warnings = []
    if is_moe is False and asked.truth("enable_expert_parallel"):
        warnings.append(f"{name} has no experts: --enable-expert-parallel changes nothing")
    if is_moe is None and mode is Mode.LOCKSTEP:
        warnings.append(f"whether {name} has experts is unknown until it is fetched; if not, use --mode independent")
    if device_type == "cpu" and mode is Mode.LOCKSTEP:
        warnings.append("vLLM has no all-to-all on CPU: a lockstep group starts, but its first request fails")
    return warnings


def has_experts(spec: LaunchSpec, model: ModelInfo | None) -> bool | None:
    """Whether the model is a mixture of experts; None when not known. The built-in one is not."""
    if model is not None:
        return model.is_moe
    return False if spec.model is None else None


def choose_executor(spec: LaunchSpec, asked: Asked, device_type: str, world: int) -> tuple[ExecutorKind, str]:
    """How each rank drives its devices, and why.

    Args:
        spec: what was asked for.
        asked: the same in vLLM's words.
        device_type: "cuda" or "cpu".
        world: devices of one rank.

    Raises:
        UsageError: when what was asked for cannot be.
    """
    kind = _asked_executor(spec, asked)
    if kind is ExecutorKind.UNI and world > 1:
        raise UsageError(f"executor uni drives one device, and each rank has {world}", hint="Use mp.")
    if kind is not None:
        return kind, "as asked"
    if world > 1:
        return ExecutorKind.MP, f"one worker process for each of a rank's {world} devices"
    if device_type == "cpu":
        return ExecutorKind.UNI, "one process a rank: no worker to import, no shared-memory hop"
    return ExecutorKind.MP, "measured: with a worker process a rank has 1.1 to 1.6 times the tokens/s of uni"


def _check_lockstep(spec: LaunchSpec, name: str, is_moe: bool | None) -> None:
    if spec.dp == 1:
        raise UsageError("mode lockstep needs at least two ranks, not dp=1", hint="Leave --mode out.")
    if is_moe is False:
        raise UsageError(f"mode lockstep is for models with experts, {name} has none", hint="Leave --mode out.")


def _asked_executor(spec: LaunchSpec, asked: Asked) -> ExecutorKind | None:
    if spec.executor is not ExecutorKind.AUTO:
        return spec.executor
    value = asked.get("distributed_executor_backend")
    if value is None:
        return None
    # vLLM also takes a class and "external_launcher", which bring their own way to start processes.
    if not isinstance(value, str) or value not in ("uni", "mp", "ray"):
        raise UsageError(
            f"--distributed-executor-backend cannot be {value!r} here", hint="Choose one of: uni, mp, ray."
        )
    return ExecutorKind(value)
