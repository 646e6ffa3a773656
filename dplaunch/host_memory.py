"""The host's memory, filled from tensors. Most of the time goes into new pages, which several threads can share."""

from __future__ import annotations

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PIECE = 16 * 2**20
"""Bytes that a thread copies at a time. Of a device's tensors it has as many pinned, once."""

MOST_THREADS = 8


class Writer:
    """Puts tensors' bytes into files.

    Args:
        threads: how many copy; None for as many as leave half of the cores to others, 8 at most.
    """

    def __init__(self, threads: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        self._most = min(MOST_THREADS, cores // 2) if threads is None else threads
        self._threads: ThreadPoolExecutor | None = None
        self._own = threading.local()

    def close(self) -> None:
        """Ends its threads. Idempotent."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()

    def to_disk(self, fd: int, start: int, flat: Any) -> None:
        """Writes a flat tensor of bytes, on any device, to a file from `start` on.

        Raises:
            OSError: when there is no room.
        """
        for first in range(0, flat.numel(), PIECE):
            left = memoryview(self._on_host(flat[first : first + PIECE]).numpy())
            end = start + first + len(left)
            while left:
                left = left[os.pwrite(fd, left, end - len(left)) :]

    def to_memory(self, fd: int, start: int, flat: Any) -> None:
        """The same to a memfd. Calls come in order: what is there ends before `start`.

        One thread is faster by write(2), which fills new pages in half the time of a mapping; but a file takes one
        writer at a time.
        """
        import numpy as np

        nbytes = flat.numel()
        if self._most < 2 or nbytes < 2 * PIECE:
            self.to_disk(fd, start, flat)
            return
        os.ftruncate(fd, start + nbytes)
        # A mapping begins at a page; it ends with the last array over it.
        before = start % mmap.ALLOCATIONGRANULARITY
        into = np.frombuffer(mmap.mmap(fd, before + nbytes, offset=start - before), dtype=np.uint8)[before:]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._most, thread_name_prefix="dplaunch-weights")
        list(self._threads.map(lambda first: self._copy(into, flat, first), range(0, nbytes, PIECE)))

    def _copy(self, into: Any, flat: Any, first: int) -> None:
        """One piece. numpy's copy is one thread's, and others run meanwhile."""
        import numpy as np

        np.copyto(into[first : first + PIECE], self._on_host(flat[first : first + PIECE]).numpy())

    def _on_host(self, part: Any) -> Any:
        """The part itself or, of a device, a copy in memory of this thread that the next one overwrites."""
        if part.device.type == "cpu":
            return part
        import torch

        if not hasattr(self._own, "pinned"):
            try:
                self._own.pinned = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # The system allows no more; a copy to it takes longer.
                self._own.pinned = torch.empty(PIECE, dtype=torch.uint8)
        return self._own.pinned[: part.numel()].copy_(part)
