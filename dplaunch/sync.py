"""The sync face of a group: the async one, run in an event loop of its own in a background thread."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from dplaunch.batch import OnError, Prompt
from dplaunch.batch_progress import Progress
from dplaunch.events import Listener
from dplaunch.group import AsyncGroup, open_group
from dplaunch.model_control_sync import SyncModelControl
from dplaunch.resume_keys import Keys
from dplaunch.saved_batch import Resume
from dplaunch.spec import LaunchSpec

T = TypeVar("T")


class Group(SyncModelControl):
    """A group of data-parallel ranks for code that does not use asyncio. Made by `dplaunch.launch`."""

    def __init__(self, spec: LaunchSpec, *, progress: bool | None, listeners: Sequence[Listener]) -> None:
        self._loop = _LoopThread()
        try:
            self._group: AsyncGroup = self._loop.run(open_group(spec, progress=progress, listeners=listeners))
        except BaseException:
            self._loop.stop()
            raise
        # A group that is never closed is closed when it is collected, or when the interpreter ends. Registered
        # by ourselves for the latter, so that it is before the zygote's end, which is registered before.
        self._finalizer = weakref.finalize(self, _close, self._group, self._loop)
        atexit.register(self._finalizer)

    @property
    def plan(self) -> Any:
        """What was launched (a LaunchPlan)."""
        return self._group.plan

    @property
    def ranks_up(self) -> list[int]:
        """The ranks that take requests now."""
        return self._group.client.ranks

    def scale(self, dp: int, drain_s: float | None = None) -> None:
        """Changes the number of ranks while the group serves on; see `AsyncGroup.scale`."""
        self._loop.run(self._group.scale(dp, drain_s))

    def restart(self, ranks: Sequence[int] | None = None, rolling: bool = False, drain_s: float | None = None) -> None:
        """Restarts ranks while the group serves on; see `AsyncGroup.restart`."""
        self._loop.run(self._group.restart(ranks, rolling, drain_s))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Any = None,
        *,
        data_parallel_rank: int | None = None,
        lora_request: Any = None,
        on_error: OnError = "raise",
        progress: Progress = None,
        resume: Resume = None,
        key: Keys | None = None,
    ) -> list[Any]:
        """Answers a batch, in order; see `AsyncGroup.generate`. Ctrl-C aborts it and leaves the group usable."""
        return self._loop.run(
            self._group.generate(
                prompts,
                params,
                data_parallel_rank=data_parallel_rank,
                lora_request=lora_request,
                on_error=on_error,
                progress=progress,
                resume=resume,
                key=key,
            )
        )

    def generate_iter(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Any = None,
        *,
        data_parallel_rank: int | None = None,
        lora_request: Any = None,
        on_error: OnError = "raise",
        progress: Progress = None,
        resume: Resume = None,
        key: Keys | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Answers a batch and yields (index, output) as each is finished; see `AsyncGroup.generate_iter`.

        Leaving the loop early, or Ctrl-C in it, aborts what is in flight.
        """
        return self._iterate(
            self._group.generate_iter(
                prompts,
                params,
                data_parallel_rank=data_parallel_rank,
                lora_request=lora_request,
                on_error=on_error,
                progress=progress,
                resume=resume,
                key=key,
            )
        )

    def stream(
        self,
        prompt: Prompt,
        params: Any = None,
        *,
        data_parallel_rank: int | None = None,
        lora_request: Any = None,
    ) -> Iterator[str]:
        """Yields the pieces of one answer's text as they come; leaving the loop early aborts the request."""
        return self._iterate(
            self._group.stream(prompt, params, data_parallel_rank=data_parallel_rank, lora_request=lora_request)
        )

    def _iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        try:
            while True:
                try:
                    yield self._loop.run(anext(items))
                except StopAsyncIteration:
                    return
        finally:
            self._loop.run(items.aclose())

    def call(self, method: str, *args: Any, rank: int | None = None) -> list[Any]:
        """Calls an engine-core utility method on all ranks, or on one; see `AsyncGroup.call`."""
        return self._loop.run(self._group.call(method, *args, rank=rank))

    def close(self) -> None:
        """Stops the ranks; idempotent."""
        self._finalizer()
        atexit.unregister(self._finalizer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(group: AsyncGroup, loop: _LoopThread) -> None:
    try:
        loop.run(group.close())
    finally:
        loop.stop()


class _LoopThread:
    """An event loop in a daemon thread. The event loop policy, and the caller's loop, are left alone."""

    def __init__(self) -> None:
        self._loop = new_loop()
        self._thread = threading.Thread(target=self._live, name="dplaunch-group", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for a coroutine; when the wait is interrupted (Ctrl-C), cancels it, waits for its end, and raises."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except (KeyboardInterrupt, SystemExit):
            future.cancel()
            self._wait_until_idle(future)
            raise

    def _wait_until_idle(self, future: concurrent.futures.Future[Any]) -> None:
        # The future is cancelled at once, the task behind it takes until its cleanup is done.
        async def others() -> None:
            mine = asyncio.current_task()
            tasks = [t for t in asyncio.all_tasks() if t is not mine and t.cancelling()]
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(others(), self._loop).result()

    def stop(self) -> None:
        """Ends the loop and its thread."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _live(self) -> None:
        # All of it here: a thread that runs a loop of its own, as the caller's may, must not run this one too.
        self._loop.run_forever()
        _cancel_all(self._loop)
        self._loop.close()


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()

    async def ended() -> None:
        await asyncio.gather(*tasks, return_exceptions=True)

    loop.run_until_complete(ended())
    loop.run_until_complete(loop.shutdown_asyncgens())


def new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed (vLLM brings it), else asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
