"""From a plan to what processes are given: the request for vLLM's config, and what makes a process a rank."""

from __future__ import annotations

import sys

import cloudpickle

from dplaunch.backend import RankBoot
from dplaunch.identity import Identity
from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.seam.config import ConfigRequest, ConfigResult
from dplaunch.seam.lockstep import LockstepPlace, MeetingPoint
from dplaunch.seam.rank import RankPayload
from dplaunch.spec import VLLM_ENGINE, Mode

STANDIN = "standin"
"""The engine argument that carries a stand-in engine's plan; vLLM does not know it."""


def config_request(plan: LaunchPlan, *, server: bool) -> bytes:
    """The payload for `dplaunch.seam.config:make`."""
    spec = plan.spec
    defaults = dict(plan.engine_defaults)
    if plan.mode is Mode.LOCKSTEP:
        defaults["data_parallel_size"] = spec.dp
    request = ConfigRequest(
        model=plan.model,
        engine_args={name: value for name, value in spec.engine_args.items() if name != STANDIN},
        argv=spec.vllm_argv,
        defaults=defaults,
        executor=plan.executor.value,
        server=server,
        env=dict(plan.ranks[0].env),
    )
    payload: bytes = cloudpickle.dumps(request)
    return payload


def make_boot(
    plan: LaunchPlan,
    config: ConfigResult,
    spec: RankSpec,
    identity: Identity,
    handshake_address: str,
    meeting: MeetingPoint | None = None,
) -> RankBoot:
    """What the next incarnation of a rank is made from; the same at a start and at a restart.

    Args:
        meeting: where ranks in lockstep meet in this life; None for independent ones.
    """
    place = None if meeting is None else _place(plan, spec, meeting)
    return RankBoot(
        name=f"EngineCore_DP{identity.rank}",
        rank=identity.rank,
        incarnation=identity.incarnation,
        process_title=identity.process_title,
        instance_id=identity.instance_id,
        engine_id=identity.engine_id(config.kv_engine_id),
        handshake_address=handshake_address,
        env={**config.environ, **spec.env},
        cpus=spec.cpus,
        log_file=spec.log_file,
        engine=plan.spec.engine,
        payload=_engine_payload(plan, config, place),
        sys_path=tuple(sys.path),
        node=spec.node,
    )


def _place(plan: LaunchPlan, spec: RankSpec, meeting: MeetingPoint) -> LockstepPlace:
    rank = spec.identity.rank
    # A scheduler shows each rank its own devices only, so there it is the first of its node.
    before = 0 if spec.is_scheduled else sum(each.node == spec.node for each in plan.ranks[:rank])
    return LockstepPlace(rank=rank, local_rank=before, host=meeting.host, port=meeting.port)


def _engine_payload(plan: LaunchPlan, config: ConfigResult, place: LockstepPlace | None) -> bytes:
    if plan.spec.engine == VLLM_ENGINE:
        content: object = RankPayload(
            config=config.config, executor=plan.executor.value, log_stats=plan.spec.log_stats, place=place
        )
    else:
        content = plan.spec.engine_args.get(STANDIN)
    payload: bytes = cloudpickle.dumps(content)
    return payload
