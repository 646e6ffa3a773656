"""Many things done side by side, so many at a time, and each handed out as it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")

TOGETHER = 16
"""How many things are begun before the event loop gets its turn."""


class SideBySide(Generic[T]):
    """Begins with things in their order and yields (thing, result) in the order of their ends.

    An async context manager: entering begins, leaving cancels what is under way. It may be left from another task than
    the one that entered: each step of a generator may be a task of its own.

    Args:
        todo: the things, by number.
        room: how many may be under way; asked again and again, since it may grow.
        do: does one. What it raises ends everything and is raised to the reader.
    """

    def __init__(self, todo: Sequence[int], room: Callable[[], int], do: Callable[[int], Awaitable[T]]) -> None:
        self._count = self._left = len(todo)
        self._todo = iter(todo)
        self._room = room
        self._do = do
        self._workers = 0
        self._filling = False
        self._ended: asyncio.Queue[tuple[int, T] | None] = asyncio.Queue()
        self._all: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._all = asyncio.create_task(self._do_all())
        self._all.add_done_callback(lambda _: self._ended.put_nowait(None))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._all is not None:
            self._all.cancel()
            await asyncio.gather(self._all, return_exceptions=True)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, T]:
        if not self._left:
            raise StopAsyncIteration
        ended = await self._ended.get()
        if ended is None:
            self._left = 0
            await self._raise()
            raise StopAsyncIteration
        self._left -= 1
        return ended

    async def _raise(self) -> None:
        if self._all is None:
            return
        try:
            await self._all
        except BaseExceptionGroup as group:
            # The first is the cause: the others were cancelled for its sake.
            raise group.exceptions[0] from group.exceptions[0].__cause__

    async def _do_all(self) -> None:
        # A task group: when this task is cancelled (Ctrl-C), every worker is, and AsyncLLM aborts its request.
        async with asyncio.TaskGroup() as group:
            await self._fill(group)

    async def _fill(self, group: asyncio.TaskGroup) -> None:
        if self._filling:
            return
        self._filling = True
        try:
            while self._workers < min(self._count, self._room()):
                self._workers += 1
                group.create_task(self._work(group))
                if self._workers % TOGETHER == 0:
                    await asyncio.sleep(0)
        finally:
            self._filling = False

    async def _work(self, group: asyncio.TaskGroup) -> None:
        for number in self._todo:
            await self._fill(group)  # there may be more room by now
            self._ended.put_nowait((number, await self._do(number)))
