"""Makes what a rank needs to start, for tests below the plan."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import cloudpickle

from dplaunch.backend import RankBoot
from dplaunch.identity import Identity
from dplaunch.testing import STANDIN_ENGINE, Fault, StandInPlan

BASE_ID = "contract"


def make_boot(
    address: str,
    *,
    rank: int = 3,
    incarnation: int = 0,
    plan: StandInPlan | None = None,
    fault: Fault | None = None,
    engine: str = STANDIN_ENGINE,
    env: Mapping[str, str] | None = None,
    cpus: tuple[int, ...] = (),
    log_file: Path | None = None,
) -> RankBoot:
    """A boot of the stand-in engine; `fault` is short for a plan in which every rank has it."""
    identity = Identity(BASE_ID, rank, incarnation)
    chosen = plan or StandInPlan(default=fault or Fault())
    return RankBoot(
        name=f"EngineCore_DP{rank}",
        rank=rank,
        incarnation=incarnation,
        process_title=identity.process_title,
        instance_id=identity.instance_id,
        engine_id=identity.engine_id("kv"),
        handshake_address=address,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **(env or {})},
        cpus=cpus,
        log_file=log_file,
        engine=engine,
        payload=cloudpickle.dumps(chosen),
        sys_path=tuple(sys.path),
    )
