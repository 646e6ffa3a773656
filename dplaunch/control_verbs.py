"""What can be asked of a running group through its control socket."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from dplaunch.control_wire import ProtocolError
from dplaunch.errors import GroupClosedError, UsageError
from dplaunch.events import Event, as_record
from dplaunch.status import snapshot

if TYPE_CHECKING:
    from dplaunch.life import GroupLife

Lines = AsyncGenerator[dict[str, Any], None]

ARGUMENTS = {
    "status": set[str](),
    "events": set[str](),
    "stop": {"drain"},
    "scale": {"dp", "drain"},
    "restart": {"ranks", "rolling", "drain"},
}
"""The verbs, and what each takes."""


async def answer(group: GroupLife, verb: str, arguments: Mapping[str, Any]) -> Lines:
    """The lines of an answer: events while it is done, and then the result.

    Raises:
        ProtocolError: when there is no such verb, or it takes no such argument.
        DplaunchError: whatever the group refuses or fails with.
    """
    if verb not in ARGUMENTS:
        raise ProtocolError(f"there is no verb {verb!r}", hint=f"Verbs: {', '.join(ARGUMENTS)}.")
    if unknown := sorted(arguments.keys() - ARGUMENTS[verb]):
        raise ProtocolError(f"{verb} takes no {unknown[0]!r}")
    lines = {"status": _status, "events": _events, "stop": _stop, "scale": _scale, "restart": _restart}[verb]
    async for line in lines(group, arguments):
        yield line


async def _status(group: GroupLife, _: Mapping[str, Any]) -> Lines:
    yield _result(snapshot(group))


async def _events(group: GroupLife, _: Mapping[str, Any]) -> Lines:
    ended = asyncio.ensure_future(group.sight.ended.wait())
    try:
        async for line in _until(group, ended):
            yield line
    finally:
        ended.cancel()
    yield _result({})


async def _stop(group: GroupLife, arguments: Mapping[str, Any]) -> Lines:
    drain_s = _seconds(arguments)
    if drain_s is not None:
        group.drain_s = drain_s
    ends_process = group.sight.on_stop is not None
    if group.sight.on_stop is not None:
        group.sight.on_stop()
    else:
        closing = asyncio.ensure_future(group.close("dplaunch stop"))
        # It waits for this answer's end in its turn, so it must not be cancelled with it.
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())
    ended = asyncio.ensure_future(group.sight.ended.wait())
    try:
        async for line in _until(group, ended):
            yield line
    finally:
        ended.cancel()
    yield _result({"ends_process": ends_process, "pid": os.getpid()})


async def _scale(group: GroupLife, arguments: Mapping[str, Any]) -> Lines:
    dp = arguments.get("dp")
    if not isinstance(dp, int):
        raise UsageError(f"dp must be a whole number of ranks, not {dp!r}")
    async for line in _change(group, group.supervisor.scale(dp, _seconds(arguments))):
        yield line


async def _restart(group: GroupLife, arguments: Mapping[str, Any]) -> Lines:
    ranks, rolling = arguments.get("ranks"), arguments.get("rolling", False)
    if ranks is not None and not (isinstance(ranks, list) and all(isinstance(rank, int) for rank in ranks)):
        raise UsageError(f"ranks must be a list of ranks, or null for all, not {ranks!r}")
    async for line in _change(group, group.supervisor.restart(ranks, bool(rolling), _seconds(arguments))):
        yield line


async def _change(group: GroupLife, work: Coroutine[Any, Any, Any]) -> Lines:
    """Does what takes a while. Once begun it goes on, whether or not anybody listens."""
    task = asyncio.ensure_future(work)
    group.sight.work.add(task)
    task.add_done_callback(group.sight.work.discard)
    # Nobody may be left to hear of an error; the group's events have told it.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    async for line in _until(group, task):
        yield line
    if task.cancelled():
        raise GroupClosedError("the group was closed meanwhile")
    task.result()
    yield _result(snapshot(group))


async def _until(group: GroupLife, done: asyncio.Future[Any]) -> Lines:
    """The events until a future is done, and those that came with its end."""
    with group.sight.following() as queue:
        while not done.done():
            coming: asyncio.Future[Event] = asyncio.ensure_future(queue.get())
            try:
                await asyncio.wait((coming, done), return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not coming.done():
                    coming.cancel()
            if coming.done() and not coming.cancelled():
                yield _event(coming.result())
        while not queue.empty():
            yield _event(queue.get_nowait())


def _seconds(arguments: Mapping[str, Any]) -> float | None:
    seconds = arguments.get("drain")
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise UsageError(f"drain must be a number of seconds, not {seconds!r}")
    return float(seconds)


def _event(event: Event) -> dict[str, Any]:
    return {"type": "event", "event": as_record(event)}


def _result(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "result", "result": result}
