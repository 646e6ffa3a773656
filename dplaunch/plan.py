"""What will happen: a pure function of the spec and of an inventory. `dplaunch plan` prints it and starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dplaunch.identity import Identity
from dplaunch.spec import ExecutorKind, LaunchSpec, Mode

ANY_DEVICE = "any"
"""Stands for a device that the node's scheduler will choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What one rank will be.

    Args:
        identity: its names.
        node: the host that it runs on.
        device_type: "cuda", or "cpu" where cores are the devices.
        devices: CUDA indices or UUIDs, or core numbers; `ANY_DEVICE` for each that a scheduler will choose.
        env: the whole environment of its process: made, not inherited.
        cpus: the cores that its process is bound to; empty for no binding.
        log_file: where its whole output goes, its workers' too.
        executor: how it drives its devices: uni, mp or ray, never auto.
    """

    identity: Identity
    node: str
    device_type: str
    devices: tuple[str, ...]
    env: Mapping[str, str]
    cpus: tuple[int, ...]
    log_file: Path
    executor: ExecutorKind = ExecutorKind.UNI

    @property
    def is_scheduled(self) -> bool:
        """Whether a scheduler will choose its devices."""
        return ANY_DEVICE in self.devices


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """What a launch will do.

    Args:
        spec: what was asked for.
        base_id: the group's id.
        model: the model's path or hub name, after the default was filled in.
        model_note: how the model was come by, where that is worth saying ("the built-in model ...").
        mode: independent or lockstep, never auto.
        mode_reason: why.
        executor: uni, mp or ray, never auto.
        executor_reason: why.
        engine_defaults: vLLM engine arguments that the plan adds where the user set none.
        log_dir: the launch's own directory.
        ranks: one each, in order.
        warnings: what the user should know before it starts.
        scheduler: who chooses which of a node's devices a rank gets ("Ray"); "" where the plan did.
    """

    spec: LaunchSpec
    base_id: str
    model: str
    model_note: str
    mode: Mode
    mode_reason: str
    executor: ExecutorKind
    executor_reason: str
    engine_defaults: Mapping[str, object]
    log_dir: Path
    ranks: tuple[RankSpec, ...]
    warnings: tuple[str, ...] = ()
    scheduler: str = ""
