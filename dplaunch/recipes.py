"""From a plan to what processes are given: the request for vLLM's config, and what makes a process a rank."""

from __future__ import annotations

import sys

import cloudpickle

from dplaunch.backend import RankBoot
from dplaunch.identity import Identity
from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.seam.config import ConfigRequest, ConfigResult
from dplaunch.seam.rank import RankPayload
from dplaunch.spec import VLLM_ENGINE

STANDIN = "standin"
"""The engine argument that carries a stand-in engine's plan; vLLM does not know it."""


def config_request(plan: LaunchPlan, *, server: bool) -> bytes:
    """The payload for `dplaunch.seam.config:make`."""
    spec = plan.spec
    request = ConfigRequest(
        model=plan.model,
        engine_args={name: value for name, value in spec.engine_args.items() if name != STANDIN},
        argv=spec.vllm_argv,
        defaults=dict(plan.engine_defaults),
        executor=plan.executor.value,
        server=server,
        env=dict(plan.ranks[0].env),
    )
    payload: bytes = cloudpickle.dumps(request)
    return payload


def make_boot(
    plan: LaunchPlan, config: ConfigResult, spec: RankSpec, identity: Identity, handshake_address: str
) -> RankBoot:
    """What the next incarnation of a rank is made from; the same at a start and at a restart."""
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
        payload=_engine_payload(plan, config),
        sys_path=tuple(sys.path),
        node=spec.node,
    )


def _engine_payload(plan: LaunchPlan, config: ConfigResult) -> bytes:
    if plan.spec.engine == VLLM_ENGINE:
        content: object = RankPayload(config=config.config, executor=plan.executor.value, log_stats=plan.spec.log_stats)
    else:
        content = plan.spec.engine_args.get(STANDIN)
    payload: bytes = cloudpickle.dumps(content)
    return payload
