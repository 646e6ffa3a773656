"""TRL's trainers on a dplaunch server of the same host, without NCCL and without a GPU.

    with dplaunch.integrations.trl.use():
        trainer = GRPOTrainer(...)  # GRPOConfig(use_vllm=True, vllm_mode="server", ...)
    trainer.train()

TRL's own client sends weights over NCCL, which a dplaunch server takes as well; ours writes them into memory that the
ranks map. Everything else is TRL's. Checked with TRL 1.16.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dplaunch.bucket import BUCKET_BYTES, in_buckets
from dplaunch.errors import UsageError
from dplaunch.posted import as_told, seal
from dplaunch.standstill import PauseMode
from dplaunch.transfers import BUCKET, GIVE_UP

NAME = "VLLMClient"
"""What TRL's trainers call their client."""

Described = tuple[str, str, Sequence[int]]
"""A tensor's name, its type ("bfloat16") and its shape, as TRL announces it."""


@contextlib.contextmanager
def use(*, keep: bool = True, verify: bool = True, mode: PauseMode = "wait") -> Iterator[type[Any]]:
    """Has the TRL trainers that are made inside the block send their weights through memory.

    Args:
        keep: whether the server keeps the memory, a model's size, until the next update, so that a rank that is
            restarted meanwhile gets the same weights. Without, such a rank serves again after the next update; and the
            last one left may be such a rank, for whose answer the trainer then waits in vain.
        verify: whether the checksums of all ranks are compared; on devices they are computed on the host.
        mode: what becomes of requests in flight, as for `group.update_weights`.
    """
    from trl.generation import vllm_client, vllm_generation

    theirs = vllm_client.VLLMClient
    ours = type(theirs.__name__, (client_class(),), {"options": {"keep": keep, "verify": verify, "mode": mode}})
    # Each trainer has taken it by name from there.
    modules = {vllm_client, vllm_generation, *(each for name, each in sys.modules.items() if name.startswith("trl."))}
    changed = [module for module in modules if vars(module).get(NAME) is theirs]
    for module in changed:
        setattr(module, NAME, ours)
    try:
        yield ours
    finally:
        for module in changed:
            setattr(module, NAME, theirs)


@functools.cache
def client_class() -> type[Any]:
    """TRL's `VLLMClient`, whose weights go through memory; for code that makes its client itself."""
    from trl.generation.vllm_client import VLLMClient

    class MemoryClient(VLLMClient):  # type: ignore[misc]
        """Everything is TRL's but how weights travel."""

        options: dict[str, Any] = {"keep": True, "verify": True, "mode": "wait"}  # noqa: RUF012

        def init_communicator(self, device: Any = 0) -> None:
            """Looks whether the server can be sent weights; there is nobody to meet.

            Raises:
                RuntimeError: when its development endpoints are off (TRL's own words).
                UsageError: when it is no dplaunch server.
            """
            self.get_server_info()
            if self.session.get(f"{self.base_url}/ready").status_code == 404:
                raise UsageError(
                    f"the server at {self.base_url} is not dplaunch's, which alone takes weights through memory",
                    hint="Start it with `VLLM_SERVER_DEV_MODE=1 dplaunch`, or leave use() out.",
                )

        @contextlib.contextmanager
        def weight_update(self) -> Iterator[None]:
            """Several calls of `update_named_param` as one update. If the block fails, no rank gets any of it."""
            self._start_weight_update()
            self._updating_weights = True
            try:
                with self._given_up_on_error():
                    yield
            finally:
                self._updating_weights = False
            self._finish_weight_update()

        def update_named_params(self, metadata: Sequence[Described], named_params: Iterator[tuple[str, Any]]) -> None:
            """Sends weights, a bucket at a time; each is written as it comes."""
            if self._updating_weights:
                self._send(metadata, named_params)
                return
            with self.weight_update():
                self._send(metadata, named_params)

        def _send(self, metadata: Sequence[Described], named_params: Iterator[tuple[str, Any]]) -> None:
            for bucket in in_buckets(_announced(metadata, named_params), BUCKET_BYTES):
                try:
                    seal(bucket)
                    self._part({BUCKET: as_told(bucket), **self.options})
                finally:
                    bucket.free()

        @contextlib.contextmanager
        def _given_up_on_error(self) -> Iterator[None]:
            try:
                yield
            except BaseException as error:
                # Also where the server itself has ended the update, and knows of none.
                with contextlib.suppress(Exception):
                    self._part({GIVE_UP: f"{type(error).__name__}: {error}"})
                raise

        def _part(self, info: dict[str, Any]) -> None:
            self._post(f"{self.base_url}/update_weights", json={"update_info": info})

    return MemoryClient


def _announced(metadata: Sequence[Described], tensors: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The tensors, which have to be those that were announced.

    They are read to their end, where trainers put back what they have gathered.

    Raises:
        UsageError: when another one comes, one more or one less.
    """
    hint = "Send weights in the order of `metadata`, and announce each there."
    for described, given in itertools.zip_longest(metadata, tensors):
        if described is None or given is None:
            raise UsageError(f"{len(metadata)} weights were announced, and {_fewer_or_more(given)} came", hint=hint)
        (name, dtype, shape), (found, tensor) = described, given
        kind = str(tensor.dtype).removeprefix("torch.")
        if (found, kind, tuple(tensor.shape)) != (name, dtype, tuple(shape)):
            raise UsageError(
                f"{name} {dtype} {tuple(shape)} was announced, and {found} {kind} {tuple(tensor.shape)} came", hint=hint
            )
        yield name, tensor


def _fewer_or_more(given: object) -> str:
    return "fewer" if given is None else "more"
