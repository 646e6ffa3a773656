"""The verbs by which vLLM's AsyncLLM is steered, in the group's terms: what its HTTP routes do is done to the group.

vLLM's own would go straight to the engines, and a rank that comes up later would know nothing of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dplaunch.adapters import Adapters
from dplaunch.crew import Crew
from dplaunch.errors import GroupDeadError, UsageError
from dplaunch.standstill import PauseMode, Standstill
from dplaunch.transfers import Transfers
from dplaunch.updating import Updates
from dplaunch.weight_source import Checkpoint, Initial
from dplaunch.weights import Stance

if TYPE_CHECKING:
    from dplaunch.weight_source import Source

RELOAD = "reload_weights"
"""The one worker method that changes weights and may be called through /collective_rpc: it is made an update."""

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("start_weight_update", "start_draft_weight_update"), "/start_weight_update"),
    "update_weights": "/update_weights",
    "finish_weight_update": "/finish_weight_update",
    "init_weight_transfer_engine": "/init_weight_transfer_engine",
    "sleep": "/sleep",
    "wake_up": "/wake_up",
    "add_lora": "/v1/load_lora_adapter",
    "remove_lora": "/v1/unload_lora_adapter",
    "reset_weights": "",
}
"""Worker methods that would change ranks behind the group's back, and the route that does the same to the group."""


class Verbs:
    """What an AsyncLLM is told, done to its group. Lives in the group's event loop.

    Args:
        crew: the ranks.
        standstill: pauses the group, puts it to sleep, and wakes it.
        updates: gives it other weights.
        adapters: its LoRA adapters.
        transfers: updates of the weights in several calls.
        stand_s: seconds for a pause, a sleep or an adapter.
        update_s: seconds for weights.
    """

    def __init__(
        self,
        crew: Crew,
        standstill: Standstill,
        updates: Updates,
        adapters: Adapters,
        transfers: Transfers,
        *,
        stand_s: float,
        update_s: float,
    ) -> None:
        self._crew = crew
        self._standstill = standstill
        self._updates = updates
        self._adapters = adapters
        self.transfers = transfers
        self._stand_s = stand_s
        self._update_s = update_s

    @property
    def stance(self) -> Stance:
        """What the group is about."""
        return self._crew.weights.stance

    async def pause(self, mode: PauseMode) -> None:
        """See `AsyncGroup.pause`."""
        await self._standstill.pause(mode, self._stand_s)

    async def resume(self) -> None:
        """See `AsyncGroup.resume`."""
        await self._standstill.resume(self._stand_s)

    async def sleep(self, level: int, mode: PauseMode) -> None:
        """See `AsyncGroup.sleep`; level 0 is vLLM's name for a pause."""
        if level == 0:
            await self.pause(mode)
        else:
            await self._standstill.sleep(level, mode, self._stand_s)

    async def wake_up(self, tags: list[str] | None) -> bool:
        """Wakes the group; tells whether it serves.

        Args:
            tags: None for all. With "weights" alone they get their memory back and the group sleeps on, until weights
                have come and "kv_cache" is asked for.
        """
        if self.stance is Stance.PAUSED and (tags is None or "scheduling" in tags):
            await self.resume()
        elif self.stance is Stance.ASLEEP and tags is not None and "kv_cache" not in tags:
            async with self._crew.one, self._crew.weights.lock:
                await self._standstill.wake_weights(time.monotonic() + self._update_s)
        else:
            await self._standstill.wake_up(self._update_s)
        return self.stance is Stance.SERVING

    async def reset_prefix_cache(self, reset_running: bool, reset_connector: bool) -> bool:
        """Empties the prefix cache of every rank; tells whether all of them could. One that died has none."""
        calls = [
            self._crew.weights.ask(
                keeper.rank,
                "reset_prefix_cache",
                reset_running,
                reset_connector,
                deadline=time.monotonic() + self._stand_s,
            )
            for keeper in self._crew.targets
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, GroupDeadError):
                raise answer
        return all(bool(answer) for answer in answers if not isinstance(answer, GroupDeadError))

    async def add_lora(self, lora: Any) -> bool:
        """See `AsyncGroup.load_lora`."""
        await self._adapters.add(lora, self._stand_s)
        return True

    async def remove_lora(self, number: int) -> bool:
        """Removes the adapter of that number; tells whether there was one."""
        found = [name for name, lora in self._crew.weights.loras.items() if lora.lora_int_id == number]
        for name in found:
            await self._adapters.unload_lora(name, self._stand_s)
        return bool(found)

    async def forget_lora(self, name: str) -> None:
        """Removes an adapter, if it is there."""
        if name in self._crew.weights.loras:
            await self._adapters.unload_lora(name, self._stand_s)

    @property
    def weight_version(self) -> str:
        """See `AsyncGroup.weight_version`."""
        return self._crew.weights.version

    async def call_them_version(self, version: str) -> None:
        """Gives the weights that are there another name."""
        async with self._crew.one:
            self._crew.weights.version = version
            await self._crew.tell_all("set_weight_version", version, deadline=time.monotonic() + self._stand_s)

    async def of_workers(self, method: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
        """Whether a call of the workers was made a change of the group.

        Raises:
            UsageError: when it would change ranks behind the group's back.
        """
        if method in REFUSED:
            route = f"POST {REFUSED[method]}" if REFUSED[method] else "Give the group other weights"
            raise UsageError(f"{method} cannot be called in the workers of a group", hint=f"{route} instead.")
        if method != RELOAD:
            return False
        if arguments or set(named) - {"weights_path"}:
            raise UsageError("reload_weights takes only weights_path here", hint="POST /update_weights has more.")
        path = named.get("weights_path")
        source: Source = Initial() if path is None else Checkpoint(Path(path))
        await self._updates.update(source, None, mode="wait", verify=True, timeout_s=self._update_s)
        return True
