"""The end of a group's requests: time for those in flight, then the rest is aborted. The same on every backend."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from dplaunch.asked import Asked
from dplaunch.client import GroupClient
from dplaunch.errors import DplaunchError
from dplaunch.events import Event, Level, Listener
from dplaunch.seam import frontend
from dplaunch.spec import LaunchSpec

POLL_S = 0.02


def drain_seconds(spec: LaunchSpec) -> float:
    """Seconds that requests in flight get at the end: vLLM's own `shutdown_timeout`, whose default is 0."""
    return float(str(Asked(spec).get("shutdown_timeout") or 0))


async def drain(engine: Any, client: GroupClient, seconds: float, *, closed: DplaunchError, emit: Listener) -> None:
    """Waits for what is in flight, then aborts it; with 0 seconds nothing is done.

    Args:
        engine: the AsyncLLM.
        client: takes no new request from now on.
        seconds: how long to wait.
        closed: what a new request is refused with.
        emit: told how many requests are waited for, and how many were aborted.
    """
    if not seconds:
        return
    client.refuse_new(closed)
    # Those that are refused from now on stay in vLLM's table.
    left = frontend.unfinished(engine)
    if left:
        emit(Event(message=f"{_are(len(left))} in flight: up to {seconds:g} s for them to end"))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while left := left & frontend.unfinished(engine):
                await asyncio.sleep(POLL_S)
    if left:
        emit(Event(message=f"{_are(len(left))} aborted after {seconds:g} s", level=Level.WARNING))
        await frontend.abort(engine, left)


def _are(count: int) -> str:
    return "1 request is" if count == 1 else f"{count} requests are"
