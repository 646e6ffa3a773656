"""Waiting for a condition: what a test does in place of sleeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

INTERVAL_S = 0.01
"""Seconds between two looks: short beside what tests wait for, long beside what a look costs."""


def poll_until(predicate: Callable[[], T], timeout_s: float = 10.0, what: str = "the condition") -> T:
    """Returns the first true value of `predicate`.

    Raises:
        TimeoutError: when there is none within `timeout_s` seconds; names `what`.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        _check(deadline, timeout_s, what)
        time.sleep(INTERVAL_S)
    return value


async def poll_until_async(predicate: Callable[[], T], timeout_s: float = 10.0, what: str = "the condition") -> T:
    """As `poll_until`, while the event loop goes on."""
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        _check(deadline, timeout_s, what)
        await asyncio.sleep(INTERVAL_S)
    return value


def _check(deadline: float, timeout_s: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{what} did not come within {timeout_s:g} s")
