"""LoRA adapters of a running group: loaded, swapped and removed in all ranks, and in those that come up later."""

from __future__ import annotations

import time
from typing import Any

from dplaunch.crew import Crew, named
from dplaunch.errors import UsageError, WeightsError
from dplaunch.seam import weights as seam


class Adapters:
    """The adapters of a group.

    Args:
        crew: its ranks.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._weights = crew.weights
        self._last_id = 0

    async def load_lora(self, name: str, path: str, timeout_s: float) -> Any:
        """See `AsyncGroup.load_lora`."""
        # A number of its own for each: what is cached under the one before cannot be taken for this one's.
        self._last_id += 1
        return await self.add(seam.lora_request(name, self._last_id, path), timeout_s)

    async def add(self, lora: Any, timeout_s: float) -> Any:
        """Loads an adapter as vLLM's LoRARequest, whose number is its maker's choice."""
        deadline, name = time.monotonic() + timeout_s, lora.lora_name
        self._last_id = max(self._last_id, lora.lora_int_id)
        async with self._crew.one, self._weights.lock:
            keepers = self._crew.targets
            answers, failed = await self._weights.ask_all(
                [k.rank for k in keepers], "add_lora", lora, deadline=deadline
            )
            if not answers:
                why = "; ".join(named(rank, error) for rank, error in failed.items()) or "no rank is up"
                raise WeightsError(f"the adapter {name} could not be loaded: {why}")
            before = self._weights.loras.get(name)
            self._weights.loras[name] = lora
            await self._crew.put_aside(keepers, failed)
            if before is not None and before.lora_int_id != lora.lora_int_id:
                await self._crew.tell_all("remove_lora", before.lora_int_id, deadline=deadline)
        self._crew.say(f"the adapter {name} is loaded")
        return lora

    async def unload_lora(self, name: str, timeout_s: float) -> None:
        """See `AsyncGroup.unload_lora`."""
        async with self._crew.one, self._weights.lock:
            lora = self._weights.loras.pop(name, None)
            if lora is None:
                known = ", ".join(self._weights.loras) or "none"
                raise UsageError(f"there is no adapter {name!r}", hint=f"Adapters that are loaded: {known}.")
            await self._crew.tell_all("remove_lora", lora.lora_int_id, deadline=time.monotonic() + timeout_s)
        self._crew.say(f"the adapter {name} is removed")
