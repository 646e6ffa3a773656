"""Where weights come from, and whether they can be had once more for a rank that comes up later."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from dplaunch.bucket import BUCKET_BYTES, WEIGHT_FILES, Bucket, in_buckets
from dplaunch.errors import UsageError
from dplaunch.threads import in_thread

Keep = Literal["memory", "disk"]
"""Where a copy of weights is kept for ranks that come up later."""

Tensors = Iterable[tuple[str, Any]]

WRAPPERS = ("DistributedDataParallel", "DataParallel")
"""torch's wrappers whose parameters are those of their `module`."""


class Source(Protocol):
    """Weights, as they are given to ranks."""

    @property
    def path(self) -> str | None:
        """The checkpoint that ranks load by themselves; None where they get buckets."""

    def lost(self) -> str:
        """Why it cannot be had once more as it was; "" when it can, as far as anyone knows without looking."""

    def buckets(self, readers: Sequence[str] = ()) -> AsyncIterator[Bucket]:
        """The weights, in parts; each is freed by whoever asked for it.

        Args:
            readers: see `in_buckets`; whoever gives them may write all of them into the host's memory.
        """

    def close(self) -> None:
        """Lets go of what is kept. Idempotent."""


class Checkpoint:
    """A directory in the format that the model is loaded from; every rank's host has it at the same path.

    Raises:
        UsageError: when it is no directory, or holds no weights.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser().absolute()
        if not self._path.is_dir():
            raise UsageError(f"{path} is no directory", hint="Name one that holds a checkpoint: *.safetensors.")
        self._files = self._look()
        if not any(name.endswith(WEIGHT_FILES) for name in self._files):
            raise UsageError(f"{path} holds no weights", hint="A checkpoint has *.safetensors beside its config.json.")

    @property
    def path(self) -> str | None:
        return str(self._path)

    def lost(self) -> str:
        return "" if self._look() == self._files else f"{self._path} has changed since"

    async def buckets(self, readers: Sequence[str] = ()) -> AsyncIterator[Bucket]:
        return
        yield

    def close(self) -> None:
        """Nothing is kept."""

    def _look(self) -> dict[str, tuple[int, int]]:
        """The size, and the time of the last change, of each file."""
        try:
            with os.scandir(self._path) as found:
                files = {each.name: each.stat() for each in found if each.is_file()}
        except OSError:
            return {}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in files.items()}


class Stream:
    """Tensors by name, in the names of a checkpoint.

    Args:
        tensors: gives them, anew at each call if it can; called in a thread.
        lost: why another call would not give the same.
        bucket_bytes: after so many bytes a bucket is full.
    """

    def __init__(self, tensors: Callable[[], Tensors], lost: Callable[[], str], bucket_bytes: int) -> None:
        self._tensors = tensors
        self._lost = lost
        self._bucket_bytes = bucket_bytes

    @property
    def path(self) -> str | None:
        return None

    def lost(self) -> str:
        return self._lost()

    async def buckets(self, readers: Sequence[str] = (), folder: Path | None = None) -> AsyncIterator[Bucket]:
        """One is filled while the one before is loaded: two are there at a time."""
        rest = in_buckets(self._tensors(), self._bucket_bytes, folder, readers)

        def following() -> Bucket | None:
            return next(rest, None)

        ahead = in_thread(following, "weights")
        try:
            while (bucket := await asyncio.shield(ahead)) is not None:
                ahead = in_thread(following, "weights")
                yield bucket
        finally:
            if not ahead.done():
                await asyncio.wait((ahead,))
            if not ahead.cancelled() and ahead.exception() is None and (left := ahead.result()) is not None:
                left.free()

    def close(self) -> None:
        """Nothing is kept."""


class Kept:
    """The same weights, and a copy of each bucket that goes by.

    Args:
        source: where they come from the first time.
        where: "memory", or "disk": a folder for temporary files.
    """

    def __init__(self, source: Stream, where: Keep) -> None:
        self._source = source
        self._folder = Path(tempfile.mkdtemp(prefix="dplaunch-weights-")) if where == "disk" else None
        self._kept: list[Bucket] = []
        self._complete = False

    @property
    def path(self) -> str | None:
        return None

    def lost(self) -> str:
        return "" if self._complete else "its copy is not complete"

    async def buckets(self, readers: Sequence[str] = ()) -> AsyncIterator[Bucket]:
        if self._complete:
            for bucket in self._kept:
                # One that whoever loads it may free.
                yield Bucket(bucket.path, bucket.size, bucket.entries)
            return
        async for bucket in self._source.buckets(folder=self._folder):
            self._kept.append(bucket)
            yield Bucket(bucket.path, bucket.size, bucket.entries)
        self._complete = True

    def close(self) -> None:
        kept, self._kept, self._complete = self._kept, [], False
        for bucket in kept:
            bucket.free()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class Initial:
    """The weights that ranks are started with: one that comes up has them."""

    path = None

    def lost(self) -> str:
        return ""

    async def buckets(self, readers: Sequence[str] = ()) -> AsyncIterator[Bucket]:
        return
        yield

    def close(self) -> None:
        """Nothing is kept."""


def as_source(given: Any, keep: Keep | None = None) -> Source:
    """What a caller gave as weights.

    Args:
        given: a checkpoint's directory, an nn.Module, a mapping or an iterable of (name, tensor), or a function that
            returns one of the last two.
        keep: where a copy is kept; None for nowhere.

    Raises:
        UsageError: when it is none of these.
    """
    if keep not in (None, "memory", "disk"):
        raise UsageError(f"keep cannot be {keep!r}", hint='Choose "memory", "disk" or None.')
    if isinstance(given, str | Path):
        return Checkpoint(Path(given))
    stream = _stream(given, BUCKET_BYTES)
    return stream if keep is None else Kept(stream, keep)


def _stream(given: Any, bucket_bytes: int) -> Stream:
    if hasattr(given, "state_dict") and hasattr(given, "named_parameters"):
        given = list(_distinct(given))
    if isinstance(given, Mapping):
        given = list(given.items())
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        where_they_are = _Watched(given)
        return Stream(where_they_are.pairs, where_they_are.lost, bucket_bytes)
    if callable(given):

        def called() -> Tensors:
            made = given()
            if hasattr(made, "state_dict"):
                return _distinct(made)
            return made.items() if isinstance(made, Mapping) else made

        return Stream(called, lambda: "", bucket_bytes)
    if isinstance(given, Iterable) and not isinstance(given, bytes):
        used = iter(given)
        return Stream(lambda: used, lambda: "they came as an iterator, which gives them once", bucket_bytes)
    raise UsageError(
        f"weights cannot be a {type(given).__name__}",
        hint="Give a checkpoint's directory, an nn.Module, or (name, tensor) pairs.",
    )


def _distinct(module: Any) -> Iterator[tuple[str, Any]]:
    """A module's parameters and buffers in a checkpoint's names, tied ones once."""
    # Wrappers that trainers put around a model, and into its parameters' names.
    while (inner := getattr(module, "_orig_mod", None)) is not None or type(module).__name__ in WRAPPERS:
        module = module.module if inner is None else inner
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if hasattr(tensor, "element_size") and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


class _Watched:
    """Tensors that stay where they are, in their owner's hands: nothing here keeps their memory.

    torch counts how often each was written to. What goes past that count is found by the checksum.
    """

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        self._tensors = [(name, weakref.ref(tensor), _writes(tensor)) for name, tensor in pairs]

    def pairs(self) -> Tensors:
        for name, tensor, _ in self._tensors:
            there = tensor()
            if there is None:
                raise UsageError(f"the tensor {name} is gone", hint="Hold on to weights while they are loaded.")
            yield name, there

    def lost(self) -> str:
        for _, tensor, writes in self._tensors:
            there = tensor()
            if there is None:
                return "the tensors are gone"
            if _writes(there) != writes:
                return "the tensors were written to after the update"
        return ""


def _writes(tensor: Any) -> int:
    # Inference tensors are not counted.
    return -1 if tensor.is_inference() else int(tensor._version)
