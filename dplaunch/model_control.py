"""What a group serves, steered by the program that it lives in: weights, adapters, and whether it serves at all."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

from dplaunch.adapters import Adapters
from dplaunch.crew import Crew
from dplaunch.life import GroupLife
from dplaunch.seam.steered import steer
from dplaunch.standstill import PauseMode, Standstill
from dplaunch.transfers import Transfers
from dplaunch.updating import Updates, WeightUpdate
from dplaunch.verbs import Verbs
from dplaunch.weight_source import Keep, as_source
from dplaunch.weights import Stance

UPDATE_S = 600.0
"""Seconds for an update unless told otherwise: as long as a start may take, which loads weights too."""

STAND_S = 120.0
"""Seconds for requests in flight to end, and for ranks to acknowledge, unless told otherwise."""


class ModelControl(GroupLife):
    """The part of `AsyncGroup` that changes what is served. One change at a time; the next one waits."""

    verbs: Verbs
    """The same, as vLLM's AsyncLLM has it: what its HTTP routes go by."""

    _transfers: Transfers | None = None

    async def open(self) -> Self:
        await super().open()
        steer(self._engine, self.verbs)
        return self

    async def _close(self, reason: str) -> None:
        if self._transfers is not None:
            await self._transfers.close()
        await super()._close(reason)

    async def update_weights(
        self,
        source: Any,
        version: str | int | None = None,
        *,
        mode: PauseMode = "wait",
        keep: Keep | None = None,
        verify: bool = True,
        timeout_s: float = UPDATE_S,
    ) -> WeightUpdate:
        """Puts other weights into all ranks, or into none; new requests wait meanwhile.

        Tensors are written once into shared memory, in buckets of 256 MiB, and every rank of this host reads them
        there; a rank elsewhere gets them over its socket. A checkpoint is read by each rank from its own disk.

        A rank that dies, fails or does not answer in time is brought up again with the new weights, where `source` can
        be had once more: a checkpoint that was not changed, tensors (of a module, a mapping, a list) that are still
        there and were not written to, or a function that gives them. Otherwise it is STALE, and takes no requests until
        the next update; so is a rank that dies or is added later.

        Args:
            source: a checkpoint's directory; an nn.Module; a mapping or an iterable of (name, tensor) in the names of a
                checkpoint; or a function that returns one of these. It is read in a thread.
            version: what to call them; None for the number of the update.
            mode: what becomes of requests in flight: "wait" for their end, "abort" them, or "keep": they go on with
                the new weights (`CompletionOutput.weight_versions` says which token came from which).
            keep: "memory" or "disk" for a copy, so that ranks that come up later can be given them in any case; it is
                dropped at the next update.
            verify: whether the checksums of all ranks are compared; on devices they are computed on the host.
            timeout_s: seconds for all of it.

        Raises:
            UsageError: when `source` cannot be weights; nothing was changed.
            StandstillError: when requests were still running at the deadline; nothing was changed.
            WeightsError: when the source fails, no rank could load it, or the ranks disagree. The message says what
                the ranks have now: the weights from before, or, where these cannot be had again, none, and then
                requests wait for the next update.
        """
        _ = self.engine
        made = as_source(source, keep)
        name = None if version is None else str(version)
        done = await self._updates.update(made, name, mode=mode, verify=verify, timeout_s=timeout_s)
        del source  # Held until here: nobody else may do so.
        return done

    @property
    def weight_version(self) -> str:
        """What the current weights are called; "0" for those that the ranks were started with."""
        return self._crew.weights.version

    async def weight_checksums(self, timeout_s: float = UPDATE_S) -> dict[int, str]:
        """A digest of the weights in each rank's memory, by rank; all are equal.

        Raises:
            WeightsError: when a rank does not answer.
        """
        _ = self.engine
        return await self._updates.checksums(timeout_s)

    async def load_lora(self, name: str, path: str | Path, timeout_s: float = STAND_S) -> Any:
        """Loads a LoRA adapter into all ranks, and into those that come up later; one of that name is swapped for it.

        Returns the LoRARequest that `generate` takes.

        Raises:
            WeightsError: when no rank could load it.
        """
        _ = self.engine
        return await self._adapters.load_lora(name, str(path), timeout_s)

    async def unload_lora(self, name: str, timeout_s: float = STAND_S) -> None:
        """Removes an adapter from all ranks.

        Raises:
            UsageError: when there is none of that name.
        """
        _ = self.engine
        await self._adapters.unload_lora(name, timeout_s)

    @property
    def loras(self) -> dict[str, Any]:
        """The adapters that are loaded, as LoRARequest, by name."""
        return dict(self._crew.weights.loras)

    async def pause(self, mode: PauseMode = "wait", timeout_s: float = STAND_S) -> None:
        """Stops serving, until `resume`; new requests wait. Does nothing when the group stands still already.

        Args:
            mode: what becomes of requests in flight: "wait" for their end, "keep" them as they are, or "abort" them.
            timeout_s: seconds for that, and for every rank to acknowledge. One that does not is replaced.

        Raises:
            StandstillError: when requests were still running at the deadline; the group serves on.
        """
        _ = self.engine
        await self._standstill.pause(mode, timeout_s)

    async def resume(self, timeout_s: float = STAND_S) -> None:
        """Serves again after `pause`."""
        _ = self.engine
        await self._standstill.resume(timeout_s)

    async def sleep(self, level: int = 1, mode: PauseMode = "wait", timeout_s: float = STAND_S) -> None:
        """Gives the devices' memory back, until `wake_up`; new requests wait. Frees memory on CUDA only.

        A CUDA engine has to be started with vLLM's `enable_sleep_mode`. Probes count a sleeping rank as well.

        Args:
            level: 1 moves the weights to host memory, 2 drops them; both drop the KV cache.
            mode: as for `pause`.
            timeout_s: as for `pause`.

        Raises:
            StandstillError: when requests were still running at the deadline; the group serves on.
        """
        _ = self.engine
        await self._standstill.sleep(level, mode, timeout_s)

    async def wake_up(self, timeout_s: float = UPDATE_S) -> None:
        """Takes the memory back and serves again; after a sleep of level 2 the current weights are loaded once more.

        Raises:
            WeightsError: when these cannot be had again and no others were given; the group sleeps on.
        """
        _ = self.engine
        await self._standstill.wake_up(timeout_s)

    @contextlib.asynccontextmanager
    async def awake(self, level: int | None = None) -> AsyncIterator[None]:
        """Awake inside the block, asleep after it.

        Args:
            level: how deep it sleeps then; None for the level before, or 1.
        """
        weights = self._crew.weights
        deep = level or (weights.level if weights.stance is Stance.ASLEEP else 1)
        await self.wake_up()
        try:
            yield
        finally:
            if self.seen.error is None and not self.seen.is_closing:
                await self.sleep(deep)

    async def release_memory(self, timeout_s: float = STAND_S) -> None:
        """Gives back as much of the devices' memory as can be had again: a sleep of level 2 if the weights can."""
        _ = self.engine
        await self._standstill.sleep(1 if self._crew.weights.source.lost() else 2, "wait", timeout_s)

    def _steer(self, crew: Crew) -> None:
        self._crew = crew
        self._standstill = Standstill(crew)
        self._updates = Updates(crew, self._standstill)
        self._adapters = Adapters(crew)
        self._transfers = Transfers(crew, self._updates, UPDATE_S)
        self.verbs = Verbs(
            crew,
            self._standstill,
            self._updates,
            self._adapters,
            self._transfers,
            stand_s=STAND_S,
            update_s=UPDATE_S,
        )
