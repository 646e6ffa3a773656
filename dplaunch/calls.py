"""Utility calls under way: which link each went over, and who waits for the answer."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dplaunch.errors import DplaunchError, GroupDeadError
from dplaunch.link import RankLink
from dplaunch.seam import wire
from dplaunch.seam.rank import PING


@dataclass(frozen=True, slots=True)
class _Call:
    link: RankLink
    method: str
    future: asyncio.Future[Any]
    sent: float


class Calls:
    """The calls of a group.

    Args:
        encode: the frames of a message to an engine.
    """

    def __init__(self, encode: Callable[[Any], Sequence[Any]]) -> None:
        self._encode = encode
        self._pending: dict[int, _Call] = {}
        self._ids = itertools.count(1)

    async def over(self, link: RankLink, method: str, *args: Any) -> Any:
        """Calls a method of the engine behind a link.

        Raises:
            GroupDeadError: when the link closes before the answer.
            RuntimeError: when the method fails; the message names the rank and what it said.
        """
        if link.closed:
            raise GroupDeadError(f"rank {link.rank} went down before the call")
        call_id = next(self._ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[call_id] = _Call(link, method, future, time.monotonic())
        try:
            link.send(wire.UTILITY, self._encode((0, call_id, method, args)))
            return await future
        finally:
            self._pending.pop(call_id, None)

    def since(self, link: RankLink) -> float | None:
        """Monotonic time at which the oldest call under way on a link was sent; None when there is none.

        The question whether its engine is there does not count.
        """
        return min(
            (call.sent for call in self._pending.values() if call.link is link and call.method != PING), default=None
        )

    def answer(self, link: RankLink, answer: Any) -> None:
        """Takes a UtilityOutput."""
        call = self._pending.get(answer.call_id)
        if call is None or call.future.done():
            return  # The caller has gone.
        future = call.future
        if answer.failure_message is not None:
            future.set_exception(RuntimeError(f"rank {link.rank}: {answer.failure_message}"))
        else:
            future.set_result(answer.result.result if answer.result is not None else None)

    def fail(self, error: DplaunchError, link: RankLink | None = None) -> None:
        """Ends the calls of a link, or all, with an error."""
        for call_id, call in list(self._pending.items()):
            if link is None or call.link is link:
                del self._pending[call_id]
                if not call.future.done():
                    call.future.set_exception(error)
