"""How often and how soon ranks are restarted."""

from __future__ import annotations

import random

from dplaunch.spec import RestartPolicy


def counted(restarts: list[float], policy: RestartPolicy, now: float) -> list[float]:
    """The restarts that still count against the limit: a long stable run forgives those before it.

    Args:
        restarts: when they were, monotonic seconds.
        policy: says for how long they count.
        now: monotonic seconds.
    """
    return [at for at in restarts if now - at < policy.window_s]


def backoff_s(restarts: int, policy: RestartPolicy, *, alone: bool = True) -> float:
    """Seconds to wait before the next restart: none before the first, then more each time.

    Args:
        restarts: how many count already.
        policy: how long, and which share of it is left to chance.
        alone: whether no other rank is being restarted; ranks that died together should not all start together.
    """
    if restarts:
        # Beyond the window a wait makes no sense: the restarts before it would be forgiven.
        longest = min(policy.backoff_s * 2.0 ** (restarts - 1), policy.window_s)
        return longest * (1 - policy.jitter * random.random())
    return 0.0 if alone else policy.backoff_s * policy.jitter * random.random()


def exhausted(policy: RestartPolicy) -> str:
    """Why there is no further restart, in words."""
    return "restarts are off" if policy.limit == 0 else f"{policy.limit} restarts in {policy.window_s:.0f} s"
