"""Utility calls under way: which link each went over, and who waits for the answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from dplaunch.errors import DplaunchError, GroupDeadError
from dplaunch.link import RankLink
from dplaunch.seam import wire
from dplaunch.seam.rank import PING


class Calls:
    """The calls of a group.

    Args:
        encode: the frames of a message to an engine.
    """

    def __init__(self, encode: Callable[[Any], Sequence[Any]]) -> None:
        self._encode = encode
        self._pending: dict[int, tuple[RankLink, str, asyncio.Future[Any]]] = {}
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
        self._pending[call_id] = (link, method, future)
        try:
            link.send(wire.UTILITY, self._encode((0, call_id, method, args)))
            return await future
        finally:
            self._pending.pop(call_id, None)

    def count(self, link: RankLink) -> int:
        """Calls under way on a link, but for the question whether its engine is there."""
        return sum(owner is link and method != PING for owner, method, _ in self._pending.values())

    def answer(self, link: RankLink, answer: Any) -> None:
        """Takes a UtilityOutput."""
        _, _, future = self._pending.get(answer.call_id, (link, "", None))
        if future is None or future.done():
            return  # The caller has gone.
        if answer.failure_message is not None:
            future.set_exception(RuntimeError(f"rank {link.rank}: {answer.failure_message}"))
        else:
            future.set_result(answer.result.result if answer.result is not None else None)

    def fail(self, error: DplaunchError, link: RankLink | None = None) -> None:
        """Ends the calls of a link, or all, with an error."""
        for call_id, (owner, _, future) in list(self._pending.items()):
            if link is None or owner is link:
                del self._pending[call_id]
                if not future.done():
                    future.set_exception(error)
