"""A launch plan for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.planner import BUILTIN_MODEL


def as_text(plan: LaunchPlan, *, launcher_env: Mapping[str, str] | None = None) -> str:
    """The plan as aligned text.

    Args:
        plan: what to show.
        launcher_env: shows each rank's environment too, where it differs from this one; None for not.
    """
    lines = [*_heading(plan), "", *_table(plan)]
    if launcher_env is not None:
        for rank in plan.ranks:
            lines += ["", *_environment(rank, launcher_env)]
    if plan.warnings:
        lines += ["", *(f"warning: {warning}" for warning in plan.warnings)]
    return "\n".join(lines)


def as_json(plan: LaunchPlan, *, launcher_env: Mapping[str, str] | None = None) -> str:
    """The plan as JSON, with the same meaning."""
    return json.dumps(as_dict(plan, launcher_env=launcher_env), indent=2)


def as_dict(plan: LaunchPlan, *, launcher_env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The plan as plain values; a rank's `env` holds what differs, with null for what is taken away."""
    return {
        "name": plan.base_id,
        "backend": plan.spec.backend,
        "dp": len(plan.ranks),
        "model": plan.model,
        "model_note": plan.model_note,
        "mode": plan.mode.value,
        "mode_reason": plan.mode_reason,
        "executor": plan.executor.value,
        "executor_reason": plan.executor_reason,
        "engine_defaults": dict(plan.engine_defaults),
        "log_dir": str(plan.log_dir),
        "scheduler": plan.scheduler,
        "ranks": [_rank_dict(rank, launcher_env) for rank in plan.ranks],
        "warnings": list(plan.warnings),
    }


def is_spread(plan: LaunchPlan) -> bool:
    """Whether it is worth saying which rank goes where: there are several nodes, or somebody else gives out devices."""
    return bool(plan.scheduler) or len({rank.node for rank in plan.ranks}) > 1


def whereabouts(plan: LaunchPlan, rank: RankSpec) -> str:
    """A rank's node and devices: "node 10.0.0.7, 2 x cuda, chosen by Ray"."""
    return f"node {rank.node}, {_devices(plan, rank)}"


def env_changes(env: Mapping[str, str], launcher_env: Mapping[str, str]) -> dict[str, str | None]:
    """What differs from the launcher's environment, by name; None for what the rank does not have."""
    changed: dict[str, str | None] = {name: None for name in launcher_env if name not in env}
    changed |= {name: value for name, value in env.items() if launcher_env.get(name) != value}
    return dict(sorted(changed.items()))


def _rank_dict(rank: RankSpec, launcher_env: Mapping[str, str] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "rank": rank.identity.rank,
        "node": rank.node,
        "device_type": rank.device_type,
        "devices": list(rank.devices),
        "instance_id": rank.identity.instance_id,
        "cores": list(rank.cpus),
        "log_file": str(rank.log_file),
    }
    if launcher_env is not None:
        facts["env"] = env_changes(rank.env, launcher_env)
    return facts


def _heading(plan: LaunchPlan) -> list[str]:
    notes = [plan.model_note] if plan.model_note else []
    model = ", in ".join(notes if plan.model == BUILTIN_MODEL else [*notes, plan.model])
    ranks = "1 rank" if len(plan.ranks) == 1 else f"{len(plan.ranks)} ranks"
    facts = {
        "group": f"{plan.base_id}: {ranks}, backend {plan.spec.backend}",
        "model": model,
        "mode": f"{plan.mode.value}: {plan.mode_reason}",
        "executor": f"{plan.executor.value}: {plan.executor_reason}",
    }
    if plan.engine_defaults:
        added = ", ".join(f"{name}={value}" for name, value in plan.engine_defaults.items())
        facts["added"] = f"{added} (where you set none)"
    if is_spread(plan):
        facts["nodes"] = _nodes(plan)
    facts["logs"] = str(plan.log_dir)
    return [f"{name:<10}{value}" for name, value in facts.items()]


def _table(plan: LaunchPlan) -> list[str]:
    rows = [("rank", "node", "devices", "identity", "cores", "log file")]
    for rank in plan.ranks:
        cores = _ranges(rank.cpus) or "any"
        number, name = str(rank.identity.rank), rank.identity.instance_id
        rows.append((number, rank.node, _devices(plan, rank), name, cores, rank.log_file.name))
    return list(_aligned(rows))


def _devices(plan: LaunchPlan, rank: RankSpec) -> str:
    if rank.is_scheduled:
        return f"{len(rank.devices)} x {rank.device_type}, chosen by {plan.scheduler}"
    return f"{rank.device_type} {','.join(rank.devices)}"


def _nodes(plan: LaunchPlan) -> str:
    """ "10.0.0.7: ranks 0-1; 10.0.0.8: rank 2"."""
    ranks: dict[str, list[int]] = {}
    for rank in plan.ranks:
        ranks.setdefault(rank.node, []).append(rank.identity.rank)
    return "; ".join(f"{node}: {'rank' if len(here) == 1 else 'ranks'} {_ranges(here)}" for node, here in ranks.items())


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _environment(rank: RankSpec, launcher_env: Mapping[str, str]) -> list[str]:
    lines = [f"rank {rank.identity.rank}'s environment, where it differs from the launcher's:"]
    for name, value in env_changes(rank.env, launcher_env).items():
        lines.append(f"  without {name}" if value is None else f"  {name}={value}")
    return lines if len(lines) > 1 else [*lines, "  nothing"]


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers with runs drawn together: "0-3,8"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
