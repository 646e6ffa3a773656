"""The sync face of `dplaunch.model_control`."""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dplaunch.model_control import STAND_S, UPDATE_S
from dplaunch.standstill import PauseMode
from dplaunch.updating import WeightUpdate
from dplaunch.weight_source import Keep

if TYPE_CHECKING:
    from dplaunch.group import AsyncGroup

T = TypeVar("T")


class Loop(Protocol):
    """Where the async group lives."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for a coroutine."""


class SyncModelControl:
    """The part of `Group` that changes what is served; every method is that of `AsyncGroup`, and waits."""

    _group: AsyncGroup
    _loop: Loop

    def update_weights(
        self,
        source: Any,
        version: str | int | None = None,
        *,
        mode: PauseMode = "wait",
        keep: Keep | None = None,
        verify: bool = True,
        timeout_s: float = UPDATE_S,
    ) -> WeightUpdate:
        """Puts other weights into all ranks, or into none; see `AsyncGroup.update_weights`."""
        return self._loop.run(
            self._group.update_weights(source, version, mode=mode, keep=keep, verify=verify, timeout_s=timeout_s)
        )

    @property
    def weight_version(self) -> str:
        """What the current weights are called."""
        return self._group.weight_version

    def weight_checksums(self, timeout_s: float = UPDATE_S) -> dict[int, str]:
        """A digest of the weights in each rank's memory; see `AsyncGroup.weight_checksums`."""
        return self._loop.run(self._group.weight_checksums(timeout_s))

    def load_lora(self, name: str, path: str | Path, timeout_s: float = STAND_S) -> Any:
        """Loads a LoRA adapter into all ranks; see `AsyncGroup.load_lora`."""
        return self._loop.run(self._group.load_lora(name, path, timeout_s))

    def unload_lora(self, name: str, timeout_s: float = STAND_S) -> None:
        """Removes an adapter from all ranks."""
        self._loop.run(self._group.unload_lora(name, timeout_s))

    @property
    def loras(self) -> dict[str, Any]:
        """The adapters that are loaded, by name."""
        return self._group.loras

    def pause(self, mode: PauseMode = "wait", timeout_s: float = STAND_S) -> None:
        """Stops serving; see `AsyncGroup.pause`."""
        self._loop.run(self._group.pause(mode, timeout_s))

    def resume(self, timeout_s: float = STAND_S) -> None:
        """Serves again after `pause`."""
        self._loop.run(self._group.resume(timeout_s))

    def sleep(self, level: int = 1, mode: PauseMode = "wait", timeout_s: float = STAND_S) -> None:
        """Gives the devices' memory back; see `AsyncGroup.sleep`."""
        self._loop.run(self._group.sleep(level, mode, timeout_s))

    def wake_up(self, timeout_s: float = UPDATE_S) -> None:
        """Takes the memory back and serves again; see `AsyncGroup.wake_up`."""
        self._loop.run(self._group.wake_up(timeout_s))

    @contextlib.contextmanager
    def awake(self, level: int | None = None) -> Iterator[None]:
        """Awake inside the block, asleep after it; see `AsyncGroup.awake`."""
        inside = self._group.awake(level)
        self._loop.run(_enter(inside))
        try:
            yield
        finally:
            self._loop.run(_leave(inside))

    def release_memory(self, timeout_s: float = STAND_S) -> None:
        """Gives back as much of the devices' memory as can be had again; see `AsyncGroup.release_memory`."""
        self._loop.run(self._group.release_memory(timeout_s))


async def _enter(block: contextlib.AbstractAsyncContextManager[None]) -> None:
    await block.__aenter__()


async def _leave(block: contextlib.AbstractAsyncContextManager[None, bool | None]) -> None:
    await block.__aexit__(None, None, None)
