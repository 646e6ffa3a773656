"""The weights of a stand-in engine: nothing but their checksum, on which its answers depend."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dplaunch import bucket

LOST = "00000001"
"""The checksum of what is left after a sleep of level 2."""


def checksum_of(tensors: Iterable[tuple[str, Any]]) -> str:
    """The checksum of a stand-in engine that has loaded these tensors."""
    return _combined(
        {name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest() for name, tensor in tensors}
    )


def _combined(digests: Mapping[str, str]) -> str:
    lines = [f"{name} {digests[name]}" for name in sorted(digests)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class StandInWeights:
    """What a stand-in engine has loaded.

    Args:
        copies: whether it copies tensors in place of looking at them; its checksum is then over their names.
    """

    def __init__(self, copies: bool = False) -> None:
        self._copies = copies
        self._memory: dict[str, bytearray] = {}
        self.checksum = ""
        self.spoiled = ""
        """What the next bucket fails with."""
        self._digests: dict[str, str] = {}

    def begin(self) -> None:
        """Buckets follow."""
        self._digests = {}

    def load(self, path: str, entries: Sequence[Any]) -> None:
        """Takes a bucket, which it maps."""
        if self.spoiled:
            spoiled, self.spoiled = self.spoiled, ""
            raise RuntimeError(spoiled)
        content = bucket.mapped(path)
        for name, _, _, start, nbytes in entries:
            if self._copies:
                memory = self._memory.setdefault(name, bytearray(nbytes))
                with memoryview(content) as view:
                    memory[:] = view[start : start + nbytes]
                self._digests[name] = ""
                continue
            self._digests[name] = hashlib.sha256(content[start : start + nbytes]).hexdigest()

    def end(self) -> None:
        """All buckets were there."""
        self.checksum = _combined(self._digests)

    def reload(self, path: str | None) -> None:
        """Takes a checkpoint, or what the engine was started with."""
        self.checksum = "" if path is None else bucket.digest_of_files(path)

    def lose(self) -> None:
        """A deep sleep."""
        self.checksum = LOST
