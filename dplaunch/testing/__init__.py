"""For tests of dplaunch and of its backends: an engine that can misbehave, an in-process backend, polling."""

from __future__ import annotations

from dplaunch.testing.faults import Fault, StandInPlan, When
from dplaunch.testing.poll import poll_until, poll_until_async
from dplaunch.testing.tokens import expected_tokens

STANDIN_ENGINE = "dplaunch.testing.standin:run"
"""What to give as `LaunchSpec.engine`, with `engine_args={"standin": StandInPlan()}`."""

__all__ = [
    "STANDIN_ENGINE",
    "Fault",
    "StandInPlan",
    "When",
    "expected_tokens",
    "poll_until",
    "poll_until_async",
]
